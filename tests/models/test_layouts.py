"""Folders in odd layouts and dialects: they hold the model that transformers reads there, or are refused."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from babl.errors import UserError
from babl.models import from_pretrained, save_pretrained
from babl.models.weights import describe

VOCABULARY = 90
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2}
T5 |= {"num_heads": 4, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}
LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


def model_class(family):
    return getattr(transformers, "T5ForConditionalGeneration" if family == "T5" else "LlamaForCausalLM")


def randomised(family, settings):
    """transformers' model, with values in which no weight or bias can be mistaken for another."""
    torch.manual_seed(0)
    model = model_class(family)
    made = model(model.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def inputs(family, length=50):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (2, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, length - 9 :] = 0
    given = {"input_ids": ids * mask, "attention_mask": mask}
    if family == "T5":
        given["decoder_input_ids"] = torch.randint(2, VOCABULARY, (2, 12), generator=draw)
    return given


def theirs(family, folder):
    model, info = model_class(family).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def edit(folder, change_weights=None, **changes):
    if change_weights:
        weights = change_weights(load_file(folder / "model.safetensors"))
        save_file({key: value.clone() for key, value in weights.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def agree(family, folder):
    given = inputs(family)
    with torch.no_grad():
        want, got = theirs(family, folder)(**given).logits, from_pretrained(folder)(**given)
    seen = given["attention_mask"].bool() if "decoder_input_ids" not in given else ...
    assert (got - want)[seen].abs().max() < 1e-5 * want[seen].abs().max()


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    randomised("Llama", LLAMA | {"tie_word_embeddings": True}).save_pretrained(folder)
    return folder


@pytest.fixture
def t5(tmp_path):
    folder = tmp_path / "t5"
    randomised("T5", T5 | {"feed_forward_proj": "relu"}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
        {"rope_parameters": None, "rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}, "rope_theta": 5e5},
        {"rope_parameters": None, "rope_scaling": LINEAR | {"rope_theta": 5e5}},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 3e5},
        {"rope_parameters": None, "rope_scaling": None, "rope_theta": 5e5},
    ],
)
def test_the_base_of_rotations_is_read_in_every_dialect(llama, changes):
    edit(llama, **changes)
    agree("Llama", llama)


def test_a_head_equal_to_the_embedding_is_tied_again(llama, t5):
    edit(llama, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    copies = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    edit(t5, lambda weights: weights | {key: weights["shared.weight"] for key in copies})
    for family, folder in (("Llama", llama), ("T5", t5)):
        model = from_pretrained(folder)
        assert describe(folder)["parameters"] == sum(p.numel() for p in theirs(family, folder).parameters())
        assert sum(p.numel() for p in model.parameters()) == describe(folder)["parameters"]
        agree(family, folder)


@pytest.mark.parametrize("kept", ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight"])
def test_an_embedding_kept_under_the_name_of_its_copy_is_found(t5, kept):
    edit(t5, lambda weights: {kept if key == "shared.weight" else key: value for key, value in weights.items()})
    if kept == "lm_head.weight":  # transformers finds it only under the other names
        shutil.copytree(t5, reference := t5.with_name("reference"))
        edit(reference, lambda w: {"shared.weight" if key == kept else key: value for key, value in w.items()})
        given = inputs("T5")
        with torch.no_grad():
            assert torch.equal(from_pretrained(t5)(**given), from_pretrained(reference)(**given))
        return
    agree("T5", t5)


def test_a_gated_t5_with_its_head_tied_is_saved_for_both_transformers(tmp_path):
    """Unscaled and tied: transformers 4 has no word for it, and takes the two for untied."""
    made, source, saved = randomised("T5", T5 | {"tie_word_embeddings": False}), tmp_path / "a", tmp_path / "b"
    made.save_pretrained(source)
    save_pretrained(from_pretrained(source), saved)
    config, weights = json.loads((saved / "config.json").read_text()), load_file(saved / "model.safetensors")
    assert config["tie_word_embeddings"] is False and config["scale_decoder_outputs"] is False
    assert torch.equal(weights["lm_head.weight"], weights["shared.weight"])
    given = inputs("T5")
    with torch.no_grad():
        assert torch.equal(theirs("T5", source)(**given).logits, theirs("T5", saved)(**given).logits)
    assert from_pretrained(saved).config.tie_word_embeddings


def test_a_model_without_an_end_says_so_again(llama, tmp_path):
    edit(llama, eos_token_id=None, bos_token_id=None)
    save_pretrained(from_pretrained(llama), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["eos_token_id"] is None and config["bos_token_id"] is None


def test_saving_leaves_nothing_of_the_model_that_was_there(llama, tmp_path):
    first = from_pretrained(llama)
    second = from_pretrained(llama)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1.0)
    for shards_first, shards_then in ((9_000, 1 << 30), (1 << 30, 9_000), (9_000, 20_000)):
        folder = tmp_path / f"{shards_first}-{shards_then}"
        save_pretrained(first, folder, shard_bytes=shards_first)
        (folder / "pytorch_model.bin").write_bytes(b"old")
        (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
        save_pretrained(second, folder, shard_bytes=shards_then)
        for model in (from_pretrained(folder), theirs("Llama", folder)):
            found = {p.detach().sum().item() for p in model.parameters()}
            assert found == {p.detach().sum().item() for p in second.parameters()}
        names = {path.name for path in folder.iterdir()}
        assert not names & {"pytorch_model.bin", "generation_config.json"}
        assert ("model.safetensors" in names) != ("model.safetensors.index.json" in names)


def test_a_model_is_saved_into_the_folder_it_is_read_from(llama):
    model = from_pretrained(llama)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_pretrained(model, llama)
    again = dict(from_pretrained(llama).named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in before.items())


def test_of_a_single_file_and_shards_the_one_is_read_that_transformers_reads(llama, tmp_path):
    other = from_pretrained(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.0)
    save_pretrained(other, tmp_path / "shards", shard_bytes=9_000)
    for path in (tmp_path / "shards").glob("model*"):
        shutil.copy(path, llama)
    agree("Llama", llama)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"config\.json: the weights are quantised .*'gptq'"),
        ({"rope_scaling": "linear", "rope_parameters": None}, r"config\.json: not usable"),
        ({"num_hidden_layers": "2"}, r"config\.json: num_hidden_layers is '2', expected int"),
        ({"rms_norm_eps": "1e-5"}, r"config\.json: rms_norm_eps is '1e-5', expected float"),
        ({"hidden_size": 32.5}, r"config\.json: hidden_size is 32\.5, expected int"),
    ],
)
def test_a_config_that_cannot_be_computed_is_one_line(llama, changes, message):
    edit(llama, **changes)
    for read in (from_pretrained, describe):
        with pytest.raises(UserError, match=message) as error:
            read(llama)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "", '{"model_type": ["llama"]}', "null"])
def test_a_config_that_is_none_is_one_line(llama, text):
    (llama / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: (not valid JSON|expected an object|model_type is)") as error:
        describe(llama)
    assert "\n" not in str(error.value)


def test_an_index_that_names_a_file_elsewhere_is_refused(llama):
    (llama / "model.safetensors").rename(llama.parent / "outside.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names '\.\./outside\.safetensors', expected a \.safetensors file beside it"):
        from_pretrained(llama)
