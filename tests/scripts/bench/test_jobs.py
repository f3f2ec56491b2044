"""What is measured is there and right; how fast it is, no test says."""

import json
import re

import pytest

from babl.data.fictional import fictional_corpus
from babl.models import save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.scripts.bench.__main__ import main
from babl.scripts.bench.generate import generate
from babl.scripts.bench.load import load
from babl.scripts.bench.score import score
from babl.text import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["Question: who Answer: somebody"], 300, folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    save_pretrained(build_model(ModelConfig(family="llama", shape=shape), folder, 0)[0], folder)
    (folder / "dev.json").write_text(json.dumps(fictional_corpus(1, 1)[1]))
    return folder


def test_lookup_counts_steps_and_keeps_every_figure_with_the_machine(folder, tmp_path, capsys):
    out = tmp_path / "new" / "lookup.json"
    assert main(["lookup", str(folder), str(folder / "dev.json"), "--limit", "5", "--out", str(out)]) == 0
    kept = json.loads(out.read_text())
    (row,) = kept["rows"]
    assert row["prompts"] == row["identical"] == 5
    assert row["steps"] == row["tokens"] >= row["steps with lookup"] > 0
    assert {"cpu", "threads", "torch", "transformers"} <= kept["machine"].keys()
    assert re.search(r"\| prompts \|.*\n\| --- \|", capsys.readouterr().out)


def test_overlap_is_looked_for_in_made_up_sets(tmp_path):
    out = tmp_path / "overlap.json"
    assert main(["overlap", "--train", "300", "--test", "60", "--documents", "30", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["set"], row["corpus documents"]) for row in rows] == [
        ("plain", 0),
        ("plain", 30),
        ("forms", 0),
        ("forms", 30),
    ]
    assert all(row["seconds"] > 0 and row["peak MiB"] > 20 for row in rows)


def test_a_model_that_is_not_there_is_one_line_and_exit_code_two(capsys):
    assert main(["lookup", "absent", "dev.json"]) == 2
    assert capsys.readouterr().err == "bench: absent: no such model folder\n"


def test_scores_are_those_of_the_official_algorithm():
    rows = score(600, repeats=1)  # raises where a metric differs
    assert [(row["version"], row["texts"], row["by"]) for row in rows] == [
        (version, texts, by)
        for version in ("1.1", "2.0")
        for texts in ("as in SQuAD", "none twice")
        for by in ("babl", "official algorithm")
    ]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows)


@pytest.mark.slow
def test_everybody_writes_the_same_tokens():
    rows = generate(["bloom"], repeats=1, compiled=False)
    assert {(row["by"], row["batch"]) for row in rows} >= {(by, n) for by in ("babl", "transformers") for n in (1, 16)}
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows)


@pytest.mark.slow
def test_loading_takes_the_memory_of_the_weights_once():
    rows = load(1024)
    assert [(row["folder"], row["packed"]) for row in rows] == [
        (folder, packed) for folder in ("float32", "bfloat16") for packed in (False, True)
    ]
    assert all(1000 < row["weights MiB"] < 1100 for row in rows)
    assert all(0.95 < row["ratio"] <= 1.15 for row in rows), rows
