"""`babl experiment` as a user runs it: real processes, killed, crowded, cut short, and the same report in the end."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from babl.cli import main


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums of two threads and of one differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(experiment_config):
    """A function that returns the running command."""

    def run(folder, *arguments):
        command = [sys.executable, "-m", "babl.cli", "experiment", "run", experiment_config(folder), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return run


@pytest.fixture(scope="module")
def babl(experiment_config):
    """A function that runs the command in this process and returns exit code, stdout and stderr."""

    def run(folder, action, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["experiment", action, experiment_config(folder), *arguments])
        return code, out.getvalue(), err.getvalue()

    return run


def report_of(folder):
    """Every file of the report by name, but for the times."""
    files = sorted((folder / "tiny" / "report").iterdir())
    return {path.name: path.read_bytes() for path in files if path.name != "timing.csv"}


@pytest.fixture(scope="module")
def done(babl, tmp_path_factory):
    """The folder of an experiment that nobody disturbed; tests put back what they change."""
    folder = tmp_path_factory.mktemp("done")
    code, out, err = babl(folder, "run", "--jobs", "1")
    assert code == 0 and out.strip() == str(folder / "tiny" / "report" / "report.html"), err
    return folder


def test_a_report_is_the_same_when_repeated_and_everything_verifies(babl, done):
    before = report_of(done)
    assert {"report.html", "report.md", "report.json", "table.csv"} <= set(before)
    assert babl(done, "report")[0] == 0 and report_of(done) == before
    code, out, err = babl(done, "verify")
    assert (code, out) == (0, "") and "2 of 2 cells done, 0 mismatches" in err


def test_a_finished_experiment_run_again_does_nothing(babl, done):
    before = {path: path.stat().st_mtime_ns for path in (done / "tiny" / "cells").rglob("*") if path.is_file()}
    assert babl(done, "run")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("predictions/gold.jsonl", "the answers under gold are not those that were written"),
        ("scored.json", "the scores under none are not those that were written"),
        ("run/checkpoints/latest/model.safetensors", "the weights are not those that were trained"),
    ],
)
def test_what_was_changed_afterwards_is_found(babl, done, file, line):
    (cell,) = (done / "tiny" / "cells").glob("*-gold-*")
    path = cell / file
    kept = path.read_bytes()
    changed = {
        "predictions/gold.jsonl": lambda: kept.replace(b'"tokens": 3', b'"tokens": 4', 1),
        "scored.json": lambda: kept.replace(b'"exact": ', b'"exact": 9', 1),
    }.get(file, lambda: kept[:-1] + bytes([kept[-1] ^ 1]))()
    assert changed != kept
    path.write_bytes(changed)
    try:
        code, out, _ = babl(done, "verify")
        assert code == 1 and out.strip() == f"{cell.name}: {line}"
        if "run/" not in file:
            code, _, err = babl(done, "report")
            assert code == 2 and len(err.strip().splitlines()) == 1 and cell.name in err
    finally:
        path.write_bytes(kept)


def kill_everything(process):
    """The command, and by chance what it has started, are gone from one moment to the next."""
    everything = [process.pid]
    if random.random() < 0.7:
        everything += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    for pid in everything:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_again_and_again_the_report_is_the_same_to_the_byte(babl, start, done, tmp_path, kills):
    random.seed(kills)
    survived = 0
    for _ in range(kills):
        process = start(tmp_path, "--jobs", "1")
        time.sleep(random.uniform(2, 7))
        if process.poll() is None:
            kill_everything(process)
            survived += 1
    assert survived >= 2
    code, _, err = babl(tmp_path, "run", "--jobs", "1")
    assert code == 0, err
    assert report_of(tmp_path) == report_of(done)
    assert not list((tmp_path / "tiny" / "cells").glob("*/lock"))


def test_two_at_once_share_the_work_and_jobs_do_too(start, done, tmp_path):
    one, two = start(tmp_path, "--jobs", "2"), start(tmp_path, "--jobs", "1")
    outputs = [process.communicate(timeout=240) for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), outputs
    assert report_of(tmp_path) == report_of(done)
    said = "".join(err for _, err in outputs)
    assert said.count("trained, loss") == 2, "nobody trained a cell that another had"


def test_out_of_time_it_leaves_and_goes_on(babl, start, done, tmp_path):
    assert babl(tmp_path, "run", "--limit-minutes", "0.001")[0] == 75
    assert not (tmp_path / "tiny" / "report").exists()
    process = start(tmp_path, "--jobs", "1")
    while not list((tmp_path / "tiny").glob("cells/*/run/metrics.jsonl")):
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 75
    assert babl(tmp_path, "run", "--jobs", "1")[0] == 0
    assert report_of(tmp_path) == report_of(done)


def test_a_dry_run_tells_what_it_would_take_and_freezes_nothing(babl, tmp_path):
    options = ("experiment.seeds=[0, 1]", "experiment.metric=f1", "experiment.test_articles=6")
    code, out, err = babl(tmp_path, "run", "--dry-run", *options)
    assert code == 0, err
    assert out.count("model-gold-s") == 2 and "4 cells and 0 trials" in out
    assert "minutes" in out and "MiB" in out and "power .8" in out
    assert "smallest difference in F1 points that 2 seeds and 6 articles find" in out
    assert "over new articles alone, for these models" in out and "EM" not in out
    assert not (tmp_path / "tiny").exists()


def test_one_cell_at_a_time_the_settings_chosen_by_trials(babl, tmp_path):
    settings = ['experiment.grid={"optim.lr" = [1e-9, 0.01]}', "experiment.primary=['gold', 'none']"]
    assert babl(tmp_path, "run", *settings, "--only", "1")[0] == 0
    cells = {path.name: path for path in (tmp_path / "tiny" / "cells").iterdir()}
    assert sorted(name.rsplit("-", 1)[0] for name in cells) == ["model-gold-s0", *["try-model-gold-s0"] * 2]
    (cell,) = (path for name, path in cells.items() if name.startswith("model"))
    assert json.loads((cell / "trained.json").read_text())["chosen"]["optim.lr"] in (1e-9, 0.01)
    plan = json.loads((tmp_path / "tiny" / "plan.json").read_text())
    scores = {
        trial["settings"]["optim.lr"]: json.loads((cells[trial["id"]] / "scored.json").read_text())["gold"]["exact"]
        for trial in plan["trials"]
        if trial["arm"] == "gold"
    }
    best = max(scores, key=scores.get)
    assert json.loads((cell / "trained.json").read_text())["chosen"] == {"optim.lr": best}
    code, _, err = babl(tmp_path, "run", *settings, "--only", "7")
    assert code == 2 and "--only is '7', expected a cell's id or its number from 0 to 1" in err


def test_a_run_that_fails_by_the_rule_is_told_and_not_replaced(babl, tmp_path):
    code, _, err = babl(tmp_path, "run", "--jobs", "1", "experiment.failure_loss=0.5")
    assert code == 0 and err.count("failed, the loss at the end is") == 2
    report = (tmp_path / "tiny" / "report" / "report.md").read_text()
    assert "0/1" in report and "failed" in report


def test_a_cell_that_breaks_is_no_result(babl, tmp_path):
    code, _, err = babl(tmp_path, "run", "model.shape={d_model=16, num_heads=-1}", "--only", "0")
    assert code == 1 and "training ended with exit code" in err and "train.log" in err
    assert not list((tmp_path / "tiny" / "cells").glob("*/trained.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["run", "--limit-minutes", "0"], "--limit-minutes is 0, expected more than 0"),
        (["run", "experiment.grid={'optim.lrr' = [1]}"], "experiment.grid.optim.lrr: unknown key 'optim.lrr'"),
        (["run", "experiment.models={a = {'optim.lr' = 'x'}}"], 'experiment.models.a: optim.lr is "x", expected float'),
        (["run", "data.validation=x.json"], "data.validation: an experiment makes its own"),
        (["report"], "no experiment is there"),
        (["verify"], "no experiment is there"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(babl, tmp_path, arguments, message):
    code, out, err = babl(tmp_path, *arguments)
    assert (code, out) == (2, "") and message in err and len(err.strip().splitlines()) == 1
