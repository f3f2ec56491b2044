"""Every backend computes what one process without any computes: gradients, clipping, weights, optimizer state."""

import json
import math
import sys
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from babl.data.collate import IGNORE, CausalFeature, Feature, collate, collate_causal
from babl.data.loader import dropout_keys
from babl.distributed.backend import DistributedConfig, make_backend
from babl.distributed.env import World
from babl.errors import UserError
from babl.models.bloom import Bloom, BloomConfig
from babl.models.llama import Llama, LlamaConfig
from babl.models.t5 import T5, T5Config
from babl.training.loss import token_loss
from babl.training.optimizer import OptimConfig, make_optimizer
from babl.training.recompute import recompute_blocks

BACKENDS = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
ALONE = World(0, 1, torch.device("cpu"))
STEPS = [range(8), range(8), range(5)]  # the examples of each; the last one leaves some of eight micro-batches empty
MUTE = (2, 6)  # examples without a target: all of a micro-batch of four, or of eight
MAX_NORM = 0.5  # below the first steps' norms, so that clipping counts


def tiny(family):
    """A model with dropout and a tied head, and odd sizes, which no number of ranks divides."""
    if family == "t5":
        shape = {"d_model": 15, "d_kv": 5, "d_ff": 31, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 3}
        model = T5(T5Config(vocab_size=41, dropout_rate=0.3, **shape))
    elif family == "llama":
        shape = {"hidden_size": 18, "intermediate_size": 23, "num_hidden_layers": 2, "num_attention_heads": 3}
        more = {"num_key_value_heads": 1, "attention_dropout": 0.2, "tie_word_embeddings": True}
        model = Llama(LlamaConfig(vocab_size=41, max_position_embeddings=64, **shape, **more))
    else:
        dropouts = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
        model = Bloom(BloomConfig(vocab_size=41, hidden_size=15, n_layer=2, n_head=3, **dropouts))
    model.init_weights(torch.Generator().manual_seed(1))
    return model.train()


def micro_batch(model, indices, step):
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: [*torch.randint(3, 40, (n,), generator=generator).tolist(), 1]  # noqa: E731
    feature = Feature if model.is_encoder_decoder else CausalFeature
    examples = [feature(f"e{i}", ids(5 + i), ids(1 + i % 4)) for i in range(8)]
    # Of this seed no gradient is so near 0 that Adam makes whole steps of its rounding; of two in eight, one is.
    rows, keys = [examples[i] for i in indices], dropout_keys(4, step, indices)
    batch = collate(rows, 0, keys) if model.is_encoder_decoder else collate_causal(rows, keys)
    for row, index in enumerate(indices):
        if index in MUTE:
            batch.labels[row] = IGNORE
    batch.inputs["logits_at"] = batch.labels != IGNORE
    return batch


def gradient(parameter):
    """The whole gradient of a parameter, wherever the backend keeps it."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).clone()
    grad = parameter.grad
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()


def trained(world, family, backend, accumulation, bf16=False, recompute="none", offload="none", settings=""):
    """First gradient, norms, and each rank's share of weights and optimizer state after three steps."""
    model = tiny(family)
    recompute_blocks(model, recompute)
    backend = make_backend(DistributedConfig(backend, offload, settings), world, bf16)
    backend.setup(model, partial(make_optimizer, cfg=OptimConfig(weight_decay=0.1)))
    gradients, norms = {}, []
    for step, examples in enumerate(STEPS):
        slots = world.size * accumulation
        parts = [list(examples)[world.rank * accumulation + slot :: slots] for slot in range(accumulation)]
        batches = [micro_batch(model, part, step) for part in parts]
        (targets,) = world.sum(sum(batch.targets for batch in batches))
        for batch in batches:
            with backend.microbatch(last=batch is batches[-1]):
                backend.backward(token_loss(backend.model, batch) / targets)
        if step == 0:
            gradients = {name: gradient(parameter) for name, parameter in model.named_parameters()}
        norms.append(backend.step(1e-3, MAX_NORM))
    with torch.no_grad():  # a validation, as it comes before a save
        token_loss(backend.model, batches[0])
    return gradients, norms, backend.save()


def broken(world, backend):
    """The norm of a gradient that one rank has made infinite, and this rank's share of the weights after the step."""
    model = tiny("t5")
    backend = make_backend(DistributedConfig(backend), world, False)
    backend.setup(model, partial(make_optimizer, cfg=OptimConfig()))
    with backend.microbatch(last=True):
        loss = token_loss(backend.model, micro_batch(model, [0, 1], 0))
        backend.backward(loss * (math.inf if world.rank == world.size - 1 else 1.0))
    return backend.step(1.0, MAX_NORM), backend.save()


def loaded(world, backend):
    """The loss of a trained model's weights, and after loading others into it; then the share of a save."""
    model, other = tiny("t5").eval(), {name: torch.full_like(p, 0.01) for name, p in tiny("t5").named_parameters()}
    backend = make_backend(DistributedConfig(backend), world, False)
    backend.setup(model, partial(make_optimizer, cfg=OptimConfig()))
    batch = micro_batch(model, range(8), 0)
    with torch.no_grad():
        before = token_loss(backend.model, batch).item()
        backend.load(other, {})
        after = token_loss(backend.model, batch).item()
    return before, after, backend.save()


def half_used(world, backend):
    """This rank's share of two layers after three steps with decay, of which the loss depends on the first alone."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)])
            for parameter in self.parameters():
                nn.init.ones_(parameter)

        def forward(self, x):
            return self.layers[0](x).square().sum()

    backend = make_backend(DistributedConfig(backend), world, False)
    backend.setup(First(), lambda model: torch.optim.AdamW(model.parameters(), weight_decay=0.5))
    for _ in range(3):
        for last in (False, True):
            with backend.microbatch(last):
                backend.backward(backend.model(torch.ones(2, 3)))
        backend.step(0.1, MAX_NORM)
    return backend.save()


def everything(world, backend, settings):
    """What `trained` gives for each family and accumulation, and one run each of what else a backend can do."""
    families = ("t5", "llama", "bloom")
    results = {(f, a): trained(world, f, backend, a) for f in families for a in (1, 4)}
    results["half used"] = half_used(world, backend)
    if world.size == 2:
        results |= {f"bf16 {family}": trained(world, family, backend, 2, bf16=True) for family in families}
        results["recomputed"] = trained(world, "t5", backend, 2, recompute="all")
        if backend == "zero3":
            results |= {f"released {f}": trained(world, f, backend, 2, settings=settings) for f in families}
        results["broken"] = broken(world, backend)
        results["loaded"] = loaded(world, backend)
        for offload in {"zero2": ["optimizer"], "zero3": ["optimizer", "all"], "fsdp": ["all"]}.get(backend, []):
            results[f"offload {offload}"] = trained(world, "t5", backend, 2, offload=offload)
    return results


@pytest.fixture(scope="module")
def plain():
    """Three steps by hand: no backend, no accumulation, torch's own clipping and AdamW."""
    runs = {}
    for family in ("t5", "llama", "bloom"):
        model = tiny(family)
        optimizer = make_optimizer(model, OptimConfig(weight_decay=0.1))
        gradients, norms = {}, []
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        for step, examples in enumerate(STEPS):
            batch = micro_batch(model, list(examples), step)
            (token_loss(model, batch) / batch.targets).backward()
            if step == 0:
                gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
            optimizer.step()
            optimizer.zero_grad()
        state = {f"{n}/{key}": v for n, p in model.named_parameters() for key, v in optimizer.state[p].items()}
        runs[family] = gradients, norms, {n: p.detach() for n, p in model.named_parameters()}, state
    return runs


@pytest.fixture(scope="module")
def ran(run_distributed, tmp_path_factory):
    """The results of `everything`, by rank; each backend starts once in each world."""
    released = tmp_path_factory.mktemp("settings") / "released.json"  # small parameters are not kept whole either
    released.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    return cache(lambda backend, ranks: run_distributed(everything, backend, str(released), world=ranks))


def assert_near(found, expected):
    """Within 1e-6 of the largest number of all, and within 2e-5 of the largest of the same parameter."""
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        error, own = (found[name] - value).abs().max().item(), value.abs().max().item()
        bound = min(1e-6 * largest, 2e-5 * own)
        assert error <= bound, (
            f"{name} is off by {error:.1e}; its largest is {own:.1e}, the largest of all {largest:.1e}"
        )


def without_key_biases(tensors):
    """BLOOM's key biases change no softmax: their gradient is rounding alone, of which Adam makes whole steps."""
    return {n: t.unflatten(0, (3, 3, -1))[:, [0, 2]] if "qkv.bias" in n and t.ndim else t for n, t in tensors.items()}


def joined(shares):
    """All ranks' shares as one; no tensor is in two."""
    both = [{}, {}]
    for share in shares:
        for whole, part in zip(both, share, strict=True):
            assert not whole.keys() & part.keys()
            whole |= part
    return both


def assert_as_plain(results, key, expected):
    gradients, norms, _ = results[0][key]
    wanted_gradients, wanted_norms, *wanted = expected
    assert_near(gradients, wanted_gradients)
    assert norms == pytest.approx(wanted_norms, rel=1e-6)
    for found, tensors in zip(joined([result[key][2] for result in results]), wanted, strict=True):
        assert_near(without_key_biases(found), without_key_biases(tensors))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("family", ["t5", "llama", "bloom"])
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_trains_as_one_process_without_any(plain, ran, backend, ranks, family, accumulation):
    assert_as_plain(ran(backend, ranks), (family, accumulation), plain[family])


def test_the_plain_run_clips(plain):
    assert min(plain["t5"][1]) > MAX_NORM


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputing_and_offloading_change_nothing(plain, ran, backend):
    results = ran(backend, 2)
    keys = [key for key in results[0] if key == "recomputed" or "offload" in key]
    for key in keys:
        assert_as_plain(results, key, plain["t5"])


@pytest.mark.parametrize("family", ["t5", "llama", "bloom"])
def test_weights_that_zero3_gathers_and_releases_are_the_same(plain, ran, family):
    assert_as_plain(ran("zero3", 2), f"released {family}", plain[family])


@cache
def bf16_weights_explain(family):
    """How far gradients in fp32 move, as a share of their norm, where every weight is off by up to bf16's rounding.

    A backward in bf16 rounds more than the weights, but each of its roundings is as small and as random: about this is
    what it may be off by. It depends on the model: in this T5, whose attention has no scale, it is five times BLOOM's.
    """

    def gradients(draw):
        model = tiny(family)
        with torch.no_grad():
            for parameter in model.parameters():
                off = 2 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(draw)) - 1
                parameter.mul_(1 + off * torch.finfo(torch.bfloat16).eps / 2 * (draw > 0))
        batch = micro_batch(model, list(STEPS[0]), 0)
        (token_loss(model, batch) / batch.targets).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact = gradients(0)
    return sum((gradients(draw) - exact).norm() / exact.norm() for draw in range(1, 9)) / 8


@pytest.mark.parametrize("family", ["t5", "llama", "bloom"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bf16_weights_and_optimizer_stay_exact(plain, ran, backend, family):
    results = ran(backend, 2)
    gradients, norms, _ = results[0][f"bf16 {family}"]
    wanted_gradients, wanted_norms, *_ = plain[family]
    found, wanted = (torch.cat([g.flatten() for g in of.values()]) for of in (gradients, wanted_gradients))
    error = (found - wanted).norm() / wanted.norm()
    assert error < 2 * bf16_weights_explain(family)
    assert error > torch.finfo(torch.bfloat16).eps / 8, "matrices are not multiplied in bf16"
    assert norms == pytest.approx(wanted_norms, rel=0.05)
    assert (found != found.bfloat16()).float().mean() > 0.3  # four micro-batches' bf16, added up in fp32
    weights, state = joined([result[f"bf16 {family}"][2] for result in results])
    assert {tensor.dtype for tensor in (*weights.values(), *state.values())} == {torch.float32}
    for name, start in tiny(family).named_parameters():
        # Three steps of 1e-3 from the exact start, not from its nearest bf16, which is up to 4e-3 away.
        assert (weights[name] - start).abs().max() < 3.5e-3, name
        assert not torch.equal(weights[name], weights[name].bfloat16().float()), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_no_number_updates_nothing(ran, backend):
    results = [result["broken"] for result in ran(backend, 2)]
    assert not any(math.isfinite(norm) for norm, _ in results)
    weights, _ = joined([share for _, share in results])
    for name, start in tiny("t5").named_parameters():
        assert torch.equal(weights[name], start), name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_no_loss_depends_on_decays_on_every_backend(ran, backend, ranks):
    weights, state = joined([result["half used"] for result in ran(backend, ranks)])
    for name in ("layers.1.weight", "layers.1.bias"):
        assert torch.allclose(weights[name], torch.tensor((1 - 0.1 * 0.5) ** 3), rtol=1e-6), name
        assert state[f"{name}/exp_avg"].abs().max() == 0 and state[f"{name}/step"] == 3
    assert (weights["layers.0.weight"] < 0.8).all()  # by about 0.1 a step besides


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_loading_the_next_forward_uses_what_was_loaded(ran, backend):
    before, after, _ = ran(backend, 2)[0]["loaded"]
    weights, _ = joined([result["loaded"][2] for result in ran(backend, 2)])
    assert all((tensor == 0.01).all() for tensor in weights.values())
    model = tiny("t5").eval()
    batch = micro_batch(model, range(8), 0)
    assert before == pytest.approx(token_loss(model, batch).item(), rel=1e-5)
    model.load_state_dict(weights, strict=False)  # not strict: the tied head is no tensor of its own
    assert after == pytest.approx(token_loss(model, batch).item(), rel=1e-5) and abs(after - before) > 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistributedConfig("ddp", "all"), 'distributed.offload is "all", but ddp has "none"'),
        (DistributedConfig("fsdp", "optimizer"), 'distributed.offload is "optimizer", but fsdp has "none", "all"'),
        (DistributedConfig("zero1", "all"), 'distributed.offload is "all", but zero1 has "none", "optimizer"'),
        (DistributedConfig("fsdp", deepspeed="x.json"), 'is "x.json", but backend "fsdp" is not DeepSpeed\'s'),
        (DistributedConfig("zero1", deepspeed="no.json"), "distributed.deepspeed: no.json: no such file"),
    ],
)
def test_what_a_backend_cannot_do_is_named(config, message):
    with pytest.raises(UserError) as error:
        make_backend(config, ALONE, False)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage is 1, but the run's configuration makes it 2"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but the run's configuration makes it false"),
        ({"optimizer": {"type": "Adam"}}, 'optimizer is {"type": "Adam"}, but [optim] of the run decides that'),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but optim.max_grad_norm of the run decides that"),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            "round_robin_gradients is true, which lays out",
        ),
        ({"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size is 2, which lays out the"),
        ([], "expected an object, found list"),
    ],
)
def test_settings_for_deepspeed_that_contradict_the_run_are_refused(tmp_path, theirs, message):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(theirs))
    with pytest.raises(UserError) as error:
        make_backend(DistributedConfig("zero2", deepspeed=str(file)), ALONE, False)
    assert str(file) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_settings_for_deepspeed_are_merged(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "wall_clock_breakdown": true}')
    backend = make_backend(DistributedConfig("zero2", deepspeed=str(file)), ALONE, False)
    assert backend.settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert backend.settings["wall_clock_breakdown"] and backend.settings["gradient_accumulation_steps"] == 1


def test_settings_that_deepspeed_does_not_know_are_refused_in_its_words(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": "large"}}')
    backend = make_backend(DistributedConfig("zero2", deepspeed=str(file)), ALONE, False)
    try:
        with pytest.raises(UserError, match=r"ds\.json: DeepSpeed refuses it .*reduce_bucket_size") as error:
            backend.setup(tiny("t5"), partial(make_optimizer, cfg=OptimConfig()))
        assert "\n" not in str(error.value)
    finally:
        dist.destroy_process_group()


def test_without_deepspeed_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    backend = make_backend(DistributedConfig("zero2"), ALONE, False)
    with pytest.raises(
        UserError, match=r'backend is "zero2", but deepspeed is not installed: pip install "babl\[deepspeed\]"'
    ):
        backend.setup(tiny("t5"), partial(make_optimizer, cfg=OptimConfig()))
