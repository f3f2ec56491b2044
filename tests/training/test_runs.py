"""What `babl runs` and `babl plot` tell of runs is what is in their files, and a run that goes on is seen to go on."""

import json
import re
import subprocess
import sys

import pytest
from filelock import FileLock

from babl.cli import main


def made(folder, steps, lines, locked=False):
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(f"[train]\nsteps = {steps}\n")
    (folder / "metrics.jsonl").write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    (folder / ".lock").touch()
    return folder


def step(number, loss, **more):
    return {"step": number, "loss": loss, "lr": 0.1, "grad_norm": 1.0, "tokens": 100, "tokens_per_second": 50.0} | more


@pytest.fixture
def runs(tmp_path):
    made(tmp_path / "a", 2, [step(1, 3.0), step(2, 2.5), {"step": 2, "validation_loss": 2.75}])
    lines = [step(1, 4.0), {"step": 1, "validation_loss": 3.5}, step(2, 3.0), {"step": 2, "validation_loss": 3.75}]
    made(tmp_path / "deep" / "b", 12, [*lines, '{"step": 3, "lo'])
    made(tmp_path / "c", 5, [])
    return tmp_path


def rows(folder, capsys):
    assert main(["runs", str(folder), "--json"]) == 0
    return {row.pop("name"): row for row in json.loads(capsys.readouterr().out)}


def test_each_run_is_told_with_its_state_losses_and_time_left(runs, capsys):
    found = rows(runs, capsys)
    assert list(found) == ["a", "c", "deep/b"]
    assert found["a"] == {
        "state": "done", "step": 2, "steps": 2, "loss": 2.5, "best_validation_loss": 2.75, "best_step": 2,
        "seconds_left": None,
    }  # fmt: skip
    assert found["deep/b"] == {
        "state": "stopped", "step": 2, "steps": 12, "loss": 3.0, "best_validation_loss": 3.5, "best_step": 1,
        "seconds_left": 20.0,  # ten steps of 100 tokens at 50 a second
    }  # fmt: skip
    assert found["c"]["state"] == "stopped" and found["c"]["loss"] is None and found["c"]["seconds_left"] is None


def test_a_run_whose_lock_another_process_holds_is_running(runs, capsys):
    path = str(runs / "deep/b/.lock")
    hold = f"from filelock import FileLock; lock = FileLock({path!r}); lock.acquire(); print(1, flush=True); input()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        assert main(["runs", str(runs)]) == 0
        out = capsys.readouterr().out
        other.communicate("\n")
    assert re.search(r"^deep/b +running +step 2 of 12, loss 3\.0000, best validation loss 3\.5000 at step 1", out, re.M)
    assert "about 0 minutes left" in out and re.search(r"^a +done +step 2 of 2", out, re.M)
    with FileLock(runs / "deep/b/.lock", timeout=0):  # looking at a run has not kept its lock
        pass


def test_a_real_run_is_seen(tmp_path, capsys):
    shape = "{d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1}"
    settings = [f"run.dir={tmp_path}", "train.steps=3", f"model.shape={shape}", "train.preflight=false"]
    assert main(["train", "configs/debug_cpu.toml", *settings]) == 0
    capsys.readouterr()
    (row,) = rows(tmp_path, capsys).values()
    assert row["state"] == "done" and row["step"] == row["steps"] == 3 and row["best_step"] == 3


def test_curves_of_runs_are_in_one_file_that_fetches_nothing(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "curves.html"
    assert main(["plot", str(runs / "a"), str(runs / "deep/b"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = out.read_text()
    assert page.count("<svg") == 5 and "src=" not in page and "<link" not in page
    for name in ("validation loss", "learning rate", str(runs / "a"), str(runs / "deep/b")):
        assert name in page
    first = page
    assert main(["plot", str(runs / "a"), str(runs / "deep/b"), "--out", str(out)]) == 0
    assert out.read_text() == first, "the same runs give the same bytes"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs", "nowhere"], "babl runs: nowhere: no such folder; `babl train` makes runs/\n"),
        (["plot", "nowhere"], "babl plot: nowhere: no metrics.jsonl to be read there (No such file or directory); name "
            "the folder of a run\n"),
        (["plot", "{a}", "--out", "{a}"], "babl plot: --out: {a} cannot be written (Is a directory)\n"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(runs, arguments, said, capsys):
    assert main([each.format(a=runs / "a") for each in arguments]) == 2
    assert capsys.readouterr().err == said.format(a=runs / "a")
