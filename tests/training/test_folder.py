"""A run's folder belongs to one run at a time, and to one run at all."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from babl.distributed.env import World
from babl.errors import UserError
from babl.training import folder as module
from babl.training.folder import refuse_existing, sole_writer

ALONE = World(0, 1, torch.device("cpu"))
HOLD = """
import sys, time, torch
from pathlib import Path
from babl.distributed.env import World
from babl.training.folder import sole_writer
with sole_writer(Path(sys.argv[1]), World(0, 1, torch.device("cpu"))):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes into the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_told_who_is_there_and_a_killed_one_is_no_longer(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    with pytest.raises(UserError) as error, sole_writer(tmp_path, ALONE):
        pass
    who = rf"host {re.escape(socket.gethostname())}, pid {holder.pid}, since {time.strftime('%Y-')}\d\d-\d\d \d\d:\d\d:"
    assert re.search(rf"^{re.escape(str(tmp_path))}: another run writes there \({who}", str(error.value))
    assert "\n" not in str(error.value)
    with sole_writer(tmp_path, World(1, 2, torch.device("cpu"))):
        pass  # rank 0 asks for all
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".owner").read_text().split()[3] == f"{holder.pid},"
    with sole_writer(tmp_path, ALONE):
        assert f"pid {os.getpid()}," in (tmp_path / ".owner").read_text()
    assert not (tmp_path / ".owner").exists()


def test_on_a_file_system_without_flock_a_file_stands_for_it(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    with pytest.warns(UserWarning, match="flock not supported"):
        with (
            sole_writer(tmp_path, ALONE),
            pytest.raises(UserError, match=rf"pid {os.getpid()}"),
            sole_writer(tmp_path, ALONE),
        ):
            pass
        with sole_writer(tmp_path, ALONE):
            pass


def test_a_run_ended_a_moment_ago_is_waited_for(holder, tmp_path):
    threading.Timer(0.5, holder.kill).start()
    with sole_writer(tmp_path, ALONE):
        pass


@pytest.mark.parametrize("left", ["run.toml", "metrics.jsonl", "checkpoints/step_000001/x", "checkpoints/latest/x"])
def test_whatever_is_left_of_a_run_is_not_written_over(tmp_path, left):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".lock").touch()
    refuse_existing(tmp_path)  # what a start leaves that was refused
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).touch()
    with pytest.raises(
        UserError, match=rf"a run is there already \({left.partition('/')[0]}\); go on with run\.resume"
    ):
        refuse_existing(tmp_path)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_starts_of_the_loop_and_the_second_ends_in_a_line(runs, ranks):
    first = runs.start("run", "train.steps=100000", "train.save_every=0", "train.validate_every=0", ranks=1)
    runs.wait_for(lambda: runs.last_step("run") > 1, first)
    before = (runs.folder / "run" / "run.toml").read_bytes()
    code, output, _ = runs.finish(runs.start("run", "optim.lr=1", "run.resume=true", ranks=ranks))
    assert code == 2 and f"another run writes there (host {socket.gethostname()}, pid {first.pid}, since" in output
    assert len([line for line in output.splitlines() if line.startswith("train: ")]) == 1
    assert (runs.folder / "run" / "run.toml").read_bytes() == before and first.poll() is None
