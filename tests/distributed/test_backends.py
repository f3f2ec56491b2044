"""Every backend computes what one process without any computes: gradients, clipping, weights, optimizer state."""

from functools import partial

import pytest
import torch

from babl.data.collate import IGNORE, CausalFeature, Feature, collate, collate_causal
from babl.data.loader import dropout_keys
from babl.distributed.backend import DistributedConfig, make_backend
from babl.distributed.env import World
from babl.models.bloom import Bloom, BloomConfig
from babl.models.llama import Llama, LlamaConfig
from babl.models.t5 import T5, T5Config
from babl.training.loss import token_loss
from babl.training.optimizer import OptimConfig, make_optimizer

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
    rows, keys = [examples[i] for i in indices], dropout_keys(0, step, indices)
    batch = collate(rows, 0, 0, keys) if model.is_encoder_decoder else collate_causal(rows, 0, keys)
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


def trained(world, family, backend, accumulation, precision="fp32", offload="none"):
    """First gradient, norms, and each rank's share of weights and optimizer state after three steps."""
    model = tiny(family)
    backend = make_backend(DistributedConfig(backend, offload), world, precision == "bf16")
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
    return gradients, norms, backend.save()


def matrix(world, backend):
    """What `trained` gives for each family and accumulation."""
    families = ("t5", "llama", "bloom")
    return {(f, a): trained(world, f, backend, a) for f in families for a in (1, 4)}


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


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_trains_as_one_process_without_any(plain, run_distributed, backend, ranks):
    results = run_distributed(matrix, backend, world=ranks)
    for (family, accumulation), (gradients, norms, _) in results[0].items():
        wanted_gradients, wanted_norms, wanted_weights, wanted_state = plain[family]
        weights, state = joined([result[family, accumulation][2] for result in results])
        try:
            assert_near(gradients, wanted_gradients)
            assert norms == pytest.approx(wanted_norms, rel=1e-6)
            assert_near(without_key_biases(weights), without_key_biases(wanted_weights))
            assert_near(without_key_biases(state), without_key_biases(wanted_state))
        except AssertionError as error:
            raise AssertionError(f"{family}, accumulation {accumulation}: {error}") from None
    assert min(plain["t5"][1]) > MAX_NORM
