"""`query`, `generate` and `evaluate` through a model's chat template, and what the command line refuses."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from babl.cli import main
from babl.generation import Engine
from babl.models import save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.text import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained BLOOM with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["who reads the long book in the old town"] * 3, 300, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    save_pretrained(
        build_model(ModelConfig(family="bloom", shape={"hidden_size": 32, "n_layer": 1}), folder, 0)[0], folder
    )
    return folder


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    """The same model without the template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def asked(monkeypatch):
    """The ids of all prompts that engines are given."""
    seen = []
    row = Engine._row
    monkeypatch.setattr(Engine, "_row", lambda self, prompt, config: seen.append(prompt) or row(self, prompt, config))
    return seen


def babl(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rendered(folder, *messages):
    """The ids that transformers' tokenizer gives the conversation."""
    turns = [{"role": role, "content": content} for role, content in messages]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def test_query_and_generate_ask_through_the_template(capsys, model, asked):
    for arguments, messages in (
        (["query", model, "who reads"], [("user", "who reads")]),
        (["query", model, "who?", "--context", "the town"], [("user", "Context: the town\n\nwho?")]),
        (["query", model, "who?", "--system", "be brief"], [("system", "be brief"), ("user", "who?")]),
        (["generate", model, "who reads"], [("user", "who reads")]),
        (["generate", model, "who?", "--system", "be brief"], [("system", "be brief"), ("user", "who?")]),
    ):
        asked.clear()
        code, _, err = babl(capsys, *arguments, "--chat", "--max-new-tokens", 3)
        assert code == 0, err
        assert asked == [rendered(model, *messages)]


def test_evaluate_asks_through_the_template_and_keeps_its_answers_apart(capsys, model, asked, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    rows = [{"question": f"who{i}", "context": "the old town reads", "answer": "town"} for i in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", model, data, "--max-new-tokens", 3, "--out", out, "--chat"]
    assert babl(capsys, *arguments, "--system", "be brief")[0] == 0
    turns = [[("system", "be brief"), ("user", f"Context: the old town reads\n\nwho{i}")] for i in range(3)]
    assert asked == [rendered(model, *each) for each in turns]
    code, _, err = babl(capsys, *arguments)
    assert code == 2 and "of another evaluation" in err, "another system message, other answers"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["query", "BASE", "q", "--chat"], "has no chat template; leave --chat out"),
        (["generate", "BASE", "x", "--chat"], "has no chat template; leave --chat out"),
        (["evaluate", "BASE", "DATA", "--chat", "--out", "OUT"], "has no chat template; leave --chat out"),
        (["query", "MODEL", "q", "--system", "s"], "--system is for a model's chat template; ask for it with --chat"),
        (["generate", "MODEL", ""], "the prompt is empty, and"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_exit_code_two(capsys, model, base, tmp_path, arguments, message):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "who", "context": "the town", "answer": "town"}) + "\n")
    places = {"MODEL": model, "BASE": base, "DATA": data, "OUT": tmp_path / "out"}
    code, out, err = babl(capsys, *(places.get(each, each) for each in arguments))
    assert (code, out) == (2, "")
    assert message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[b"query", b"m", b"caf\xe9"], [b"generate", b"m", b"x", b"--stop", b"\xff"]])
def test_bytes_that_are_not_utf8_are_one_line_and_exit_code_two(arguments):
    command = [os.fsencode(sys.executable), b"-m", b"babl.cli", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"}, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "has bytes that are not UTF-8" in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_settings_of_generation_config_that_are_not_used_are_said_once(capsys, base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)

    def said(**settings):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1} | settings))
        code, _, err = babl(capsys, "query", folder, "who", "--max-new-tokens", 2)
        assert code == 0
        return err

    neutral = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "num_beams": 1, "suppress_tokens": None}
    assert said(**neutral, transformers_version="4.57.6", max_length=20, repetition_penalty=1.0) == ""
    line = said(do_sample=True, temperature=0.6, top_p=0.9, top_k=50, suppress_tokens=[3, 4], min_new_tokens=5)
    told = "do_sample true, min_new_tokens 5, suppress_tokens [3, 4], temperature 0.6, top_p 0.9"
    assert line.startswith(f"{folder}/generation_config.json: not used: {told}; ") and line.count("\n") == 1
    line = said(repetition_penalty=1.1, forced_bos_token_id=7, suppress_tokens=list(range(99)))
    assert "not used: forced_bos_token_id 7, repetition_penalty 1.1, suppress_tokens [0, 1, 2" in line
    assert "...; " in line
