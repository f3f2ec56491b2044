"""metrics.jsonl: a line a step, and on request the same numbers for TensorBoard."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from babl.errors import UserError, not_installed
from babl.files import write_whole

CLOCK_FIELDS = ("tokens_per_second", "peak_memory_bytes")  # all that may differ between two runs of the same thing


class MetricsLog:
    """Appends to a run's metrics.jsonl; a resumed run forgets what was logged after its checkpoint.

    A step is logged, then saved, then validated: the validation of the step that is resumed from is done again.
    """

    def __init__(self, folder: Path, last_step: int, tensorboard: bool, say: Callable[[str], None] = print):
        """Opens the log after the last step.

        Args:
            folder: Of the run.
            last_step: That the run goes on from; 0 at its beginning.
            tensorboard: Whether the numbers are also written for TensorBoard.
            say: Told what of the log is lost.

        Raises:
            UserError: The file cannot be read or written, or TensorBoard is not installed.
        """
        path = folder / "metrics.jsonl"
        if last_step and not path.exists():
            say(f"{path} is missing: it begins with step {last_step + 1}")
        try:
            kept = _cut_back(path, last_step, say)
            self.file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        self.board = _summary_writer(folder, last_step) if tensorboard else None
        for values in kept:
            if values["step"] == last_step:  # TensorBoard forgets whole steps, this one too
                self._show(values)
        self.start_clock()

    def write(self, step: int, tokens: int = 0, **values: Any) -> None:
        """Writes the step's values to disk; `tokens`, where given, also as a rate since `start_clock`."""
        line: dict[str, Any] = {"step": step, **values}
        if tokens:
            line["tokens"] = tokens
            line["tokens_per_second"] = round(tokens / (time.perf_counter() - self.clock), 1)
            line["peak_memory_bytes"] = peak_memory()
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.file.name}: cannot be written ({error.strerror})") from None
        self._show(line)

    def _show(self, line: dict[str, Any]) -> None:
        """Gives TensorBoard the line, where it is asked for."""
        if self.board is not None:
            for name, value in line.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, line["step"])

    def start_clock(self) -> None:
        """Starts the clock of the next line's rate, so that validating and saving do not count."""
        self.clock = time.perf_counter()

    def close(self) -> None:
        """Closes the files, with everything written."""
        self.file.close()
        if self.board is not None:
            self.board.close()


def peak_memory() -> int:
    """Returns the most bytes this process has held: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cut_back(path: Path, last_step: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rewrites the log without damaged lines and those after the last step; returns the values of the others."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    read = [(line, _parse(line)) for line in lines]
    # A crash may cut the last line short, and a file system fill a page with zeros.
    damaged = sum(values is None for _, values in read)
    if damaged:
        say(f"{path}: {damaged} of {len(lines)} lines cannot be read, and are left out")
    kept = [(line, values) for line, values in read if values is not None and _logged_before(values, last_step)]
    write_whole(path, b"".join(line for line, _ in kept))
    return [values for _, values in kept]


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the values of a line, or None where it is not one that was written whole."""
    try:
        values = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    whole = line.endswith(b"\n") and isinstance(values, dict) and type(values.get("step")) is int
    return values if whole else None


def _logged_before(line: dict[str, Any], last_step: int) -> bool:
    return line["step"] < last_step or (line["step"] == last_step and "loss" in line)


def _summary_writer(folder: Path, last_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(f"train.tensorboard is true, but {not_installed('tensorboard')}") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=last_step)
