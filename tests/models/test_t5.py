import json

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from babl.errors import UserError
from babl.models import from_pretrained, save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.models.t5 import relative_bucket
from babl.models.weights import FAMILIES
from babl.text import train_tokenizer

SHAPES = {
    "v1.0": {"feed_forward_proj": "relu"},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "uneven": {"num_heads": 3, "d_kv": 5, "num_layers": 3, "num_decoder_layers": 1},
}


def write_reference(folder, variant, **save):
    """A folder as transformers writes it, v1.1 with a head of its own."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    config = T5Config(**(sizes | SHAPES[variant]), decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    if variant == "v1.1":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 24))
        model.config.tie_word_embeddings = False
    model.save_pretrained(folder, **save)
    return folder


def reference(folder, dtype):
    model, info = T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def batch(side):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (3, 150), generator=generator)  # beyond the longest distance that has a bucket
    mask = torch.ones_like(ids)
    if side == "right":
        mask[0, 140:] = mask[1, 7:] = 0
    elif side == "left":
        mask[0, :10] = mask[1, :143] = 0
    decoder = torch.randint(3, 96, (3, 9), generator=generator)
    decoder[:, 0] = 0
    return ids * mask, mask, decoder


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("variant", SHAPES)
def test_logits_and_gradients_equal_transformers(tmp_path, variant, dtype, tolerance, side):
    write_reference(tmp_path, variant)
    theirs, ours = reference(tmp_path, dtype), from_pretrained(tmp_path, dtype)
    ids, mask, decoder = batch(side)
    expected = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits
    logits = ours(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder)
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    (expected * weights).sum().backward()
    (logits * weights).sum().backward()
    hf = dict(theirs.named_parameters())
    for name, key in FAMILIES["t5"].hf_keys(ours.config).items():
        want, got = hf[key].grad, ours.get_parameter(name).grad
        assert (got - want).abs().max() <= tolerance * want.abs().max(), key


@pytest.mark.parametrize("variant", SHAPES)
def test_a_saved_folder_loads_in_transformers_with_the_same_logits(tmp_path, variant):
    write_reference(tmp_path / "a", variant)
    ours = from_pretrained(tmp_path / "a")
    save_pretrained(ours, tmp_path / "b")
    ids, mask, decoder = batch("right")
    theirs = reference(tmp_path / "b", torch.float32)
    expected = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits
    torch.testing.assert_close(ours(ids, mask, decoder_input_ids=decoder), expected, atol=1e-5, rtol=0)


def test_sharded_weights_are_the_same_weights(tmp_path):
    write_reference(tmp_path / "one", "v1.0")
    write_reference(tmp_path / "many", "v1.0", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = from_pretrained(tmp_path / "one"), from_pretrained(tmp_path / "many")
    for (name, a), b in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_config_of_transformers_4_is_understood(tmp_path):
    write_reference(tmp_path, "v1.1")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    model = from_pretrained(tmp_path)
    assert model.config.scale_decoder_outputs is False
    assert model.lm_head.weight is not model.shared.weight


@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_decoding_equals_transformers(tmp_path, variant, side):
    write_reference(tmp_path, variant)
    theirs, ours = reference(tmp_path, torch.float32), from_pretrained(tmp_path)
    ids, mask, _ = batch(side)
    expected = theirs.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, num_beams=1
    )[:, 1:]
    cache, state = ours.prefill(ids, mask, 12)
    tokens = []
    for _ in range(12):
        logits = ours.head(state)
        logits[:, ours.config.eos_token_id] = -torch.inf
        tokens.append(logits.argmax(-1))
        state = ours.decode(tokens[-1][:, None], cache)[:, -1]
    assert torch.equal(torch.stack(tokens, 1), expected)


def test_cached_decoding_equals_computing_everything_anew(tmp_path):
    model = from_pretrained(write_reference(tmp_path, "v1.0"))
    ids, mask, _ = batch("right")
    decoder = torch.randint(3, 96, (3, 140), generator=torch.Generator().manual_seed(3))
    decoder[:, 0] = 0
    full = model(ids, mask, decoder_input_ids=decoder)
    cache, state = model.prefill(ids, mask, 140)
    for t in range(140):
        torch.testing.assert_close(model.head(state), full[:, t], atol=1e-5, rtol=0)
        if t < 139:
            state = model.decode(decoder[:, t + 1 : t + 2], cache)[:, -1]


def test_relative_buckets_equal_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    delta = torch.arange(-600, 601)
    for bidirectional in (True, False):
        expected = T5Attention._relative_position_bucket(delta, bidirectional, 32, 128)
        assert torch.equal(relative_bucket(delta, bidirectional, 32, 128), expected)


@pytest.mark.parametrize("size", ["t5-small", "t5-base"])
def test_full_sizes_equal_transformers(tmp_path, shared, size):
    config = T5Config.from_json_file(shared / "tokenizers" / "t5" / f"config.{size}.json")
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    ids, decoder = torch.randint(3, 32000, (2, 40)), torch.randint(3, 32000, (2, 5))
    expected = reference(tmp_path, torch.float32)(input_ids=ids, decoder_input_ids=decoder).logits
    logits = from_pretrained(tmp_path)(input_ids=ids, decoder_input_ids=decoder)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_bf16_activations_survive_where_fp16_would_overflow(tmp_path):
    model = from_pretrained(write_reference(tmp_path, "v1.0"), torch.bfloat16)
    with torch.no_grad():
        model.encoder.blocks[0].mlp.wo.weight.mul_(7e4)
    ids, mask, decoder = batch("none")
    assert model(ids, mask, decoder_input_ids=decoder).isfinite().all()


def tiny(tmp_path, dropout=0.5):
    train_tokenizer(["question: what context: a small world of words"], 280, tmp_path / "tokenizer")
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 1}
    return build_model(ModelConfig(shape=shape | {"dropout_rate": dropout}), tmp_path / "tokenizer", seed=0)


def test_a_rate_that_drops_everything_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a dropout rate is 1\.5, expected at least 0 and below 1"):
        tiny(tmp_path, dropout=1.5)


def test_dropout_belongs_to_the_example_not_to_the_batch_or_its_padding(tmp_path):
    model, _ = tiny(tmp_path)
    model.train()
    ids, decoder = torch.randint(3, 200, (4, 9)), torch.randint(3, 200, (4, 5))
    keys = torch.tensor([11, 22, 33, 44])
    together = model(ids, decoder_input_ids=decoder, dropout_key=keys)
    wider, mask = torch.zeros(1, 20, dtype=torch.int64), torch.zeros(1, 20, dtype=torch.int64)
    wider[0, :9], mask[0, :9] = ids[2], 1
    alone = model(wider, mask, decoder_input_ids=decoder[2:3], dropout_key=keys[2:3])
    torch.testing.assert_close(alone[0], together[2], atol=1e-5, rtol=1e-5)
    other = model(wider, mask, decoder_input_ids=decoder[2:3], dropout_key=keys[1:2])
    assert not torch.allclose(other, alone, atol=1e-2)
