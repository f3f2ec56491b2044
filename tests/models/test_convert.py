"""`babl convert`: what transformers and torch pickled, read back; and pickles that are more than tensors."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from babl.cli import main
from babl.models import convert as converting
from babl.models import from_pretrained
from babl.text import train_tokenizer

VOCABULARY = 280
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "max_position_embeddings": 64}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
MODELS = {"t5": ("T5ForConditionalGeneration", T5), "llama": ("LlamaForCausalLM", LLAMA)}
MODELS |= {"bloom": ("BloomForCausalLM", BLOOM)}
UNSHARE = shutil.which("unshare") and not subprocess.run([*converting.FENCE, "true"], capture_output=True).returncode


def published(family, folder, **settings):
    """transformers' model, and its folder without weights."""
    name, shape = MODELS[family]
    config = transformers.AutoConfig.for_model(family, **shape | settings)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    config.save_pretrained(folder)
    train_tokenizer(["who did it"], VOCABULARY, folder)
    return model


def convert(capsys, *arguments):
    code = main(["convert", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def check(family, model, folder):
    """The folder computes what the model does, here and in transformers."""
    ids = torch.arange(2, 22)[None]
    given = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :7]} if family == "t5" else {})
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        want = model(**given).logits
        assert torch.equal(loaded(**given).logits, want)
        assert (from_pretrained(folder)(**given) - want).abs().max() < 1e-5 * want.abs().max()


def test_tied_weights_of_one_pickle_are_written_once_beside_it(capsys, tmp_path):
    model = published("t5", tmp_path)
    state = model.state_dict()
    assert {"lm_head.weight", "encoder.embed_tokens.weight"} <= state.keys()
    torch.save(dict(reversed(state.items())), tmp_path / "pytorch_model.bin")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = convert(capsys, tmp_path)
    assert (code, out) == (0, f"{tmp_path}\n"), err
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    weights = load_file(tmp_path / "model.safetensors")
    assert after.pop("model.safetensors") and after == before
    assert {name for name in weights if "embed" in name or name in ("shared.weight", "lm_head.weight")} == {
        "shared.weight"
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.items())
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    check("t5", model, tmp_path)


def test_shards_and_a_head_that_is_said_to_be_its_own(capsys, tmp_path, monkeypatch):
    model = published("llama", tmp_path / "a")
    model.lm_head.weight = model.model.embed_tokens.weight  # one tensor, though config.json says two
    state = model.state_dict()
    parts = [dict(list(state.items())[:5]), dict(list(state.items())[5:])]
    parts[0]["lm_head.weight"] = parts[1].pop("lm_head.weight")
    index = {}
    for number, part in enumerate(parts):
        index |= dict.fromkeys(part, f"weights_{number}.bin")
        torch.save(part, tmp_path / "a" / f"weights_{number}.bin")
    (tmp_path / "a" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "a" / "training_args.bin").write_bytes(b"not read")
    code, out, err = convert(capsys, tmp_path / "a", "--to", tmp_path / "b")
    assert (code, out) == (0, f"{tmp_path / 'b'}\n"), err
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert {name for name in names if "model" in name} == {
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any(name.endswith(".bin") for name in names)
    check("llama", model, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_older_form_of_pickles_is_read_and_what_protects_is_said(capsys, tmp_path, monkeypatch):
    model = published("bloom", tmp_path / "a")
    torch.save(model.state_dict(), tmp_path / "a" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(converting, "FENCE", ("false",))
    code, _, err = convert(capsys, tmp_path / "a", "--to", tmp_path / "b")
    assert code == 0 and "Python has no sockets (this system makes no network namespace), with at most " in err
    check("bloom", model, tmp_path / "b")


@pytest.mark.skipif(not UNSHARE, reason="this system makes no network namespace")
def test_the_reading_process_has_neither_network_nor_tokens(capsys, tmp_path, monkeypatch):
    model, seen = published("llama", tmp_path / "a"), tmp_path / "seen"
    torch.save(model.state_dict(), tmp_path / "a" / "pytorch_model.bin")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n(cat /proc/net/dev; env) > {seen}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(converting.sys, "executable", str(python))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, _, err = convert(capsys, tmp_path / "a")
    assert code == 0 and "the pickles were read in a process without network, with at most " in err
    interfaces = [line.split(":")[0].strip() for line in seen.read_text().splitlines() if ": " in line]
    assert interfaces == ["lo"] and "hf_secret" not in seen.read_text()


class Touch:
    """Makes a file when it is unpickled by a reader that is not careful."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_the_code_not_run(capsys, tmp_path, zipped):
    folder, mark = tmp_path / "a", tmp_path / "mark"
    state = published("llama", folder).state_dict()
    path = folder / "pytorch_model.bin"
    torch.save(dict(state) | {"extra": Touch(mark)}, path, _use_new_zipfile_serialization=zipped)
    code, out, err = convert(capsys, folder)
    assert (code, out) == (2, "") and not mark.exists()
    assert err == (
        f"babl convert: {path} is refused: reading it would run posix.system, which is code and no tensor; nothing was "
        "run\n"
    )
    assert not list(folder.glob("*.safetensors*")) and not list(folder.glob(".*"))
    torch.load(path, weights_only=False)
    assert mark.exists(), "the pickle would have run it"


def test_a_reading_process_that_is_fooled_can_do_nothing(tmp_path):
    """As if torch.load ran what the pickle says."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.2)
    port, file = listening.getsockname()[1], tmp_path / "file"
    (tmp_path / "old").write_text("x")
    attempts = [
        f"socket.create_connection(('127.0.0.1', {port}))",
        f"os.system('touch {file}')",
        f"subprocess.run(['touch', '{file}'])",
        f"open('{file}', 'w')",
        f"pathlib.Path('{tmp_path}/old').write_text('y')",
        f"os.remove('{tmp_path}/old')",
        f"os.rename('{tmp_path}/old', '{file}')",
        f"os.mkdir('{file}')",
        "os.fork()",
        f"os.execv('/bin/touch', ['touch', '{file}'])",
        "ctypes.CDLL(None)",
        "torch.zeros(3 << 30, dtype=torch.uint8)",
        "bytearray(3 << 30)",
    ]
    script = (
        "import ctypes, os, pathlib, socket, subprocess, torch\nfrom babl.models.convert import confine\nconfine(0)\n"
    )
    for attempt in attempts:
        script += (
            f"try:\n    {attempt}\n    print('done')\nexcept Exception as error:\n    print(type(error).__name__)\n"
        )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["PermissionError"] * 11 + ["RuntimeError", "MemoryError"], done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"] and (tmp_path / "old").read_text() == "x"
    with pytest.raises(TimeoutError):
        listening.accept()
    listening.close()


def test_tensors_that_are_not_the_familys_are_named(capsys, tmp_path):
    state = dict(published("llama", tmp_path).state_dict())
    del state["model.layers.1.mlp.up_proj.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    code, _, err = convert(capsys, tmp_path)
    assert code == 2
    assert (
        err.splitlines()[-1] == f"babl convert: {tmp_path}: 1 tensors missing, first model.layers.1.mlp.up_proj.weight"
    )
    assert not list(tmp_path.glob("*.safetensors*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "not a readable pickle of tensors"),
        (b"", "not a readable pickle of tensors (EOFError"),
        (torch.zeros(2), "holds a Tensor, expected names and their tensors"),
        ({"state_dict": {"a": torch.zeros(2)}}, "'state_dict' is no plain tensor, expected names and their tensors"),
        ({"a": torch.zeros(2).to_sparse()}, "'a' is no plain tensor"),
        (torch.nn.Linear(2, 2), "would run torch.nn.modules.linear.Linear, which is code and no tensor"),
    ],
)
def test_a_pickle_of_something_else_is_said(tmp_path, content, message):
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(converting.UserError) as refused:
        converting._tensors(path)
    assert str(refused.value).startswith(str(path)) and message in str(refused.value)


def test_what_cannot_be_converted_is_said_before_anything_is_read(capsys, tmp_path):
    folder = tmp_path / "a"
    published("llama", folder)
    config = (folder / "config.json").read_text()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
    index = '{"weight_map": {"a": "pytorch_model-1.bin"}}'
    for files, message in [
        ({}, f"{folder}: no pickled weights (expected pytorch_model.bin or pytorch_model.bin.index.json)"),
        ({"pytorch_model.bin": pointer}, "pytorch_model.bin is a pointer to the file, not the file; `git lfs pull`"),
        ({"pytorch_model.bin.index.json": index}, "shard pytorch_model-1.bin named by pytorch_model.bin.index.json"),
        ({"model.safetensors": "x"}, f"{folder} holds safetensors already, there is nothing to convert"),
        ({"config.json": '{"model_type": "gpt2"}'}, "model_type is 'gpt2'"),
        ({"config.json": config.replace('"silu"', '"gelu"')}, "hidden_act is 'gelu', expected 'silu'"),
    ]:
        for name, text in files.items():
            (folder / name).write_text(text)
        code, out, err = convert(capsys, folder)
        assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
        for name in files:
            (folder / name).unlink()
        (folder / "config.json").write_text(config)
    code, _, err = convert(capsys, folder, "--to", folder)
    assert code == 2 and f"--to: {folder} is there already" in err
    code, _, err = convert(capsys, tmp_path / "absent")
    assert code == 2 and "absent: no such model folder" in err
