"""Rows of what was checked, and how they are printed."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

VERDICTS = ("ok", "WRONG", "not run", "note")


@dataclass
class Row:
    """One line of the table.

    Attributes:
        check: What was compared.
        case: Where.
        difference: The largest one found; None where there is nothing to compare with, or no number.
        bound: The largest difference that passes.
        note: Where the largest difference is, what failed, or why the case was not run.
        kind: `compared`; `skipped`, where this machine or the script cannot run the case; or `told`, which judges
            nothing.
    """

    check: str
    case: str
    difference: float | None
    bound: float
    note: str = ""
    kind: str = "compared"

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.kind != "compared":
            return "not run" if self.kind == "skipped" else "note"
        return "ok" if self.difference is not None and self.difference <= self.bound else "WRONG"


@dataclass
class Worst:
    """The largest difference so far relative to its bound, and where it is."""

    bound: float
    value: float = 0.0
    where: str = ""

    def add(self, difference: float, where: str, bound: float | None = None) -> None:
        """Counts one more; one that is not a number is the largest of all.

        Args:
            difference: At least 0.
            where: In words.
            bound: Of this one, where it has a wider one of its own.
        """
        difference = math.inf if math.isnan(difference) else difference
        bound = self.bound if bound is None else bound
        if (_ratio(difference, bound), difference) > (_ratio(self.value, self.bound), self.value):
            self.value, self.bound, self.where = difference, bound, where

    def row(self, check: str, case: str) -> Row:
        """Returns it as a line of the table."""
        return Row(check, case, self.value if math.isfinite(self.value) else None, self.bound, self.where)


def _ratio(difference: float, bound: float) -> float:
    return difference / bound if bound else math.inf if difference else 0.0


def told(check: str, case: str, note: str) -> Row:
    """Returns a row that says something and judges nothing."""
    return Row(check, case, None, 0.0, note, kind="told")


def skipped(check: str, case: str, why: str) -> Row:
    """Returns a row of what was not run."""
    return Row(check, case, None, 0.0, why, kind="skipped")


def failed(check: str, case: str, why: str) -> Row:
    """Returns a row of what went wrong before there was anything to compare."""
    return Row(check, case, None, 0.0, why)


def show(script: str, rows: Sequence[Row], as_json: bool, what: str = "") -> int:
    """Prints the rows and, on stderr, how many there are of each verdict, then `what`; returns the exit code."""
    if as_json:
        print(json.dumps([asdict(row) | {"verdict": row.verdict} for row in rows], indent=2))
    else:
        lines = [("check", "of", "difference", "bound", "", "")]
        lines += [(r.check, r.case, _number(r, r.difference), _number(r, r.bound), r.verdict, _note(r)) for r in rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    count = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    summary = f"{count['ok']} proven, {count['WRONG']} wrong, {count['not run']} not run"
    print(f"verify: {script}: {summary}{what}", file=sys.stderr)
    return 1 if count["WRONG"] else 0


def _number(row: Row, value: float | None) -> str:
    if value is None or row.kind != "compared":
        return "-"
    return f"{value:.1e}" if value else "0"


def _note(row: Row) -> str:
    return "" if row.verdict == "ok" else row.note
