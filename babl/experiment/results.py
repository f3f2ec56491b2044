"""A finished or half-finished experiment folder, read into memory and held against the hashes of its plan."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from babl.data.contexts import View, build_views
from babl.data.squad import Example, load_squad, to_squad
from babl.errors import UserError
from babl.evaluation.predictions import read_predictions
from babl.evaluation.runner import asked
from babl.evaluation.squad import QuestionScore, Version, dataset_version, question_scores
from babl.experiment.plan import load_plan
from babl.files import file_hash

State = Literal["planned", "failed", "trained", "scored"]
Metric = Literal["exact", "f1"]
REWRITTEN = "counterfactual"  # the condition whose right answers are not those of the file


@dataclass(frozen=True)
class Outcome:
    """One cell's answers under one condition, in the order of the test questions.

    Attributes:
        predictions: N texts.
        exact: (N,) percent, 0 or 100.
        f1: (N,) percent.
        log_prob: (N,) of the answer, in nats.
        tokens: (N,) written.
        complete: (N,) bool; False where the limit of tokens cut the answer.
        windows: (N,) prompts the context was read through.
        no_answer: (N,) probability that there is none, where it was asked for.
    """

    predictions: list[str]
    exact: np.ndarray
    f1: np.ndarray
    log_prob: np.ndarray
    tokens: np.ndarray
    complete: np.ndarray
    windows: np.ndarray
    no_answer: np.ndarray | None

    @property
    def empty(self) -> np.ndarray:
        """(N,) bool; True where nothing was answered."""
        return np.array([not text for text in self.predictions])


@dataclass(frozen=True)
class Cell:
    """One model trained in one arm from one seed, and what came of it.

    Attributes:
        id: Its folder's name.
        model: Name.
        arm: It was trained in.
        seed: Of training.
        trained: trained.json; None where it is not trained yet.
        outcomes: By condition; empty where it is not scored yet, or failed.
        seconds: By stage, on the clock.
    """

    id: str
    model: str
    arm: str
    seed: int
    trained: dict[str, Any] | None
    outcomes: dict[str, Outcome]
    seconds: dict[str, float]

    @property
    def failed(self) -> str | None:
        """Why training counts as failed, by the plan's rule."""
        return self.trained["failed"] if self.trained else None

    @property
    def state(self) -> State:
        """How far it is."""
        if self.trained is None:
            return "planned"
        if self.failed:
            return "failed"
        return "scored" if self.outcomes else "trained"


@dataclass(frozen=True, eq=False)
class Results:
    """What an experiment's folder holds.

    Attributes:
        plan: plan.json.
        train: Questions trained on.
        test: N questions tested on.
        overlap: Contamination, as `babl.data.overlap` sums it up.
        classes: Threshold -> question id -> overlap class.
        cells: All that the plan names, by model, arm and seed.
        trials: Of the grid: what the plan says of each, why it failed, and its validation scores once it has them.
        strangers: Names of folders under cells/ that the plan does not name; they are not read.
    """

    plan: dict[str, Any]
    train: list[Example]
    test: list[Example]
    overlap: dict[str, Any]
    classes: dict[str, dict[str, str]]
    cells: list[Cell]
    trials: list[dict[str, Any]]
    strangers: list[str]
    _views: dict[str, list[View]] = field(default_factory=dict)

    @cached_property
    def titles(self) -> Any:
        """(N,) str, the article of each test question; an array, which the statistics take for a sequence."""
        return np.array([example.title for example in self.test])

    def views(self, condition: str) -> list[View]:
        """Returns the N views of a condition, made anew from the data: they are not stored."""
        if condition not in self._views:
            self._views[condition] = rebuild_views(self.test, condition, self.plan["data"]["context_seed"])
        return self._views[condition]

    def done(self, model: str, arm: str, condition: str) -> dict[int, Outcome]:
        """Returns the outcomes by seed, in the order of the seeds."""
        found = {
            c.seed: c.outcomes[condition]
            for c in self.cells
            if (c.model, c.arm) == (model, arm) and condition in c.outcomes
        }
        return dict(sorted(found.items()))


def rebuild_views(test: Sequence[Example], condition: str, seed: int) -> list[View]:
    """Returns a condition's view of every test question.

    Raises:
        UserError: One cannot be built; the plan should have left the question out of every arm.
    """
    views, missing = build_views(test, condition, seed)  # type: ignore[arg-type]
    if missing:
        qid, reason = min(missing.items())
        raise UserError(f"data/test.json: question {qid} has no {condition} context ({reason}), but is in the plan")
    return views


def read_results(folder: Path) -> Results:
    """Returns what the folder of an experiment holds, whatever part of it is done.

    `plan["data"]["sha256"]` names each file of data/ and its hash; scored.json names those of the predictions.

    Raises:
        UserError: A file is missing or not as it was written: its hash, or a score made anew, is another.
    """
    plan = load_plan(folder).tree
    for name, expected in sorted(plan["data"]["sha256"].items()):
        _check(folder / "data" / name, expected, "the plan")
    test = load_squad(folder / "data" / "test.json")
    scorer = _Scorer(test, plan["data"]["context_seed"])
    order = {name: i for i, name in enumerate([*plan["models"], *plan["arms"]])}
    named = sorted(plan["cells"], key=lambda cell: (order[cell["model"]], order[cell["arm"]], cell["seed"]))
    there = {path.name for path in (folder / "cells").iterdir()} if (folder / "cells").is_dir() else set()
    return Results(
        plan=plan,
        train=load_squad(folder / "data" / "train.json"),
        test=test,
        overlap=_json(folder / "data" / "overlap.json"),
        classes=_json(folder / "data" / "classes.json"),
        cells=[_cell(folder / "cells" / cell["id"], cell, scorer) for cell in named],
        trials=[_trial(folder / "cells" / trial["id"], trial) for trial in plan["trials"]],
        strangers=sorted(there - {cell["id"] for cell in [*named, *plan["trials"]]}),
    )


def _stages(folder: Path) -> list[Any]:
    """Returns what trained.json, scored.json and seconds.json hold, None where a stage is not done."""
    paths = [folder / f"{name}.json" for name in ("trained", "scored", "seconds")]
    return [_json(path) if path.exists() else None for path in paths]


def _trial(folder: Path, named: Mapping[str, Any]) -> dict[str, Any]:
    trained, scored, _ = _stages(folder)
    row = {key: named[key] for key in ("id", "model", "arm", "seed", "settings")}
    for condition, claim in (scored or {}).items():
        _check(folder / "predictions" / f"{condition}.jsonl", claim["predictions"], "scored.json")
        row |= {"exact": claim["exact"], "f1": claim["f1"]}
    return row | {"failed": trained["failed"] if trained else None}


def _cell(folder: Path, named: Mapping[str, Any], scorer: "_Scorer") -> Cell:
    trained, scored, seconds = _stages(folder)
    outcomes = {}
    for condition, claim in sorted((scored or {}).items()) if trained and not trained["failed"] else ():
        path = folder / "predictions" / f"{condition}.jsonl"
        _check(path, claim["predictions"], "scored.json")
        outcomes[condition] = scorer.outcome(path, condition, claim)
    return Cell(named["id"], named["model"], named["arm"], named["seed"], trained, outcomes, seconds or {})


class _Scorer:
    """Scores predictions against what is right under their condition."""

    def __init__(self, test: list[Example], context_seed: int):
        self.test, self.context_seed = test, context_seed
        self.version: Version = dataset_version(to_squad(test))
        self.datasets: dict[bool, dict[str, Any]] = {}  # by whether the answers are rewritten

    def outcome(self, path: Path, condition: str, claim: Mapping[str, Any]) -> Outcome:
        """Returns the answers in a file and their scores, which must be those claimed."""
        rows = {row.id: row for row in read_predictions(path)}
        lost = [e.id for e in self.test if e.id not in rows]
        if lost:
            raise UserError(f"{path}: {len(lost)} of {len(self.test)} questions have no answer, first {lost[0]}")
        scores = self.score({qid: row.prediction for qid, row in rows.items()}, condition)
        exact, f1 = (np.array([100 * getattr(s, key) for s in scores.values()]) for key in ("exact", "f1"))
        for key, values in (("exact", exact), ("f1", f1)):
            if abs(values.mean() - claim[key]) > 1e-6:
                raise UserError(f"{path}: its {key} is {values.mean():.4f}, but scored.json says {claim[key]:.4f}")
        in_order = [rows[qid] for qid in scores]
        columns = ("log_prob", "tokens", "complete", "windows", "no_answer")
        log_prob, tokens, complete, windows, no_answer = ([getattr(row, key) for row in in_order] for key in columns)
        return Outcome(
            predictions=[row.prediction for row in in_order],
            exact=exact,
            f1=f1,
            log_prob=np.array(log_prob),
            tokens=np.array(tokens),
            complete=np.array(complete),
            windows=np.array(windows),
            no_answer=None if None in no_answer else np.array(no_answer),
        )

    def score(self, predictions: Mapping[str, str], condition: str) -> dict[str, QuestionScore]:
        """Returns the scores by question id, in the order of the test questions."""
        rewritten = condition == REWRITTEN
        if rewritten not in self.datasets:
            views = rebuild_views(self.test, condition, self.context_seed) if rewritten else []
            self.datasets[rewritten] = asked(self.test, views) if rewritten else to_squad(self.test)
        scores = question_scores(self.datasets[rewritten], predictions, self.version)
        return {example.id: scores[example.id] for example in self.test}


def _check(path: Path, expected: str, source: str) -> None:
    try:
        found = file_hash(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though {source} names it") from None
    if found != expected:
        raise UserError(f"{path}: its hash is {found[:12]}, but {source} says {expected[:12]}")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this an experiment's folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
