import os
import re
import subprocess

import pytest

from babl.training.checkpoint import newest_whole
from babl.training.optimizer import OptimConfig, state_bytes


@pytest.mark.parametrize("backend", ["ddp", "fsdp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_it_changes_nothing(runs, undisturbed, backend):
    output = runs.run("run", "train.preflight=false", f"distributed.backend={backend}")
    assert "preflight" not in output
    assert (runs.state("run"), runs.metrics("run")) == undisturbed(backend)


def test_it_says_what_fits(runs):
    output = runs.run("run", "train.steps=2", "optim.name=adafactor", ranks=1)
    assert re.search(r"preflight: the longest batch \(\d+ x \d+\) fits; [\d,]+ MiB", output)
    assert re.search(
        r"preflight: a checkpoint was written and read; 1 x \d MiB for checkpoints, [\d,]+ MiB free", output
    )
    assert not (runs.folder / "run" / ".preflight").exists()
    again = runs.run("run", "train.steps=3", "optim.name=adafactor", "run.resume=true", ranks=1)
    assert "the longest batch" in again and "a checkpoint was written" not in again


def test_the_state_foreseen_is_the_state_saved(undisturbed_run):
    checkpoint = undisturbed_run("ddp") / "checkpoints" / "latest"
    weights, optimizer = (sum(p.stat().st_size for p in checkpoint.glob(f"{n}*.safetensors")) for n in ("model", "opt"))
    assert optimizer == pytest.approx(state_bytes(OptimConfig(), weights), rel=0.1)


@pytest.fixture
def small_disk(runs):
    """One mebibyte for all that a run writes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = runs.folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    runs.folder = disk
    yield disk
    runs.end()
    subprocess.run(["umount", disk], check=True)


def test_too_small_a_disk_is_refused_before_the_first_step(runs, small_disk):
    code, output, _ = runs.finish(runs.start("run", "train.keep_last=0", "train.save_every=1", "train.steps=50"))
    assert code == 2
    line = next(line for line in output.splitlines() if line.startswith("train: "))
    assert re.search(r"run.dir: \S+ needs 50 x \d MiB for checkpoints, \d MiB free; train.keep_last", line)
    assert not (small_disk / "run" / "metrics.jsonl").exists() and not (small_disk / "run" / ".preflight").exists()


def test_a_disk_that_fills_up_ends_in_one_line_and_the_checkpoint_before_is_whole(runs, small_disk):
    fill = "import shutil\n(folder / 'ballast').write_bytes(b'0' * (shutil.disk_usage(folder).free - 20480))"
    script = runs.edited(f"if me.is_main and step == 6:\n    {fill.replace(chr(10), chr(10) + '    ')}")
    code, output, _ = runs.finish(runs.start("run", script=script), 60)
    assert code == 2, output
    told = [line for line in output.splitlines() if line.startswith("train: ")]
    assert len(told) == 1 and "Traceback" not in output
    assert re.search(r"step_000008: cannot be written \(.*No space left on device", told[0])
    checkpoints = small_disk / "run" / "checkpoints"
    assert newest_whole(checkpoints) == (checkpoints / "step_000004", [])
