import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from babl.config import load_config
from babl.distributed.ddp import DDP
from babl.errors import UserError
from babl.scripts import train
from babl.training import preflight
from babl.training.checkpoint import newest_whole
from babl.training.loss import token_loss
from babl.training.optimizer import OptimConfig, state_bytes

ROOT = Path(__file__).parent.parent.parent
TINY = "model.shape={d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1, dropout_rate=0.2}"


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


def in_process(folder, *overrides):
    """Runs the loop here, so that a test can put something in its way."""
    settings = [TINY, "model.tokenizer_size=400", "batch.tokens=1500", f"run.dir={folder}", "train.steps=1", *overrides]
    return train.train(load_config(train.TrainConfig, ROOT / "configs" / "debug_cpu.toml", settings))


def test_a_backend_that_writes_other_weights_than_it_computes_with_is_found(tmp_path, monkeypatch):
    save = DDP.save

    def scrambled(self):
        share = save(self)
        share.weights["decoder.final_norm.weight"].mul_(1 + 2**-20)
        return share

    monkeypatch.setattr(DDP, "save", scrambled)
    with pytest.raises(
        UserError, match=r"1 tensors of a checkpoint are not those of the model, first decoder\.final_norm"
    ):
        in_process(tmp_path)
    assert not list(tmp_path.rglob("step_*"))


def test_too_little_memory_is_found_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "token_loss", lambda *_: torch.empty(2**60))
    with pytest.raises(UserError, match=r"out of memory in the longest micro-batch \(\d+ x \d+ tokens\).*accumulation"):
        in_process(tmp_path)


@pytest.mark.parametrize("size", ["batch.tokens=1500", "batch.examples=12"])
def test_validation_takes_no_more_at_a_time_than_training(tmp_path, monkeypatch, size):
    seen = {True: [], False: []}

    def watched(model, batch, *rest):
        seen[model.training].append((batch.padded, torch.is_autocast_enabled("cpu")))
        return token_loss(model, batch, *rest)

    monkeypatch.setattr(train, "token_loss", watched)
    monkeypatch.setattr(preflight, "token_loss", watched)  # which tries the longest of training and of validation first
    in_process(tmp_path, size, "batch.accumulation=4", "train.precision=bf16")
    assert seen[True][0] == max(seen[True]) and len(seen[False]) > 4
    assert max(seen[False]) <= seen[True][0] and max(seen[False]) == seen[False][0]
    assert {autocast for kind in seen.values() for _, autocast in kind} == {True}
