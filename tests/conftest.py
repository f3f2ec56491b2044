"""What several tests share."""

import inspect
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional folder of real data, tokenizers and checkpoints beside the project."""
    folder = Path(os.environ.get("BABL_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set BABL_SHARED)")
    return folder


@pytest.fixture(scope="session")
def run_distributed():
    """A function that calls `fn(world, *arguments)`, of a test file, in processes of their own, over gloo.

    It returns what each rank returned, by rank; where one fails, the others are ended, and its error is shown.
    """

    def run(fn, *arguments, world=2, timeout=150):
        with tempfile.TemporaryDirectory() as folder:
            torch.save(arguments, Path(folder) / "arguments.pt")
            worker = [sys.executable, str(ROOT / "tests/distributed/worker.py")]
            command = [*worker, inspect.getsourcefile(fn), fn.__name__, folder]
            ranks, logs = [], [Path(folder) / f"{rank}.log" for rank in range(world)]
            for rank, log in enumerate(logs):
                environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world)}
                if world > 1:  # as torchrun does
                    environment["LOCAL_RANK"] = str(rank)
                with log.open("w") as file:
                    ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
            try:
                deadline = time.monotonic() + timeout
                while any(process.poll() is None for process in ranks):
                    failed = [rank for rank, process in enumerate(ranks) if process.poll()]
                    assert not failed, f"rank {failed[0]}: {logs[failed[0]].read_text()}"
                    assert time.monotonic() < deadline, f"not done in {timeout} s: {logs[0].read_text()}"
                    time.sleep(0.05)
            finally:
                for process in ranks:
                    process.kill()
                    process.wait()
            failed = [rank for rank, process in enumerate(ranks) if process.returncode]
            assert not failed, f"rank {failed[0]}: {logs[failed[0]].read_text()}"
            return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]

    return run
