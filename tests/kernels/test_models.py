"""Whole models, with kernels on and with kernels off."""

import pytest
import torch

from babl import kernel_choice, ops
from babl.data.collate import CausalFeature, Feature, collate, collate_causal
from babl.models.bloom import Bloom, BloomConfig
from babl.models.llama import Llama, LlamaConfig
from babl.models.t5 import T5, T5Config
from babl.training.loss import token_loss
from babl.training.recompute import recompute_blocks

T5_SHAPE = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 20, "num_heads": 3, "num_layers": 2}
LLAMA_SHAPE = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "head_dim": 6}
MODELS = {
    "t5": lambda: T5(T5Config(**T5_SHAPE, num_decoder_layers=1)),
    "t5 gated": lambda: T5(
        T5Config(**T5_SHAPE, num_decoder_layers=1, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "llama": lambda: Llama(
        LlamaConfig(**LLAMA_SHAPE, num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.1)
    ),
    "bloom": lambda: Bloom(
        BloomConfig(
            vocab_size=50, hidden_size=24, n_layer=1, n_head=3, hidden_dropout=0.1, attention_dropout=0.1
        )
    ),
}  # fmt: skip
KERNELS = {
    "t5": {"rms_norm", "attention"},
    "llama": {"rms_norm", "rope", "glu"},
    "bloom": {"layer_norm", "alibi"},
}


@pytest.fixture(params=MODELS)
def model(request, device):
    made = MODELS[request.param]()
    made.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.to(device)


def batch(model, device):
    generator = torch.Generator().manual_seed(1)
    lengths = (19, 40, 1)
    rows = [torch.randint(4, 50, (n + 3,), generator=generator).tolist() for n in lengths]
    keys = [11, 22, 33]
    if model.is_encoder_decoder:
        features = [Feature(str(i), row[:-3], row[-3:]) for i, row in enumerate(rows)]
        return collate(features, 0, keys).to(torch.device(device))
    return collate_causal([CausalFeature(str(i), row[:-3], row[-3:]) for i, row in enumerate(rows)], keys).to(
        torch.device(device)
    )


def loss_and_gradients(model, batch, smoothing=0.1):
    model.zero_grad(set_to_none=True)
    loss = token_loss(model, batch, smoothing)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def used(monkeypatch):
    """Returns a list that will hold the operations for which a kernel was chosen."""
    found, chosen = [], ops.kernel_chosen
    monkeypatch.setattr(ops, "kernel_chosen", lambda name, *a: chosen(name, *a) and (found.append(name) or True))
    return found


def assert_same(on, off):
    torch.testing.assert_close(on[0], off[0], atol=1e-5, rtol=1e-5)
    for name, want in off[1].items():
        assert (on[1][name] - want).abs().max() <= 2e-5 * max(1.0, want.abs().max()), name


@pytest.mark.parametrize("training", [False, True], ids=["as it answers", "as it trains"])
def test_loss_and_gradients_are_those_without_kernels(model, training, device, monkeypatch):
    model.train(training)
    given = batch(model, device)
    kernel_choice.use_kernels("off")
    off = loss_and_gradients(model, given)
    kernel_choice.use_kernels("on")
    chosen = used(monkeypatch)
    gated = {"glu"} if getattr(model.config, "feed_forward_proj", "") == "gated-gelu" else set()
    assert_same(loss_and_gradients(model, given), off)
    assert {name.removesuffix(", dropout") for name in chosen} == {
        "linear_cross_entropy",
        *KERNELS[model.config.model_type],
    } | gated
    assert any(name.endswith("dropout") for name in chosen) == (training and not isinstance(model, Llama))


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_without_kernels(model, side, device):
    ids = torch.randint(4, 50, (2, 21), device=device)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 9) if side == "left" else slice(12, None)] = 0
    more = {"decoder_input_ids": ids[:, :4]} if model.is_encoder_decoder else {}
    real = torch.ones(2, 4, dtype=torch.bool, device=device) if more else mask.bool()
    logits = []
    for mode in ("off", "on"):
        kernel_choice.use_kernels(mode)
        with torch.no_grad():
            logits.append(model.eval()(ids, mask, **more)[real])
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_writing_is_what_it_is_without_kernels(model, device):
    ids = torch.randint(4, 50, (2, 9), device=device)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    states = []
    for mode in ("off", "on"):
        kernel_choice.use_kernels(mode)
        with torch.no_grad():
            cache, state = model.eval().prefill(ids, mask, 3)
            states.append((state, model.decode(ids[:, :2], cache)))
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["t5"], indirect=True)
@pytest.mark.parametrize("what", ["all", "selective"])
def test_what_is_computed_anew_in_the_backward_is_the_same(model, what, device):
    model.train()
    given = batch(model, device)
    kernel_choice.use_kernels("on")
    kept = loss_and_gradients(model, given)
    recompute_blocks(model, what)
    assert_same(loss_and_gradients(model, given), kept)


def test_without_a_key_torchs_generator_decides_what_attention_drops(device):
    model = MODELS["t5"]().to(device).train()
    model.init_weights(torch.Generator().manual_seed(0))
    given = batch(model, device)
    del given.inputs["dropout_key"]
    kernel_choice.use_kernels("on")
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(token_loss(model, given).item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("model", ["t5", "llama"], indirect=True)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_compiled_model_is_one_graph(model, device):
    given = batch(model, device)
    model.train()
    kernel_choice.use_kernels("on")
    ids = {name: x for name, x in given.inputs.items() if name != "logits_at"}

    def states(**inputs):
        return model(**inputs).sum()

    want = states(**ids)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(states, backend="aot_eager", fullgraph=True)(**ids), want)
