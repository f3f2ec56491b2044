"""What `watch.py` saw of a script's dropout and order, judged by what is known of coins and of shuffled decks.

Of fair coins the share of heads, and the covariance of any two sequences of them, lie within a few standard deviations
of what theory says, and nothing here needs to know how the coins were made.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from babl.scripts.verify import dropout
from babl.scripts.verify.subject import SEED, Subject
from babl.scripts.verify.table import Row, Worst, failed
from babl.scripts.verify.watch import PROBE_RATE, PROBED

WATCHED = 36  # steps of the run that is watched: six epochs
SIGMAS = 5.5  # of a normal distribution: exceeded by chance once in 26 million comparisons
LAGS = 64


class Mask(NamedTuple):
    """One dropout of one example: `kept` is true where an element stays; `place` counts a step's dropouts."""

    step: int
    example: int
    place: int
    site: int
    p: float
    key: int
    kept: np.ndarray


class Record:
    """Everything that was seen.

    Attributes:
        masks: Of the steps' forwards.
        probe: Masks drawn for chosen seeds, steps and examples, by these three, with their keys.
        steps: The examples of each step, in order.
        dry: Steps whose forwards dropped nothing.
        unlearned: How many dropouts there were in forwards that learn nothing.
        scale: The largest deviation of what is kept from 1 / (1 - p), relative, and of what is done from what is said.
    """

    def __init__(self, path: Path, subject: Subject):
        self.masks: list[Mask] = []
        self.probe: dict[tuple[int, int, int], tuple[int, np.ndarray]] = {}
        self.steps: list[list[int]] = []
        self.dry: list[int] = []
        self.unlearned, self.scale = 0, 0.0
        sources = [np.array(source) for source, _ in subject.train]
        with np.load(path) as file:
            events = json.loads(file["events"].tobytes())
            arrays = {name: file[name] for name in file.files if name != "events"}
        had: list[int] = []
        rows: list[int] = []
        place = 0
        for event in events:
            array = arrays[event["array"]] if "array" in event else np.zeros(0)
            if event["kind"] == "ids":
                found = [_which(row, sources) for row in array]
                if found and None not in found:
                    rows = [each for each in found if each is not None]
                    had += [each for each in rows if each not in had]
            elif event["kind"] == "dropout" and event["learns"]:
                place += 1
                self._add(len(self.steps) + 1, place, rows, event, array)
            elif event["kind"] == "dropout":
                self.unlearned += 1
            elif event["kind"] == "step" and had:
                self.steps.append(had)
                self.dry += [] if place else [len(self.steps)]
                had, place = [], 0
            elif event["kind"] == "probe":
                for example, key, values in zip(PROBED["examples"], event["key"], array, strict=True):
                    self.probe[event["seed"], event["step"], example] = key, values > 0

    def _add(self, step: int, place: int, rows: list[int], event: dict[str, Any], array: np.ndarray) -> None:
        p = event["p"]
        kept = array[array != 0]
        off = float(np.abs(kept * (1 - p) - 1).max()) if kept.size else 1.0
        self.scale = max(self.scale, off, 0.0 if event["applied"] else math.inf)
        for example, key, values in zip(rows, event["key"], array, strict=True):
            self.masks.append(Mask(step, example, place, event["site"], p, key, values != 0))


def _which(row: Any, sources: list[np.ndarray]) -> int | None:
    """Returns the example whose prompt a row of ids begins with."""
    for number, source in enumerate(sources):
        if len(row) >= len(source) and (row[: len(source)] == source).all():
            return number
    return None


def observed_rows(path: Path, subject: Subject, name: str, stock: bool) -> list[Row]:
    """Returns the rows of a watched run.

    Args:
        path: The record.
        subject: What it was run on.
        name: Of the case.
        stock: Whether masks are to be those of the definition, bit for bit, too.
    """
    record = Record(path, subject)
    rows = [_order(record, len(subject.train), name)]
    if not record.masks:
        return [*rows, failed("dropout", name, "no forward that learns went through babl.ops.dropout")]
    scale = Worst(2**-15)
    scale.add(record.scale, "of what is kept")
    on = Row("dropout on", name, float(len(record.dry) + record.unlearned), 0.0)
    on.note = f"{len(record.dry)} steps without, {record.unlearned} in forwards that learn nothing"
    rows += [on, _rates(record).row("dropout rate", name), scale.row("dropout scale", name)]
    rows += [_covariance(kind, sums, name) for kind, sums in _independence(record).items()]
    return [*rows, _defined(record, name)] if stock else rows


def _rates(record: Record) -> Worst:
    """Returns how many standard deviations the share of dropped elements is off, by whatever may sort them."""
    count: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(label: str, dropped: float, number: int, p: float) -> None:
        count[label][0] += dropped - number * p
        count[label][1] += number * p * (1 - p)

    for mask in record.masks:
        gone = ~mask.kept
        labels = (f"dropout {mask.place}", f"step {mask.step}", f"example {mask.example}", "all")
        for label in labels:
            add(label, gone.sum(), gone.size, mask.p)
        for axis, place in ((-1, "column"), (-2, "row")):
            for number, line in enumerate(np.moveaxis(gone, axis, 0)):
                add(f"{place} {number}", line.sum(), line.size, mask.p)
    worst = Worst(SIGMAS)
    for label, (excess, variance) in count.items():
        worst.add(abs(excess) / math.sqrt(variance), f"standard deviations, {label}")
    return worst


Pair = tuple[str, np.ndarray, np.ndarray, float, float]  # a label; two masks, and their rates
Sums = dict[str, tuple[float, float]]  # by label: the sum of what two masks have in common, and its variance


def _independence(record: Record) -> dict[str, Sums]:
    """Returns what masks have in common that must know nothing of each other, by what differs between the two."""
    steps = _sums(_differing(record, "step")) | _probed(record, 1)
    return {
        "places": _sums(_places(record.masks)),
        "sites": _sums(_differing(record, "place")),
        "examples": _probed(record, 2),
        "steps": steps,
        "seeds": _probed(record, 0),
    }


def _sums(pairs: Iterable[Pair]) -> Sums:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for label, one, other, p, q in pairs:
        common = tuple(slice(min(a, b)) for a, b in zip(one.shape, other.shape, strict=True))
        a, b = one[common] - (1 - p), other[common] - (1 - q)
        sums[label][0] += float((a * b).sum())
        sums[label][1] += a.size * p * (1 - p) * q * (1 - q)
    return {label: (covariance, variance) for label, (covariance, variance) in sums.items()}


def _places(masks: Iterable[Mask]) -> Iterator[Pair]:
    for mask in masks:
        flat = mask.kept.reshape(-1, mask.kept.shape[-1])
        line = mask.kept.reshape(-1)
        for lag in range(1, min(LAGS, len(line) - 1) + 1):
            yield f"lag {lag}", line[:-lag], line[lag:], mask.p, mask.p
        if len(flat) > 1:
            yield "rows", flat[:-1], flat[1:], mask.p, mask.p


def _differing(record: Record, field: str) -> Iterator[Pair]:
    """Yields the pairs of one example that differ in the place alone, or in the step alone."""
    groups: dict[tuple, list[Mask]] = defaultdict(list)
    for mask in record.masks:
        shared = mask.step if field == "place" else mask.place
        groups[mask.example, shared, mask.kept.ndim].append(mask)
    for group in groups.values():
        for one, other in combinations(group, 2):
            at, then = getattr(one, field), getattr(other, field)
            label = f"dropouts {at} and {then}" if field == "place" else f"{then - at} steps apart"
            yield label, one.kept, other.kept, one.p, other.p


def _probed(record: Record, axis: int) -> Sums:
    """Returns the same of the probed masks that differ in one of (seed, step, example)."""
    places = [sorted({place[i] for place in record.probe}) for i in range(3)]
    masks = np.array([[[record.probe[s, t, e][1] for e in places[2]] for t in places[1]] for s in places[0]])
    lines = np.moveaxis(masks, axis, 0).reshape(len(places[axis]), -1) - (1 - PROBE_RATE)
    common, variance = lines @ lines.T, lines.shape[1] * (PROBE_RATE * (1 - PROBE_RATE)) ** 2
    what = ("seeds", "steps", "examples")[axis]
    named = list(enumerate(places[axis]))
    return {f"{what} {a} and {b}": (common[i, j], variance) for (i, a), (j, b) in combinations(named, 2)}


def _covariance(kind: str, sums: Sums, name: str) -> Row:
    """Returns how many standard deviations a covariance is away from 0."""
    worst = Worst(SIGMAS)
    for label, (covariance, variance) in sums.items():
        worst.add(abs(covariance) / math.sqrt(variance), f"standard deviations, {label}")
    return worst.row(f"dropout {kind}", name)


def _defined(record: Record, name: str) -> Row:
    """Returns how many keys and masks are not those of the definition."""
    worst, wrong = Worst(0.0), 0
    for mask in record.masks:
        key = dropout.key(SEED, mask.step, mask.example)
        if key != mask.key or (dropout.multipliers(mask.kept.shape, mask.p, key, mask.site) > 0).tolist() != (
            mask.kept.tolist()
        ):
            wrong += 1
            worst.add(wrong, f"masks, the last one of step {mask.step}, example {mask.example}, site {mask.site}")
    for (seed, step, example), (key, _) in record.probe.items():
        if key != dropout.key(seed, step, example):
            wrong += 1
            worst.add(wrong, f"keys, the last one of seed {seed}, step {step}, example {example}")
    return worst.row("dropout defined", name)


def _order(record: Record, examples: int, name: str) -> Row:
    """Returns how many examples an epoch had too often or not at all, and how many epochs were alike."""
    worst, epochs, epoch = Worst(0.0), list[list[list[int]]](), list[list[int]]()
    wrong = 0
    for number, had in enumerate(record.steps, 1):
        seen = {example for step in epoch for example in step}
        if seen & set(had):
            wrong += len(seen & set(had))
            worst.add(wrong, f"examples again before all had their turn, the last in step {number}")
        epoch.append(sorted(had))
        if len(seen | set(had)) == examples:
            epochs.append(epoch)
            epoch = []
    if len(epochs) < 2:
        return failed("order", name, f"{len(record.steps)} steps seen, in which not every example had its turn twice")
    pairs = list(combinations(epochs, 2))
    alike = sum(one == other for one, other in pairs)
    by_chance = _at_most(len(pairs) / math.factorial(min(map(len, epochs))))
    worst.add(float(alike), f"pairs of epochs in the same order, of {len(pairs)}", float(by_chance))
    return worst.row("order", name)


def _at_most(mean: float) -> int:
    """Returns what a Poisson variable of this mean exceeds once in a million times."""
    number, term = 0, math.exp(-mean)
    below = term
    while 1 - below > 1e-6:
        number += 1
        term *= mean / number
        below += term
    return number
