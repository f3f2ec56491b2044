"""ByT5: tokens are the bytes of a text, as transformers' ByT5Tokenizer has them."""

import json
import random
import shutil

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from babl.cli import main
from babl.generation import Engine
from babl.text import Detokenizer, load_tokenizer

TEXTS = [
    "who reads",
    "",
    " two  spaces \n",
    "née 日本 👩‍👩‍👧 \u0301",
    "a<extra_id_0> b<extra_id_124>",
    "\x00\x7f\ufffd",
]
SHAPE = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byt5")
    torch.manual_seed(0)
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=384, **SHAPE, **gated)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    return load_tokenizer(folder), ByT5Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(pair, text):
    ours, theirs = pair
    assert [*ours.encode(text), ours.eos_id] == theirs(text).input_ids
    assert (ours.pad_id, ours.eos_id, ours.unk_id, ours.bos_id) == (0, 1, 2, None)


def test_any_ids_are_decoded_alike_at_once_and_one_by_one(pair):
    ours, theirs = pair
    draw = random.Random(0)
    for _ in range(1000):
        ids = [draw.choice([draw.randrange(384), 3 + draw.choice("aé日".encode())]) for _ in range(draw.randint(0, 12))]
        expected = theirs.decode(ids, skip_special_tokens=True)
        stream = Detokenizer(ours)
        assert ours.decode(ids) == expected == "".join([*map(stream.add, ids), stream.rest()])


def test_typed_control_is_text(pair):
    ours, _ = pair
    assert bytes(id - 3 for id in ours.encode("a</s><pad>")) == b"a</s><pad>"


def test_a_token_begins_at_its_character(pair):
    assert pair[0].token_starts(["aé日"]) == [[0, 1, 1, 2, 2, 2]]


def test_a_folder_is_described_asked_and_copied(folder, capsys, tmp_path):
    assert main(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"] == "tokenizer_config.json"
    assert main(["query", str(folder), "Who?", "--context", "Née " * 400, "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["windows"] > 1
    assert main(["export", str(folder), str(tmp_path / "copy")]) == 0
    prompts = ["question: who?", "question: what is née?"]
    answers = Engine.load(tmp_path / "copy", "cpu", "float32").generate(prompts, max_new_tokens=12)
    theirs, model = ByT5Tokenizer.from_pretrained(folder), T5ForConditionalGeneration.from_pretrained(folder).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        out = model.generate(**theirs(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
        assert answer == theirs.decode(out[0], skip_special_tokens=True)


def test_the_models_config_may_be_what_names_the_class(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tokenizer_class": "ByT5Tokenizer"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["export", str(tmp_path), str(tmp_path / "copy")]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "copy")  # where the config names no class any more
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert load_tokenizer(tmp_path).encode(text) == ids == load_tokenizer(tmp_path / "copy").encode(text)
