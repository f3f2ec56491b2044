"""`babl models` and `babl info` where folders are odd."""

import json
import shutil

import pytest

from babl.cli import main
from babl.models import save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.text import train_tokenizer
from babl.web.engine.models import find_models, model_state

SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
CHANGED = {  # of config.json: what the row then says
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type is 'yarn'"),
    "text-scaling": ({"rope_scaling": "x"}, "not usable"),
    "endless": ({"num_hidden_layers": 10**9}, "config.json says 1,000,000,000 layers, but there are 12 tensors"),
    "negative": ({"vocab_size": -5}, "no model has these sizes"),
    "huge": ({"vocab_size": 10**30}, "no model has these sizes"),
    "no-heads": ({"num_attention_heads": 0, "num_key_value_heads": 0}, "not usable"),
    "wider": ({"hidden_size": 64}, "has shape"),
    "older": ({"max_position_embeddings": None, "max_sequence_length": 64}, ""),
}
WRITTEN = {  # files: what the row then says
    "list": ({"config.json": "[]"}, "expected an object, found list"),
    "deep": ({"config.json": "[" * 100_000}, "not valid JSON"),
    "latin": ({"config.json": b"\xff\xfe{"}, "not valid JSON"),
    "gpt": ({"config.json": '{"model_type": "gpt2"}'}, "model_type is 'gpt2'"),
    "unhashable": ({"config.json": '{"model_type": ["llama"]}'}, "model_type is ['llama']"),
    "pointer": ({"model.safetensors": POINTER}, "is a pointer to the file, not the file; `git lfs pull`"),
    "cut": ({"model.safetensors": b"\x10\0\0\0\0\0\0\0{"}, "not a readable safetensors file"),
    "index": ({"model.safetensors": None, "model.safetensors.index.json": "{}"}, "not an index of shards"),
    "shard": (
        {"model.safetensors": None, "model.safetensors.index.json": '{"weight_map": {"a": "b.safetensors"}}'},
        "shard b.safetensors named by model.safetensors.index.json is missing",
    ),
    "pickle": ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "`babl convert"),
    "wordless": ({"tokenizer.json": None, "tokenizer_config.json": None}, "no tokenizer here"),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of model folders: one that is sound, and many that are not."""
    top = tmp_path_factory.mktemp("odd")
    train_tokenizer(["who did it"], 280, top / "sound")
    save_pretrained(build_model(ModelConfig(family="llama", shape=SHAPE), top / "sound", 0)[0], top / "sound")
    config = json.loads((top / "sound" / "config.json").read_text())
    for name, (changes, _) in CHANGED.items():
        shutil.copytree(top / "sound", top / name)
        (top / name / "config.json").write_text(json.dumps(config | changes))
    for name, (files, _) in WRITTEN.items():
        shutil.copytree(top / "sound", top / name)
        for file, content in files.items():
            if content is None:
                (top / name / file).unlink(missing_ok=True)
            else:
                (top / name / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.copytree(top / "sound", top / "directory")
    (top / "directory" / "config.json").unlink()
    (top / "directory" / "config.json").mkdir()
    shutil.copytree(top / "sound", top / ".pulled.part")
    (top / "encoder").mkdir()
    (top / "encoder" / "config.json").write_text(
        json.dumps({"model_type": "t5", "num_layers": 10**9, "num_decoder_layers": 1})
    )
    shutil.copy(top / "sound" / "model.safetensors", top / "encoder")
    shutil.copytree(top / "sound", top / "\udcff")  # a byte that is not UTF-8
    return top


SAID = {name: said for name, (_, said) in (CHANGED | WRITTEN).items()} | {"sound": "", "directory": "not valid JSON"}
SAID["encoder"] = "config.json says 1,000,000,000 layers, but there are 13 tensors"
SAID |= {"\udcff": "not valid UTF-8"}


def test_every_folder_has_a_row_that_says_what_is_wrong_with_it(odd, capsys):
    assert main(["models", "--models", str(odd), "--json"]) == 0
    rows = {row["model"].removeprefix(f"{odd}/"): row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == SAID.keys()
    for name, said in SAID.items():
        assert ("unusable" in rows[name]) == bool(said), rows[name]
        assert said in rows[name].get("unusable", ""), name
    assert rows["sound"]["fits"] and rows["older"]["context"] == 2048
    assert main(["models", "--models", str(odd)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(SAID) and "fits: needs " in out


def test_the_browsers_list_says_the_same(odd):
    for name, folder in find_models([odd]).items():
        state, said = model_state(name, folder, "cpu", "auto"), SAID.get(name, "is not UTF-8; rename it")
        assert state.state == ("unusable" if said else "unloaded") and said in state.reason, name


@pytest.mark.parametrize("name", [name for name in SAID if name.isascii()])
def test_info_describes_it_or_says_what_is_wrong_in_a_line(odd, capsys, name):
    code = main(["info", str(odd / name), "--json"])
    captured = capsys.readouterr()
    if not SAID[name] or name == "wordless":
        assert code == 0 and json.loads(captured.out)["needed_bytes"] > 256 << 20
    else:
        assert code == 2 and SAID[name] in captured.err and len(captured.err.splitlines()) == 1


def test_does_not_fit_says_how_much_would(odd, capsys, monkeypatch):
    monkeypatch.setattr("babl.generation.memory.free_memory", lambda device: (256 << 20) + (400 << 10))
    main(["models", "--models", str(odd), "--context", "2048"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{odd}/sound "))
    assert "does not fit beyond " in row and "needs 256 MiB of 256 free (float32 on cpu, 2,048 tokens)" in row
