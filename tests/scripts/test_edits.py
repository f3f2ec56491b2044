"""The worked edits of docs/edits apply to the loop as it is, and do what they say, on every backend and through resume.

What each does is held against its formula in numpy or plain torch, on the weights that its checkpoints hold.
"""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from babl.config import load_config
from babl.errors import UserError
from babl.models import from_pretrained

ROOT = Path(__file__).parent.parent.parent
EDITS = sorted(path.stem for path in (ROOT / "docs" / "edits").glob("*.diff"))
BACKENDS = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
ON_DDP_ALONE = {"gradient-noise": "ddp"}  # what asks for gradients before the ranks' are reduced
SHAPE = "model.shape={d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, num_decoder_layers=2, dropout_rate=0.1}"
BASE = ["model.tokenizer_size=400", "data.max_source_tokens=128", "data.stride=16", "batch.tokens=1024"]
BASE += ["optim.lr=0.002", "optim.schedule=constant", "optim.warmup_steps=0", "train.keep_last=0", "train.save_every=1"]
BASE += ["train.validate_every=0", "train.preflight=false"]


def program(edit, folder):
    """The loop with an edit applied, as a module."""
    (folder / "scripts").mkdir(parents=True)
    script = Path(shutil.copy(ROOT / "scripts" / "train.py", folder / "scripts"))
    if edit:
        diff = ROOT / "docs" / "edits" / f"{edit}.diff"
        subprocess.run(["git", "apply", "--unsafe-paths", str(diff)], cwd=folder, check=True)
        assert script.read_text() != (ROOT / "scripts" / "train.py").read_text()
    spec = importlib.util.spec_from_file_location(f"edited_{uuid.uuid4().hex}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def train(module, folder, *overrides):
    """Runs it; returns the folder of the checkpoints."""
    settings = [*BASE, f"run.dir={folder}", "run.name=run", *overrides]
    config = ROOT / "configs" / "debug_cpu.toml"
    return module.train(load_config(module.TrainConfig, config, settings)).parent


def weights(checkpoint, kind="model"):
    return {k: v for path in sorted(checkpoint.glob(f"{kind}*.safetensors")) for k, v in load_file(path).items()}


def moved(before, after):
    return {name: (after[name] - before[name]).abs() for name in before}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model folder that every run starts from."""
    folder = tmp_path_factory.mktemp("start")
    return train(program("", folder), folder, SHAPE, "train.steps=1", "data.context=none") / "step_000001"


@pytest.fixture
def edit(tmp_path, start):
    """A function that trains an edited loop from `start`; gives the checkpoints' folder, and the module beforehand."""

    def run(name, *overrides, prepare=None, folder="a", steps=2):
        module = program(name, tmp_path / folder)
        if prepare:
            prepare(module)
        return train(module, tmp_path / folder, f"model.path={start}", f"train.steps={steps}", *overrides)

    return run


def metrics(checkpoints):
    return [json.loads(line) for line in (checkpoints.parent / "metrics.jsonl").read_text().splitlines()]


def recorded(module, function, seen):
    """Calls of the module's function are noted: batch, the logits of each of its forwards, and what it returns."""
    original = getattr(module, function)

    def watched(model, batch, *rest):
        logits = []

        def forward(**inputs):
            logits.append(model(**inputs))
            return logits[-1]

        seen.append((batch, logits, original(forward, batch, *rest)))
        return seen[-1][2]

    setattr(module, function, watched)


def log_softmax(logits):
    logits = logits.detach().double().numpy()
    top = logits.max(1, keepdims=True)
    norms = np.log(np.exp(logits - top).sum(1, keepdims=True)) + top
    return logits - norms, norms[:, 0]


def test_z_loss(edit):
    seen = []
    edit("z-loss", prepare=lambda module: recorded(module, "loss_with_z", seen), steps=1)
    for batch, (logits,), loss in seen:
        chances, norms = log_softmax(logits)
        labels = batch.labels[batch.labels != -100].numpy()
        expected = -chances[np.arange(len(labels)), labels].sum() + 0.01 * (norms**2).sum()
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_r_drop(edit):
    seen = []
    edit("r-drop", prepare=lambda module: recorded(module, "r_drop", seen), steps=1)
    for batch, logits, loss in seen:
        (one, _), (two, _) = map(log_softmax, logits)
        assert np.abs(one - two).max() > 1e-3  # two masks
        labels = batch.labels[batch.labels != -100].numpy()
        truth = np.arange(len(labels)), labels
        apart = (np.exp(one) * (one - two)).sum() + (np.exp(two) * (two - one)).sum()
        assert loss.item() == pytest.approx(-(one[truth] + two[truth]).sum() / 2 + 0.5 * apart / 2, rel=1e-5)


def test_frozen_layers(edit, start):
    before, after = weights(start), weights(edit("frozen-layers") / "latest")
    still = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert still == {name for name in before if name.startswith("encoder.block.") and "relative" not in name}


def test_frozen_layers_have_no_optimizer_state(edit):
    state = weights(edit("frozen-layers") / "latest", "optimizer")
    assert state and not any(name.startswith("encoder.blocks") for name in state)


def test_layer_wise_rates(edit, start):
    steps = moved(weights(start), weights(edit("layer-wise-rates", steps=1) / "latest"))
    for name, step in steps.items():
        _, stack, _, number, *_ = f".{name}......".split(".")
        depth = {"encoder": 0, "decoder": 2}.get(stack, 0) + int(number or 0) if ".block." in name else 3
        if "relative_attention_bias" in name:  # a table of the stack, in no block of ours
            depth = 3
        # Adam's first step is the rate, but where a gradient is about as small as its epsilon.
        assert step.max().item() == pytest.approx(0.002 * 0.5 ** (3 - depth), rel=1e-3), name


def test_averaged_weights(edit, tmp_path):
    checkpoints = edit("averaged-weights", steps=3)
    stored = [load_file(checkpoints / f"step_{step:06d}" / "model.safetensors") for step in (1, 2, 3)]
    mean = stored[0]
    for later in stored[1:]:
        mean = {name: 0.9 * mean[name] + 0.1 * later[name] for name in mean}
    kept = {n: t for n, t in weights(checkpoints / "latest", "optimizer").items() if n.endswith("/average")}
    assert len(kept) == len(mean)
    for name, tensor in zip(sorted(mean), _by_size(kept, mean), strict=True):
        assert torch.allclose(tensor, mean[name], rtol=1e-6, atol=1e-7), name
    # What is validated is the average: a stock loop that starts from it, and goes nowhere, finds the same loss.
    average = shutil.copytree(checkpoints / "latest", tmp_path / "average")
    from safetensors.torch import save_file

    save_file(mean, average / "model.safetensors", metadata={"format": "pt"})
    stock = edit("", f"model.path={average}", "optim.lr=0", folder="b", steps=1)
    assert metrics(checkpoints)[-1]["validation_loss"] == pytest.approx(metrics(stock)[-1]["validation_loss"], rel=1e-6)


def _by_size(kept, mean):
    """Ours in the order of theirs: the tensors of one model under two sets of names are told apart by their values."""
    for name in sorted(mean):
        same = [t for t in kept.values() if t.shape == mean[name].shape]
        yield min(same, key=lambda tensor: (tensor - mean[name]).abs().max().item())


def test_lion(edit):
    checkpoints = edit("lion")
    one, two = (load_file(checkpoints / f"step_{step:06d}" / "model.safetensors") for step in (1, 2))
    for name, step in moved(one, two).items():
        steps = step[step > 0]
        assert len(steps) and torch.allclose(steps, torch.tensor(0.002), rtol=1e-3), name
    assert {name.rpartition("/")[2] for name in weights(checkpoints / "latest", "optimizer")} == {"momentum"}


def test_early_stopping(edit, capsys):
    settings = "optim.lr=0", "train.validate_every=1"
    checkpoints = edit("early-stopping", *settings, steps=9)  # without a rate nothing gets better after the first
    assert "stopped at step 3: the best was" in capsys.readouterr().err
    state = json.loads((checkpoints / "latest" / "trainer.json").read_text())
    losses = [line["validation_loss"] for line in metrics(checkpoints) if "validation_loss" in line]
    assert state["best"] == [losses[0], 1] and state["step"] == 3 and len(set(losses)) == 1


def test_early_stopping_is_resumed(edit, tmp_path):
    settings = "optim.lr=0", "train.validate_every=1"
    checkpoints = edit("early-stopping", *settings, steps=2)
    module = program("early-stopping", tmp_path / "b")
    train(module, tmp_path / "a", *settings, "train.steps=9", "run.resume=true", f"model.path={_start_of(checkpoints)}")
    assert (checkpoints / "latest").resolve().name == "step_000003"


def _start_of(checkpoints):
    import tomllib

    return tomllib.loads((checkpoints.parent / "run.toml").read_text())["model"]["path"]


def test_gradient_noise(edit, start):
    batches, losses = [], None

    def watch(module):
        original = module.token_loss

        def loss(model, batch, *rest):
            if model.training:
                batches.append(batch)
            return original(model, batch, *rest)

        module.token_loss = loss

    checkpoints = edit("gradient-noise", "batch.accumulation=2", prepare=watch, steps=1)
    model = from_pretrained(start).train()
    sums = []
    for batch in batches:
        labels = batch.labels[batch.labels != -100]
        losses = torch.nn.functional.cross_entropy(model(**batch.inputs), labels, reduction="sum")
        sums.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses, list(model.parameters()))]))
    few, many = batches[0].targets, sum(batch.targets for batch in batches)
    small, big = (sums[0] / few).square().sum().item(), (sum(sums) / many).square().sum().item()
    assert metrics(checkpoints)[0]["noise"] == pytest.approx((small - big) / (1 / few - 1 / many), rel=1e-3)


def test_auxiliary_head(edit, start):
    checkpoints = edit("auxiliary-head")
    one, two = (load_file(checkpoints / f"step_{step:06d}" / "extra.safetensors") for step in (1, 2))
    assert one.keys() == {"aux.weight", "aux.bias"} and not torch.equal(one["aux.weight"], two["aux.weight"])
    assert weights(checkpoints / "latest").keys() == weights(start).keys()
    from_pretrained(checkpoints / "latest")  # a model folder like any other


def test_an_added_parameter_cannot_go_missing(edit, tmp_path):
    """Neither a checkpoint without it nor a loop without it is taken."""
    stock = edit("", folder="stock", steps=1)
    settings = f"model.path={_start_of(stock)}", "run.resume=true", "train.steps=2"
    with pytest.raises(UserError, match=r"run\.resume: aux\.bias is not in \S+step_000001"):
        train(program("auxiliary-head", tmp_path / "c"), tmp_path / "stock", *settings)
    edit("auxiliary-head", folder="aux", steps=1)
    with pytest.raises(UserError, match=r"aux\.\w+ is in the checkpoint, but this model has no such parameter"):
        train(program("", tmp_path / "d"), tmp_path / "aux", *settings)


def test_config_section(edit):
    stock, quiet, noisy = (
        edit(name, *settings, folder=name + "".join(settings), steps=1)
        for name, settings in (("", ()), ("config-section", ()), ("config-section", ("noise.std=0.1",)))
    )
    assert (stock / "latest" / "model.safetensors").read_bytes() == (quiet / "latest/model.safetensors").read_bytes()
    assert (stock / "latest" / "model.safetensors").read_bytes() != (noisy / "latest/model.safetensors").read_bytes()
    assert "[noise]\nstd = 0.1\n" in (noisy.parent / "run.toml").read_text()


@contextmanager
def this(world):
    yield world


def noise_drawn(world, folder, start):
    """What this rank adds to its gradients in a step of the edit, by backend."""
    drawn, draw = {}, torch.randn_like
    for backend in ("ddp", "fsdp"):
        noises = drawn[backend] = []
        module = program("config-section", Path(folder) / f"{backend}-{world.rank}")
        module.world = lambda *_: this(world)
        torch.randn_like = lambda like, noises=noises: noises.append(draw(like)) or noises[-1]
        settings = [f"model.path={start}", f"distributed.backend={backend}", "noise.std=0.01", "train.steps=1"]
        train(module, Path(folder) / backend, *settings)
        drawn[backend] = torch.cat([noise.flatten() for noise in noises])
    return drawn


@pytest.mark.slow
def test_noise_is_alike_on_whole_gradients_and_differs_on_shards(run_distributed, tmp_path, start):
    one, other = run_distributed(noise_drawn, str(tmp_path), str(start))
    assert torch.equal(one["ddp"], other["ddp"])
    number = min(map(len, (one["fsdp"], other["fsdp"])))
    correlation = torch.corrcoef(torch.stack([one["fsdp"][:number], other["fsdp"][:number]]))[0, 1]
    assert number > 1000 and abs(correlation) < 4 / math.sqrt(number)


def trained_everywhere(world, folder, start, backend):
    """Each edit in three steps, and in two and a third after a resume; what was refused, by edit."""
    refused = {}
    for name in EDITS:
        for way, stops in (("straight", (3,)), ("resumed", (2, 3))):
            for steps in stops:
                place = Path(folder) / backend / name / way
                module = program(name, place / f"{steps}-{world.rank}")
                module.world = lambda *_: this(world)
                settings = [f"model.path={start}", f"train.steps={steps}", f"distributed.backend={backend}"]
                settings += ["run.resume=true"] if steps != stops[0] else []
                settings += ["noise.std=0.01"] if name == "config-section" else []
                try:
                    train(module, place, *settings, "batch.accumulation=2", "train.preflight=true")
                except UserError as error:
                    refused[name] = str(error)
    return refused


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_edit_runs_and_resumes_on_every_backend(run_distributed, tmp_path, start, backend):
    refused, _ = run_distributed(trained_everywhere, str(tmp_path), str(start), backend, timeout=900)
    needs_gradients = {"gradient-noise", "config-section"} if backend.startswith("zero") else {"gradient-noise"}
    expected = needs_gradients if backend != "ddp" else set()
    assert refused.keys() == expected, refused
    assert all("gradients" in line and "distributed.backend=ddp" in line for line in refused.values())
    for name in set(EDITS) - expected:
        straight, resumed = (
            tmp_path / backend / name / way / "run/checkpoints/latest" for way in ("straight", "resumed")
        )
        for kind in ("model", "optimizer", "extra"):
            files = sorted(path.name for path in straight.glob(f"{kind}*.safetensors"))
            assert files or kind == "extra"
            for file in files:
                assert (straight / file).read_bytes() == (resumed / file).read_bytes(), (name, file)
        alone = train(
            program(name, tmp_path / "alone" / name), tmp_path / "alone" / name, f"model.path={start}", "train.steps=3"
        )
        if name != "config-section":  # whose noise is another where gradients are in shards
            for key, tensor in weights(alone / "latest").items():
                far = (tensor - weights(straight)[key]).abs().max().item()
                assert far < 2e-4, f"{name}: {key} is {far} away from one rank's"
            assert math.isfinite(far)
