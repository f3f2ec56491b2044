"""Signals and failures, in real runs of two ranks: who leaves, how fast, and what is said first."""

import signal

import psutil
import pytest

from babl.distributed.failure import EXIT_PREEMPTED
from babl.training.checkpoint import find_fault

BACKENDS = ["ddp", *(pytest.param(backend, marks=pytest.mark.slow) for backend in ("fsdp", "zero2"))]
SLOW_STEP = "import time; time.sleep(0.25)"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_signal_to_one_rank_saves_on_all_within_a_step_and_the_run_goes_on(runs, undisturbed, backend):
    process = runs.start("run", f"distributed.backend={backend}", script=runs.edited(SLOW_STEP))
    runs.wait_for(lambda: runs.last_step("run") >= 3, process)
    runs.ranks(process)[1].send_signal(signal.SIGUSR1)
    seen = runs.last_step("run")
    code, output, _ = runs.finish(process)
    assert code == EXIT_PREEMPTED, output
    assert runs.last_step("run") <= seen + 2  # the step being computed, and one that had just ended
    latest = runs.folder / "run" / "checkpoints" / "latest"
    assert latest.resolve().name == f"step_{runs.last_step('run'):06d}" and find_fault(latest) is None
    assert output.count("saved, and left on a signal") == 1
    assert "resumed from" in runs.run("run", f"distributed.backend={backend}", "run.resume=true")
    assert (runs.state("run"), runs.metrics("run")) == undisturbed(backend)


def test_many_signals_to_the_launcher_are_one_and_leave_a_save_whole(runs):
    process = runs.start("run", "train.save_every=1", script=runs.edited(SLOW_STEP))
    runs.wait_for(lambda: runs.last_step("run") >= 2, process)
    aside = runs.folder / "run" / "checkpoints"
    runs.wait_for(lambda: list(aside.glob(".*tmp")), process)  # in the middle of a save
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
    code, output, _ = runs.finish(process)
    assert code == EXIT_PREEMPTED, output
    assert [find_fault(path) for path in aside.glob("step_*")] == [None, None] and not list(aside.glob(".*tmp"))


def test_a_signal_during_set_up_waits_for_the_first_step(runs):
    process = runs.start("run", ranks=1)
    runs.wait_for((runs.folder / "run" / "run.toml").exists, process)
    process.send_signal(signal.SIGTERM)
    code, output, _ = runs.finish(process)
    assert code == EXIT_PREEMPTED and "step 1: saved, and left on a signal" in output


FAILURES = {
    "raises": ('raise ValueError("ink")', 1, "train: rank 1: ValueError: ink"),
    "is-refused": ('raise UserError("paper: no such thing")', 2, "train: paper: no such thing"),
    "is-killed": ("os.kill(os.getpid(), 9)", 1, "train: rank 0: another rank is gone ("),
    "has-no-number": (
        "model.decoder.register_forward_hook(lambda module, given, out: out * math.nan)",
        1,
        "train: step 3, rank 1: the output of decoder is not finite; examples fictional-",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_one_rank_fails_and_all_end_with_its_reason_on_top(runs, failure):
    code, exit_code, line = FAILURES[failure]
    process = runs.start("run", script=runs.edited(f"if me.rank == 1 and step == 3:\n    {code}"))
    runs.wait_for(lambda: runs.last_step("run") >= 2, process)
    ended, output, seconds = runs.finish(process, 30)
    assert ended == exit_code and seconds < 30
    told = [text for text in output.splitlines() if text.startswith("train: ")]
    # A rank that is killed says nothing; what the other says then may be cut short by torchrun.
    assert (len(told) == 1 and told[0].startswith(line)) or (failure == "is-killed" and not told), output
    assert output.count("Traceback") == (failure == "raises")
    assert ("launch: rank 1 was killed by SIGKILL" in output) == (failure == "is-killed")


@pytest.mark.parametrize(
    "how",
    [
        pytest.param('raise ValueError("ink")', id="raises", marks=pytest.mark.slow),
        pytest.param("os.kill(os.getpid(), 9)", id="is-killed"),
    ],
)
def test_a_rank_too_busy_to_notice_ends_too(runs, how):
    busy = f"if step == 3:\n    import time\n    if me.rank == 1:\n        {how}\n    time.sleep(600)"
    process = runs.start("run", script=runs.edited(busy))
    runs.wait_for(lambda: runs.last_step("run") >= 2, process)
    ended, output, seconds = runs.finish(process, 30)
    assert ended == 1 and seconds < 15, output


def test_plain_torchrun_names_the_same_rank(runs):
    script = runs.edited('if me.rank == 1 and step == 3:\n    raise ValueError("ink")')
    code, output, _ = runs.finish(runs.start("run", script=script, launcher="torch.distributed.run"))
    assert code == 1
    first = next(line for line in output.splitlines() if "Error" in line)
    assert first == "train: rank 1: ValueError: ink"
    root_cause = output.partition("Root Cause")[2]
    assert "rank      : 1" in root_cause and "ValueError: ink" in root_cause


def test_what_all_ranks_are_refused_for_is_said_once(runs):
    code, output, _ = runs.finish(runs.start("run", "data.train=absent.json"))
    assert code == 2
    assert [line for line in output.splitlines() if "absent" in line] == ["train: absent.json: no such data file"]


@pytest.mark.slow
def test_a_rank_without_its_torchrun_saves_and_leaves(runs):
    process = runs.start("run", script=runs.edited(SLOW_STEP), launcher="torch.distributed.run")
    runs.wait_for(lambda: runs.last_step("run") >= 1, process)
    ranks = runs.ranks(process)
    process.kill()
    process.communicate(timeout=60)  # the ranks hold the pipe until they end
    assert all(not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE for rank in ranks)
    assert find_fault(runs.folder / "run" / "checkpoints" / "latest") is None


def test_uneven_data_trains_to_the_end_as_on_one_rank(runs):
    settings = ["batch.tokens=170", "batch.accumulation=3", "train.steps=4"]  # fewer examples than micro-batches
    runs.run("two", *settings)
    runs.run("one", *settings, ranks=1)
    losses = [[line["loss"] for line in runs.metrics(name) if "loss" in line] for name in ("two", "one")]
    assert max(line.get("examples", 0) for line in runs.metrics("two")) < 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
