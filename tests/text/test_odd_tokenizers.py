"""Files of tokenizers that are old, incomplete or not there: read as transformers reads them, or refused by name."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from babl.errors import UserError
from babl.text import load_tokenizer

FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
TEXTS = ("who reads", "a <turn> long<turn>  book </s>", "née <mark>the<mark> old")


@pytest.fixture
def spec():
    """A byte-level BPE with an end, as tokenizer.json has it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["who reads the long old book"] * 2, trainer)
    return json.loads(made.to_str())


def write(folder, spec, **settings):
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_file_that_does_not_name_its_models_type_is_read(spec, tmp_path):
    del spec["model"]["type"]
    write(tmp_path, spec)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert ours.encode_batch(TEXTS[:1]) == theirs(list(TEXTS[:1]), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("apart", [0, 40])
def test_tokens_that_the_settings_alone_declare_have_the_ids_of_transformers(spec, tmp_path, apart):
    first = len(spec["model"]["vocab"]) + apart
    declared = {
        str(first + 1): FLAGS | {"content": "<turn>"},
        str(first): FLAGS | {"content": "<mark>", "special": False},
        "0": FLAGS | {"content": "</s>"},
    }
    write(tmp_path, spec, added_tokens_decoder=declared)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_chat(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        plain = text.replace("<turn>", "").replace("</s>", "")
        assert ours.encode(plain) == theirs(plain, add_special_tokens=False)["input_ids"]
    turn = theirs.convert_tokens_to_ids("<turn>")
    assert turn in ours.encode_chat("<turn>") and turn not in ours.encode("<turn>")


def test_a_vocabulary_without_latin_letters_is_read(tmp_path):
    model = {"type": "BPE", "vocab": {"б": 0, "а": 1, "</s>": 2, "ба": 3}, "merges": ["б а"]}
    end = FLAGS | {"id": 2, "content": "</s>"}
    write(tmp_path, {"version": "1.0", "added_tokens": [end], "model": model})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("баба") == theirs("баба", add_special_tokens=False)["input_ids"] == [3, 3]


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model", "tokenizer.model"])
def test_what_git_has_in_place_of_a_large_file_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=f"{name} is a pointer to the file, not the file; `git lfs pull`"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("template", [3, ["x"], {"default": "x"}, [{"name": "default"}]])
def test_a_chat_template_of_another_form_is_named(spec, tmp_path, template):
    write(tmp_path, spec, chat_template=template)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: chat_template is .*, expected a text, or a list"):
        load_tokenizer(tmp_path)


def test_a_chat_template_that_is_not_utf8_is_named(spec, tmp_path):
    write(tmp_path, spec)
    (tmp_path / "chat_template.jinja").write_bytes("{{ messages }}".encode("utf-16"))
    with pytest.raises(UserError, match=r"chat_template\.jinja: not UTF-8"):
        load_tokenizer(tmp_path)
