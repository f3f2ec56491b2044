"""What the runs in a folder have done so far, as their own files tell: a row each, and their curves side by side.

Nothing is loaded and nothing is changed, so a run that is going on may be looked at.
"""

import html
import io
import json
import math
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from babl.errors import UserError
from babl.training import CONFIG, METRICS

State = Literal["running", "done", "stopped"]
PACE_STEPS = 50  # the last ones, whose median time stands for those ahead
SMOOTH = 25  # steps of the thick line's mean


@dataclass(frozen=True)
class RunRow:
    """One run.

    Attributes:
        name: Its folder, relative to the one searched.
        state: `running` where a process holds its lock, `done` after its last step, else `stopped`.
        step: Steps that are logged.
        steps: Of the whole run.
        loss: Of the last step, nats per target token; None before the first.
        best_validation_loss: The lowest; None where none was.
        best_step: Its step.
        seconds_left: For the steps ahead at the pace of the last ones; None where that says nothing.
    """

    name: str
    state: State
    step: int
    steps: int
    loss: float | None
    best_validation_loss: float | None
    best_step: int | None
    seconds_left: float | None


def find_runs(folder: Path) -> list[RunRow]:
    """Returns the runs in a folder and below it, by name.

    Raises:
        UserError: There is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; `babl train` makes runs/")
    found = sorted(path.parent for path in folder.rglob(METRICS) if (path.parent / CONFIG).is_file())
    return [_row(run, str(run.relative_to(folder))) for run in found]


def read_log(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's log; those that cannot be read, such as one just being written, are left out.

    Raises:
        UserError: There is no log.
    """
    try:
        text = (run / METRICS).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{run}: no {METRICS} to be read there ({error.strerror}); name the folder of a run") from None
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _row(run: Path, name: str) -> RunRow:
    rows = read_log(run)
    steps_of = [row for row in rows if "loss" in row]
    validations = [(row["validation_loss"], row["step"]) for row in rows if "validation_loss" in row]
    try:
        steps = tomllib.loads((run / CONFIG).read_text(encoding="utf-8"))["train"]["steps"]
    except (OSError, ValueError, KeyError):
        steps = 0
    step = steps_of[-1]["step"] if steps_of else 0
    state: State = "running" if _is_locked(run) else "done" if steps and step >= steps else "stopped"
    paces = [row["tokens"] / row["tokens_per_second"] for row in steps_of[-PACE_STEPS:] if row.get("tokens_per_second")]
    left = statistics.median(paces) * (steps - step) if paces and steps > step else None
    best, at = min(validations, default=(None, None))
    return RunRow(name, state, step, steps, steps_of[-1]["loss"] if steps_of else None, best, at, left)


def _is_locked(run: Path) -> bool:
    """Returns whether a process holds the run's lock; one that nobody holds is held here for an instant."""
    if not (run / ".lock").exists():
        return False
    try:
        with FileLock(run / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that may only be read
        return False


def plot_runs(runs: Sequence[Path], file: Path) -> None:
    """Writes the curves of runs, side by side, into one HTML file that needs nothing beside it.

    Args:
        runs: Folders of runs.
        file: Written; replaced where it is.

    Raises:
        UserError: A folder is not a run's, or the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    logs = [(str(run), read_log(run)) for run in runs]
    panels = (
        ("loss", "training loss, nats per target token"),
        ("validation_loss", "validation loss, nats per target token"),
        ("lr", "learning rate"),
        ("grad_norm", "norm of the gradient, before clipping"),
        ("tokens_per_second", "tokens a second"),
    )
    drawn = []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "babl", "axes.spines.top": False}):
        for key, title in panels:
            figure = Figure(figsize=(7.2, 2.8), layout="constrained")
            axes = figure.subplots()
            for i, (name, rows) in enumerate(logs):
                points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
                points = [(step, value) for step, value in points if math.isfinite(value)]
                if not points:
                    continue
                steps, values = zip(*points, strict=True)
                colour = f"C{i % 10}"
                if key == "validation_loss":
                    axes.plot(steps, values, color=colour, marker="o", label=name)
                else:  # thin: each step; thick: the mean of the last ones
                    axes.plot(steps, values, color=colour, linewidth=0.4, alpha=0.5)
                    axes.plot(steps, _smoothed(values), color=colour, linewidth=2, label=name)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("step")
            axes.spines["right"].set_visible(False)
            if axes.lines:
                axes.legend(frameon=False, fontsize=8)
                stream = io.StringIO()
                figure.savefig(stream, format="svg", metadata={"Date": None})
                drawn.append(stream.getvalue()[stream.getvalue().index("<svg") :])
    names = ", ".join(html.escape(name) for name, _ in logs)
    page = f"<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<title>{names}</title>\n<h1>Runs</h1>\n"
    style = "<style>body { font: 16px sans-serif; max-width: 50rem; margin: 2rem auto } svg { width: 100% }</style>\n"
    try:
        file.write_text(page + style + "\n".join(drawn), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {file} cannot be written ({error.strerror})") from None


def _smoothed(values: Sequence[float]) -> list[float]:
    """Returns the mean of each value and those before it, `SMOOTH` at most."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    firsts = [max(0, i + 1 - SMOOTH) for i in range(len(values))]
    return [(sums[i + 1] - sums[first]) / (i + 1 - first) for i, first in enumerate(firsts)]
