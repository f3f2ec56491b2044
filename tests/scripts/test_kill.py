"""SIGKILL at random moments of one run, started again each time: it ends byte for byte as if nothing had happened."""

import random
import signal
import time

import psutil
import pytest

HARD = [
    "train.async_save=true",
    "train.keep_last=1",
]  # a save is nearly always under way, and there is one to go back to
RUNS = [
    ("ddp", 4, []),
    *(pytest.param(backend, 25, HARD, marks=pytest.mark.slow) for backend in ("ddp", "fsdp", "zero2")),
]


def kill(runs, process, moment, rng):
    """One rank, or all and their launcher, are killed while the run sets up, computes or saves."""
    if moment == "set-up":
        time.sleep(rng.uniform(0.5, 3.5))
    else:
        target = runs.last_step("run") + rng.randrange(3)
        runs.wait_for(lambda: runs.last_step("run") > target, process)
    if moment == "save":
        runs.wait_for(lambda: list((runs.folder / "run" / "checkpoints").glob(".*tmp")), process)
    time.sleep(rng.uniform(0, 0.02))
    launcher = psutil.Process(process.pid)
    launcher.suspend()  # it starts no rank while we look
    ranks = launcher.children()
    everything = not ranks or rng.random() < 0.3
    for victim in [*ranks, launcher] if everything else [rng.choice(ranks)]:
        victim.send_signal(signal.SIGKILL)
    launcher.resume()
    return "everything" if everything else "one rank"


@pytest.mark.parametrize(("backend", "kills", "how"), RUNS)
def test_killed_again_and_again_it_ends_as_if_undisturbed(runs, undisturbed, backend, kills, how):
    rng = random.Random(kills)
    settings = ["train.save_every=1", f"train.steps={6 * kills}", *how]
    moments = ["set-up", *rng.choices(["set-up", "step", "save", "save"], k=kills - 3), "step", "save"]
    for moment in moments:
        process = runs.start("run", f"distributed.backend={backend}", *settings, "run.resume=true")
        victim = kill(runs, process, moment, rng)
        code, output, seconds = runs.finish(process, 30)
        assert code != 0 and seconds < 30, output
        print(f"{victim} killed during {moment}, at step {runs.last_step('run')}")
        log = runs.folder / "run" / "metrics.jsonl"
        if log.exists() and rng.random() < 0.5:
            with log.open("a") as file:
                file.write('{"step": 9, "lo')  # a line that was being written
    runs.run("run", f"distributed.backend={backend}", *settings, "run.resume=true")
    assert (runs.state("run"), runs.metrics("run")) == undisturbed(backend, *settings)
