import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

from babl.data.collate import IGNORE, Feature, collate
from babl.data.loader import dropout_keys
from babl.errors import UserError
from babl.models import from_pretrained
from babl.models.t5 import T5, T5Config
from babl.scripts.train import TrainConfig, main, train
from babl.training.checkpoint import find_fault, newest_whole
from babl.training.loss import token_loss
from babl.training.metrics import CLOCK_FIELDS

ROOT = Path(__file__).parent.parent.parent
TINY = "model.shape={d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1, dropout_rate=0.2}"
SMALL = [TINY, "model.tokenizer_size=400", "batch.tokens=1500", "train.validate_every=4", "train.save_every=4"]


def command(folder, *overrides):
    config = str(ROOT / "configs" / "debug_cpu.toml")
    return [sys.executable, str(ROOT / "scripts/train.py"), config, f"run.dir={folder}", *SMALL, *overrides]


def run(folder, *overrides, check=True):
    return subprocess.run(command(folder, *overrides), capture_output=True, text=True, check=check)


def metrics(folder):
    lines = (folder / "debug_cpu" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK_FIELDS} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, "train.steps=12")
    return folder


def test_a_run_leaves_what_it_promises(undisturbed):
    folder = undisturbed / "debug_cpu"
    steps = [line for line in metrics(undisturbed) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    promised = {"step", "loss", "lr", "grad_norm", "target_tokens", "examples", "padding_fraction"}
    assert promised <= steps[0].keys()
    latest = folder / "checkpoints" / "latest"
    assert latest.is_symlink() and latest.resolve().name == "step_000012"
    assert sorted(path.name for path in (folder / "checkpoints").glob("step_*")) == ["step_000008", "step_000012"]
    assert find_fault(latest) is None
    _, info = T5ForConditionalGeneration.from_pretrained(latest, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (folder / "run.toml").exists() and (latest / "tokenizer.json").exists()


def test_killed_and_resumed_it_ends_as_if_undisturbed(undisturbed, tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "train.steps=12"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = tmp_path / "debug_cpu" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and '"step": 6' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    refused = run(tmp_path, "train.steps=12", check=False)
    assert refused.returncode == 2
    assert "a run is there already (run.toml, metrics.jsonl, checkpoints); go on with run.resume=true" in refused.stderr
    assert "resumed from" in run(tmp_path, "train.steps=12", "run.resume=true").stderr
    ends = [folder / "debug_cpu" / "checkpoints" / "latest" for folder in (undisturbed, tmp_path)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert ends[0].joinpath(name).read_bytes() == ends[1].joinpath(name).read_bytes(), name
    assert metrics(tmp_path) == metrics(undisturbed)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "debug_cpu", tmp_path / "debug_cpu", symlinks=True)
    weights = tmp_path / "debug_cpu" / "checkpoints" / "step_000012" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = run(tmp_path, "train.steps=12", "run.resume=true")
    assert "step_000012: passed over, model.safetensors is not what was written" in result.stderr
    assert "resumed from" in result.stderr and "step_000008" in result.stderr
    assert metrics(tmp_path) == metrics(undisturbed)


def test_two_processes_train_as_one(undisturbed, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29655"]
    arguments = command(tmp_path, "train.steps=3", "batch.accumulation=2")[1:]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *arguments], check=True, capture_output=True, env=environment)
    alone = [line["loss"] for line in metrics(undisturbed) if "loss" in line][:3]
    assert [line["loss"] for line in metrics(tmp_path) if "loss" in line] == pytest.approx(alone, rel=1e-5)


def features():
    """Eight examples of unequal lengths; collated with keys, so that dropout is the example's own."""
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: [*torch.randint(3, 40, (n,), generator=generator).tolist(), 1]  # noqa: E731
    return [Feature(f"e{i}", ids(5 + i), ids(1 + i % 4)) for i in range(8)]


def gradient(groups, mute=()):
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4}
    model = T5(T5Config(vocab_size=40, dropout_rate=0.3, **shape)).double()
    model.init_weights(torch.Generator().manual_seed(1))
    model.train()
    examples, batches = features(), []
    for group in groups:
        batch = collate([examples[i] for i in group], 0, dropout_keys(0, 7, group))
        for row, i in enumerate(group):
            if i in mute:
                batch.labels[row] = IGNORE
        batch.inputs["logits_at"] = batch.labels != IGNORE
        batches.append(batch)
    targets = sum(batch.targets for batch in batches)
    for batch in batches:
        (token_loss(model, batch) / targets).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("mute", [(), (2,), (0, 1, 2, 3)], ids=["all", "one-without-targets", "half-without-targets"])
def test_the_gradient_does_not_depend_on_how_a_batch_is_split(mute):
    whole = gradient([range(8)], mute)
    for groups in ([[i] for i in range(8)], [range(0, 4), range(4, 8)]):
        torch.testing.assert_close(gradient(groups, mute), whole, atol=1e-6 * whole.abs().max().item(), rtol=0)


def tiny_config(tmp_path, **train_keys):
    config = TrainConfig()
    config.run.dir, config.model.tokenizer_size, config.batch.tokens = str(tmp_path), 400, 1500
    config.model.shape = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_heads": 2,
        "num_layers": 1,
        "num_decoder_layers": 1,
    }
    for name, value in train_keys.items():
        setattr(config.train, name, value)
    return config


SHAPES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("family", SHAPES)
def test_decoders_learn_through_the_same_loop_and_resume_exactly(family, tmp_path):
    config = tiny_config(tmp_path, steps=30, validate_every=10, save_every=10)
    config.model.family, config.model.shape, config.optim.lr = family, SHAPES[family], 3e-3
    whole = train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert validation == sorted(validation, reverse=True) and validation[-1] < validation[0] - 0.1
    kept = {path.name: path.read_bytes() for path in whole.resolve().iterdir() if path.suffix == ".safetensors"}
    shutil.rmtree(whole.resolve())
    config.run.resume = True
    assert {name: (train(config) / name).read_bytes() for name in kept} == kept
    _, info = AutoModelForCausalLM.from_pretrained(whole, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_trained_checkpoint_is_fine_tuned_on_real_questions(shared, tmp_path):
    """Windows that fit its context of 512, a loss that falls, a resume, and a folder for transformers."""

    def tune(name, *overrides):
        arguments = [
            sys.executable, str(ROOT / "scripts/train.py"), str(ROOT / "configs/llama_squad.toml"),
            f"run.dir={tmp_path}", f"run.name={name}", f"model.path={shared}/checkpoints/stories260K",
            f"data.train={shared}/data/squad/train-v1.1-slice.json", "data.validation=", "data.context=none",
            "distributed.backend=ddp", "train.activation_checkpointing=none", "train.async_save=false",
            "batch.tokens=2048", "train.precision=fp32", "optim.lr=1e-3", "optim.warmup_steps=5", *overrides,
        ]  # fmt: skip
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line["validation_loss"] for line in lines if "validation_loss" in line], done.stderr

    (before,), _ = tune("before", "train.steps=1", "optim.lr=0.0")
    first, _ = tune("tuned", "train.steps=20", "optim.schedule=constant")
    both, said = tune("tuned", "train.steps=40", "optim.schedule=constant", "run.resume=true")
    assert before - 1 > first[-1] > both[-1]
    assert "resumed from" in said and "step_000020" in said
    checkpoint = tmp_path / "tuned" / "checkpoints" / "latest"
    theirs, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[1, 300, 301]])
    torch.testing.assert_close(from_pretrained(checkpoint)(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_bf16_adafactor_and_tensorboard_run(tmp_path):
    config = tiny_config(tmp_path, steps=2, precision="bf16", activation_checkpointing="selective", tensorboard=True)
    config.optim.name = "adafactor"
    folder = train(config)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    config.run.resume, config.optim.name = True, "adamw"
    with pytest.raises(UserError, match=r'optim\.name is "adamw", but was "adafactor" when .*step_000002 was saved'):
        train(config)


def test_a_loss_that_is_no_number_names_step_module_and_examples(tmp_path):
    config = tiny_config(tmp_path, steps=50)
    config.optim.lr, config.optim.max_grad_norm = 1e30, 0.0
    with pytest.raises(
        FloatingPointError, match=r"step \d+, rank 0: (parameter \S+|the output of \S+|a gradient) is not finite"
    ):
        train(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'lr'?"),
        ("data.train=absent.json", "absent.json: no such data file"),
        ("model.path=absent", "absent: no such model folder"),
        ("model.shape={d_modl=4}", "unknown key 'model.shape.d_modl'; did you mean 'd_model'?"),
        ("model.shape={d_model=1.5}", "model.shape.d_model is 1.5, expected int"),
        ("run.dir=/dev/null/x", "run.dir: /dev/null/x/debug_cpu cannot be written"),
        ("batch.tokens=10", "batch.tokens is 10, but the longest example has"),
        ("train.precision=fp16", "overflows in T5's feed-forward layers"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(tmp_path, capsys, override, message):
    assert main([str(ROOT / "configs/debug_cpu.toml"), f"run.dir={tmp_path}", override]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert len(errors) == 1 and message in errors[0]


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, steps=2, save_every=1)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("babl.training.checkpoint.sync", lambda path: full(path) if "000002" in str(path) else None)
    with pytest.raises(UserError, match=r"step_000002: cannot be written \(No space left on device\)"):
        train(config)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert newest_whole(checkpoints) == (checkpoints / "step_000001", [])
    assert not list(checkpoints.glob(".*tmp"))
