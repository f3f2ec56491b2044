"""LLaMA and BLOOM against transformers."""

import json
import types

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.bloom import modeling_bloom

from babl.errors import UserError
from babl.models import from_pretrained, save_pretrained
from babl.models.bloom import slopes
from babl.models.weights import FAMILIES, SINGLE

VOCABULARY = 96
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "llama": LLAMA | {"num_key_value_heads": 4},
    "llama grouped": LLAMA | {"num_key_value_heads": 2},
    "llama tied": LLAMA | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "llama scaled": LLAMA | {"rope_parameters": SCALED},
    "llama wide heads": LLAMA | {"head_dim": 10, "num_key_value_heads": 1},
    "bloom 8": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 8, "pad_token_id": 3},
    "bloom 12": {"vocab_size": VOCABULARY, "hidden_size": 36, "n_layer": 2, "n_head": 12, "pad_token_id": 3},
}


def classes(variant):
    return (LlamaConfig, LlamaForCausalLM) if variant.startswith("llama") else (BloomConfig, BloomForCausalLM)


@pytest.fixture(scope="session", params=VARIANTS)
def folder(request, tmp_path_factory):
    """A folder as transformers writes it; every weight and bias is random, so that none can be mistaken."""
    torch.manual_seed(0)
    config, model = classes(request.param)
    written = model(config(**VARIANTS[request.param])).eval()
    with torch.no_grad():
        for parameter in written.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    written.save_pretrained(path)
    return path


def reference(folder, dtype=torch.float32):
    family = json.loads((folder / "config.json").read_text())["model_type"]
    model, info = classes(family)[1].from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def batch(side, length=150):
    ids = torch.randint(4, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if side == "right":
        mask[0, length - 10 :] = mask[1, 7:] = 0
    elif side == "left":
        mask[0, :10] = mask[1, : length - 7] = 0
    return ids * mask, mask


@pytest.fixture
def unrounded(monkeypatch):
    """transformers' BLOOM without its casts to fp32, which cost more digits than fp64 has to spare."""
    softmax, build = torch.nn.functional.softmax, modeling_bloom.build_alibi_tensor

    def build_alibi_tensor(mask, heads, dtype):
        slope = build(torch.ones(1, 2), heads, torch.float32)[:, 0, 1].to(dtype)  # slope * position, at 0 and 1
        position = (mask.cumsum(-1) - 1) * mask
        return (slope[:, None] * position[:, None]).reshape(-1, 1, mask.shape[1])

    functional = types.SimpleNamespace(**vars(torch.nn.functional))
    functional.softmax = lambda x, dim, dtype: softmax(x, dim)
    monkeypatch.setattr(modeling_bloom, "F", functional)
    monkeypatch.setattr(modeling_bloom, "build_alibi_tensor", build_alibi_tensor)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_logits_and_gradients_equal_transformers(folder, dtype, tolerance, side, request):
    if dtype == torch.float64:
        request.getfixturevalue("unrounded")
    theirs, ours = reference(folder, dtype), from_pretrained(folder, dtype)
    ids, mask = batch(side)
    real = mask.bool()
    expected = theirs(input_ids=ids, attention_mask=mask).logits[real]
    logits = ours(input_ids=ids, attention_mask=mask)[real]
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    (expected * weights).sum().backward()
    (logits * weights).sum().backward()
    hf = dict(theirs.named_parameters())
    for name, key in FAMILIES[ours.config.model_type].hf_keys(ours.config).items():
        want, got = hf[key].grad, ours.get_parameter(name).grad
        assert (got - want).abs().max() <= tolerance * want.abs().max(), key
    if side == "right":  # the mask is not needed then, and the fast path without it is the same
        torch.testing.assert_close(ours(ids)[real], logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(ids, mask, logits_at=real), logits)


def test_a_saved_folder_loads_in_transformers_with_the_same_logits(folder, tmp_path):
    ours = from_pretrained(folder)
    ids, _ = batch("none")
    for shard_bytes, files in ((1 << 30, 1), (20_000, 4)):
        target = tmp_path / str(shard_bytes)
        save_pretrained(ours, target, shard_bytes)
        assert (len(list(target.glob("*.safetensors"))) >= files) and (target / SINGLE).exists() == (files == 1)
        torch.testing.assert_close(ours(ids), reference(target)(ids).logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(ours(ids), from_pretrained(target)(ids))


def test_cached_decoding_equals_computing_everything_anew(folder):
    model = from_pretrained(folder)
    ids, mask = batch("right", 160)
    lengths = mask.sum(1)
    full = model(ids, mask)
    prompt = torch.tensor([5, 3, 9])  # ragged prompts, then token by token as far as each row goes
    width = int(prompt.max())
    cache, state = model.prefill(ids[:, :width], torch.arange(width) < prompt[:, None], 155)
    for t in range(140):
        at = prompt + t
        row = torch.arange(3)
        going = at <= lengths
        expected = full[row, at - 1]
        torch.testing.assert_close(model.head(state)[going], expected[going], atol=1e-5, rtol=1e-5)
        state = model.decode(ids[row, at][:, None], cache)[:, -1]


def test_several_tokens_at_once_and_a_step_back_equal_one_by_one(folder):
    model = from_pretrained(folder)
    ids, mask = batch("none", 20)
    full = model(ids, mask)
    cache, _ = model.prefill(ids[:, :8], mask[:, :8], 12)
    model.decode(torch.full((3, 5), 7), cache)  # guesses that turn out wrong
    cache.cut(torch.full((3,), 8), 8)
    states = model.decode(ids[:, 8:], cache)
    torch.testing.assert_close(model.head(states), full[:, 8:], atol=1e-5, rtol=1e-5)


def test_bf16_is_near_and_finite(folder):
    ids, mask = batch("left")
    logits = from_pretrained(folder, torch.bfloat16)(ids, mask)[mask.bool()]
    expected = from_pretrained(folder)(ids, mask)[mask.bool()]
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("heads", [8, 12, 16, 112])
def test_slopes_equal_transformers(heads):
    bias = modeling_bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    assert torch.equal(slopes(heads, torch.device("cpu")), bias[:, 0, 1])


@pytest.mark.parametrize("folder", ["bloom 8"], indirect=True)
def test_fused_weights_lie_head_by_head(folder):
    model = from_pretrained(folder)
    attention, heads = model.blocks[0].attention, model.config.n_head
    width = model.config.hidden_size // heads
    with torch.no_grad():
        attention.qkv.bias.copy_(torch.arange(heads * 3 * width))
    fused = attention.qkv(torch.zeros(1, 1, model.config.hidden_size))
    head_one = fused.unflatten(-1, (heads, 3, -1))[0, 0, 1]
    assert head_one[2, 0] == 3 * width + 2 * width, "the values of head 1 follow its keys"


def edited(folder, tmp_path, **changes):
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        if value is None:
            config.pop(name, None)
        else:
            config[name] = value
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("folder", ["llama scaled"], indirect=True)
def test_the_config_of_transformers_4_is_understood(folder, tmp_path):
    scaling = {key: value for key, value in SCALED.items() if key != "rope_theta"}
    old = edited(folder, tmp_path, rope_parameters=None, rope_theta=1e4, rope_scaling=scaling)
    assert from_pretrained(old).config == from_pretrained(folder).config
    assert from_pretrained(old).config.rope_scaling["factor"] == 8.0


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            r"config\.json: rope_type is .yarn., expected one of .default.,",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling has low_freq_factor None",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_scaling has factor None, expected a number above 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"num_key_value_heads": 3}, r"expected a multiple of num_key_value_heads \(3\)"),
    ],
)
def test_a_variant_that_is_not_computed_is_refused_by_name(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        from_pretrained(edited(folder, tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["bloom 8"], indirect=True)
def test_a_folder_of_the_bare_bloom_with_old_names_is_understood(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    old = edited(folder, tmp_path, hidden_size=None, n_embed=32, n_head=None, num_attention_heads=8)
    weights = load_file(folder / "model.safetensors")
    (old / "model.safetensors").unlink()
    save_file({key.removeprefix("transformer."): value for key, value in weights.items()}, old / "model.safetensors")
    ids, _ = batch("none")
    assert torch.equal(from_pretrained(old)(ids), from_pretrained(folder)(ids))


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "bloom-560m"])
def test_released_configurations_are_understood(shared, name):
    hf = json.loads((shared / "tokenizers" / "configs" / f"{name}.json").read_text())
    family = FAMILIES[hf["model_type"]]
    config = family.config.from_hf(hf, tied=True)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in family.model(config).parameters())
    assert parameters == {"llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248, "bloom-560m": 559_214_592}[name]
