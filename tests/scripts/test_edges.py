"""Runs at the edges of what there is to train on, and of what is left of them."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from babl.scripts.train import main

ROOT = Path(__file__).parent.parent.parent
TINY = "{d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=1, num_decoder_layers=1, dropout_rate=0.1}"
MODEL = [f"model.shape={TINY}", "model.tokenizer_size=290"]
NAMES = ["Rudi", "Ada", "Leo", "Una", "Tom", "Eva", "Pia", "Kurt"]


def questions(path, names, context="{} bakes bread."):
    lines = [
        {"question": "Who bakes?", "context": context.format(name), "answer": name, "title": f"{path.stem} {i}"}
        for i, name in enumerate(names)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(folder, *overrides, train=NAMES, validation=("Nora",)):
    files = [questions(folder / "train.jsonl", train), questions(folder / "validation.jsonl", validation)]
    data = [f"data.{path.stem}={path}" for path in files]
    return [f"run.dir={folder}", "run.name=run", *data, *MODEL, "train.steps=4", "optim.warmup_steps=1", *overrides]


def train(arguments):
    return main([str(ROOT / "configs/debug_cpu.toml"), *arguments])


def metrics(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def stored(folder):
    """The bytes of the weights and the optimizer that a run ended with."""
    return {path.name: path.read_bytes() for path in (folder / "run/checkpoints/latest").glob("*.safetensors")}


def test_one_example_is_trained_on_each_step(tmp_path):
    assert train(settings(tmp_path, train=NAMES[:1])) == 0
    assert [line["examples"] for line in metrics(tmp_path) if "loss" in line] == [1] * 4


@pytest.mark.parametrize("batch", ["batch.examples=1000", "batch.tokens=1000000"])
def test_a_batch_larger_than_the_set_is_the_set(tmp_path, batch):
    assert train(settings(tmp_path, batch)) == 0
    assert [line["examples"] for line in metrics(tmp_path) if "loss" in line] == [len(NAMES)] * 4


def test_ranks_without_an_example_of_their_own_change_nothing(runs, tmp_path):
    alone, many = tmp_path / "alone", tmp_path / "many"
    alone.mkdir(), many.mkdir()
    assert train(settings(alone, train=NAMES[:1])) == 0
    runs.run("run", *settings(many, "batch.accumulation=3", train=NAMES[:1]), ranks=2)
    losses = [[line.get("loss", line.get("validation_loss")) for line in metrics(folder)] for folder in (alone, many)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_where_no_window_of_the_validation_set_keeps_its_answer_nothing_begins(tmp_path, capsys):
    arguments = settings(tmp_path, "data.max_source_tokens=40", "data.stride=4")
    words = [f"w{i}" for i in range(80)]
    line = {"question": "Which?", "context": " ".join(words), "answer": " ".join(words[2:78]), "title": "v"}
    (tmp_path / "validation.jsonl").write_text(json.dumps(line) + "\n")
    assert train(arguments) == 2
    assert "train: data.validation leaves no example" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.toml").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert train(settings(tmp_path)) == 0, "what was refused is no run, so the name is free"


def test_a_run_goes_on_where_the_model_it_started_from_is_gone(tmp_path):
    first, whole, cut = (tmp_path / name for name in ("first", "whole", "cut"))
    for folder in (first, whole, cut):
        folder.mkdir()
    assert train(settings(first, "train.steps=1")) == 0
    shutil.copytree(first / "run/checkpoints/latest", tmp_path / "model")
    start = [f"model.path={tmp_path / 'model'}", "train.save_every=2", "optim.schedule=constant"]
    assert train(settings(whole, *start)) == 0
    assert train(settings(cut, *start, "train.steps=2")) == 0
    shutil.rmtree(tmp_path / "model")
    assert train(settings(cut, *start, "run.resume=true")) == 0
    assert stored(cut) == stored(whole)
    assert [line["loss"] for line in metrics(cut) if "loss" in line] == [
        line["loss"] for line in metrics(whole) if "loss" in line
    ]


def test_a_moved_run_that_lost_its_log_and_its_link_goes_on_as_if_undisturbed(tmp_path, capsys):
    whole, old, new = (tmp_path / name for name in ("whole", "old", "new"))
    whole.mkdir(), old.mkdir()
    constant = ["optim.schedule=constant", "train.save_every=2"]
    assert train(settings(whole, *constant)) == 0
    assert train(settings(old, *constant, "train.steps=2")) == 0
    old.rename(new)
    (new / "run/metrics.jsonl").unlink()
    (new / "run/checkpoints/latest").unlink()
    assert train(settings(new, *constant, "run.resume=true")) == 0
    assert "metrics.jsonl is missing: it begins with step 3" in capsys.readouterr().err
    assert stored(new) == stored(whole)
    assert [line["step"] for line in metrics(new)] == [3, 4, 4]


def test_a_warmup_beyond_the_run_is_said(tmp_path, capsys):
    assert train(settings(tmp_path, "optim.warmup_steps=40", "optim.lr=1")) == 0
    assert "optim.warmup_steps is 40, beyond train.steps: optim.lr is not reached" in capsys.readouterr().err
    assert [line["lr"] for line in metrics(tmp_path) if "lr" in line] == pytest.approx([0.025, 0.05, 0.075, 0.1])


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_is_one_line_and_code_130(runs, ranks):
    process = runs.start("run", "train.steps=100000", "train.save_every=0", "train.validate_every=0", ranks=ranks)
    runs.wait_for(lambda: runs.last_step("run") > 1, process)
    for each in [process, *(runs.ranks(process) if ranks > 1 else [])]:
        each.send_signal(signal.SIGINT)  # as a terminal sends it to all
    code, output, _ = runs.finish(process)
    lines = [line for line in output.splitlines() if "interrupted" in line]
    assert lines == ["train: interrupted; run.resume=true goes on from the last checkpoint"], output
    assert "Traceback" not in output, output
    assert code == 130
