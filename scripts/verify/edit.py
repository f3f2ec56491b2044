"""What an edited script changes: which lines, and what of all that can be seen from outside."""

import difflib
import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path

from babl.scripts.verify.itself import ROUNDING, differences, state
from babl.scripts.verify.runs import Job, weights
from babl.scripts.verify.table import Row, told

LOOP = Path(__file__).parent.parent / "train.py"


NOTHING = "nothing observable differs"


def is_stock(script: Path) -> bool:
    """Returns whether the script is Babl's own loop, word for word."""
    return script.read_bytes() == LOOP.read_bytes()


def line_rows(script: Path) -> list[Row]:
    """Returns a row for each place where the script's lines are not those of the stock loop."""
    stock, lines = (path.read_text(encoding="utf-8").splitlines() for path in (LOOP, script))
    rows = []
    for kind, at, end, here, until in difflib.SequenceMatcher(None, stock, lines, autojunk=False).get_opcodes():
        if kind != "equal":
            changed = lines[here:until] or stock[at:end]
            first = next((line.strip() for line in changed if line.strip()), "a blank line")
            rows.append(told("edit", f"line {here + 1}", f"+{until - here} -{end - at}: {first[:100]}"))
    return rows


def seen_rows(job: Job, stock: Job) -> list[Row]:
    """Returns what a run of the script left that differs from what the stock loop's left, in the same case."""
    if job.failure or stock.failure:
        return [told("seen", str(job.case), f"nothing can be compared: {job.failure or stock.failure}")]
    last = max(set(job.saved()) & set(stock.saved()))
    here, there = _left(job, last), _left(stock, last)
    rows = []
    for what in here:
        for sign, names in (("+", here[what] - there[what]), ("-", there[what] - here[what])):
            if names:
                rows.append(told("seen", what, f"{sign}{len(names)}: {_few(sorted(names))}"))
    for check, found in differences(stock, job).items():
        apart = {where: value for where, value in found.items() if 0 < value < math.inf}
        if apart:
            most, first = max(apart.values()), next(iter(apart)).rpartition(" ")[2]
            which = list(dict.fromkeys(where.rpartition(", step ")[0] for where in apart))
            size = f"by {most:.1e}" + (", which is rounding" if most < ROUNDING else "")
            rows.append(told("seen", check, f"{len(which)} {size}, from step {first} on: {_few(which)}"))
    return rows or [told("seen", str(job.case), NOTHING)]


def summary(rows: Sequence[Row]) -> str:
    """Returns in a few words what an edit changes; nothing where there is none."""
    places = sum(row.check == "edit" for row in rows)
    seen = [row for row in rows if row.check == "seen"]
    if not seen:
        return ""
    what = f"seen in {', '.join(dict.fromkeys(row.case for row in seen))}"
    if seen[0].note == NOTHING:
        what = f"but {NOTHING}"
    return f"; differs from the stock loop in {places} places, {what}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _left(job: Job, step: int) -> dict[str, set[str]]:
    """Returns the names of all that a run left: of its steps, and of a checkpoint's files, keys and tensors."""
    checkpoint = job.checkpoint(step)
    config = tomllib.loads((checkpoint / "run.toml").read_text(encoding="utf-8"))
    trainer = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
    return {
        "checkpoints of steps": {str(saved) for saved in job.saved()},
        "keys of metrics.jsonl": {key for line in job.metrics() for key in line},
        "files": {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*")},
        "keys of run.toml": {f"{section}.{key}" for section, keys in config.items() for key in keys},
        "keys of trainer.json": set(trainer),
        "tensors": set(weights(checkpoint)) | set(state(checkpoint)),
    }
