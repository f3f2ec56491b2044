"""metrics.jsonl: a line a step, and on request the same numbers for TensorBoard."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from babl.errors import UserError

CLOCK_FIELDS = ("tokens_per_second", "peak_memory_bytes")  # all that may differ between two runs of the same thing


class MetricsLog:
    """Appends to a run's metrics.jsonl; a resumed run forgets what was logged after its checkpoint.

    A step is logged, then saved, then validated: the validation of the step that is resumed from is done again.
    """

    def __init__(self, folder: Path, last_step: int, tensorboard: bool):
        path = folder / "metrics.jsonl"
        kept = []
        if path.exists():
            # A line cut short by a crash is after the checkpoint, like all that follows the step resumed from.
            lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if _logged_before(json.loads(line), last_step)]
        aside = folder / ".metrics.tmp"
        aside.write_text("".join(kept), encoding="utf-8")
        aside.rename(path)
        self.file = path.open("a", encoding="utf-8")
        self.board = _summary_writer(folder) if tensorboard else None
        self.start_clock()

    def write(self, step: int, tokens: int = 0, **values: Any) -> None:
        """The step's values are on disk; `tokens`, where given, also as a rate since `start_clock`."""
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
        if self.board is not None:
            for name, value in line.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)

    def start_clock(self) -> None:
        """The next line's rate counts from now, so that validating and saving count for none."""
        self.clock = time.perf_counter()

    def close(self) -> None:
        """Everything is written."""
        self.file.close()
        if self.board is not None:
            self.board.close()


def peak_memory() -> int:
    """Returns the most bytes this process has held: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _logged_before(line: dict[str, Any], last_step: int) -> bool:
    return line["step"] < last_step or (line["step"] == last_step and "loss" in line)


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "train.tensorboard is true, but tensorboard is not installed: pip install tensorboard"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))
