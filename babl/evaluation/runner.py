"""A model's answers to a data set, and their scores."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from babl.data.contexts import TestArm, View, see
from babl.data.squad import Answer, Example, to_squad
from babl.errors import UserError
from babl.evaluation.predictions import (
    Asking,
    Prediction,
    answer_key,
    key_of,
    predict,
    predict_into,
    refuse_overlong,
)
from babl.evaluation.squad import question_scores, score
from babl.evaluation.statistics import cluster_bootstrap
from babl.generation import Engine
from babl.text import Tokenizer
from babl.text.normalize import normalize_answer
from babl.text.prompts import clean_answer


@dataclass
class Evaluation:
    """What a model answered and how good it is.

    Attributes:
        predictions: Question id -> answer after `clean_answer`.
        metrics: Official keys in percent, and what the run lost or cut.
        na_prob: Question id -> probability that it has no answer, where that was asked for.
    """

    predictions: dict[str, str]
    metrics: dict[str, Any]
    na_prob: dict[str, float] | None = None

    def save(self, folder: Path) -> None:
        """The folder holds predictions.json, metrics.json and, where it was asked for, na_prob.json."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {"predictions": self.predictions, "metrics": self.metrics, "na_prob": self.na_prob}
        for name, value in files.items():
            if value is not None:
                aside = folder / f"{name}.json.tmp"
                aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                aside.rename(folder / f"{name}.json")


def evaluate(
    engine: Engine,
    examples: list[Example],
    arm: TestArm,
    asking: Asking,
    context_seed: int = 0,
    model: Path | None = None,
    out: Path | None = None,
    overlong: Literal["drop", "error"] = "drop",
) -> Evaluation:
    """Returns the answers of a model and their scores, with a 95 % interval clustered by article.

    Args:
        engine: Answers.
        examples: The questions; those that the arm cannot be built for are left out and counted.
        arm: Which context they see.
        asking: How prompts are cut and answers ended.
        context_seed: Of the arm's draws.
        model: The engine's folder.
        out: A folder that keeps each answer as it comes, so that a killed evaluation goes on; with `model` alone.
        overlong: Whether a question that is too long to be asked counts as answered with nothing, or is an error.

    Raises:
        UserError: The arm cannot be built for any question, one is too long and that is an error, or the folder has
            answers of another evaluation.
    """
    views, missing = see(examples, arm, context_seed)
    if not views:
        raise UserError(
            f"--context {arm} can be built for none of {len(examples)} questions: {missing[examples[0].id]}"
        )
    if overlong == "error":
        refuse_overlong(engine, views, asking)
    if model and out:
        key, path = answer_key(engine, model, views, asking), out / f"predictions-{arm}.jsonl"
        _check_own(out, path, key)
        predictions = predict_into(path, engine, views, asking, key)
    else:
        predictions = predict(engine, views, asking)
    metrics = summarize(asked(examples, views), predictions)
    metrics |= {
        "attainable_exact": attainable_exact(engine.tokenizer, examples),
        "context": arm,
        "not_built": len(missing),
    }
    return Evaluation({p.id: p.prediction for p in predictions}, metrics, na_probabilities(predictions))


def _check_own(folder: Path, path: Path, key: str) -> None:
    """The folder has nothing of an evaluation whose answers are not those of this file and key."""
    others = [*folder.glob("predictions*.json*"), *folder.glob("metrics.json"), *folder.glob("na_prob.json")]
    if others and key_of(path) != key:
        raise UserError(
            f"--out: {folder} has {min(others).name} of another evaluation: another arm, model, data set, setting or "
            "version of Babl; choose another folder, or empty this one"
        )


def na_probabilities(predictions: Sequence[Prediction]) -> dict[str, float] | None:
    """Returns the probability by question id that there is no answer, or None where it was not asked for."""
    found = {p.id: p.no_answer for p in predictions if p.no_answer is not None}
    return found if len(found) == len(predictions) else None


def asked(examples: Sequence[Example], views: Sequence[View]) -> dict[str, Any]:
    """Returns the data set that the views ask, with the answers that are right for them, as a parsed SQuAD file."""
    golds = {view.id: view.golds for view in views}
    return to_squad(
        [replace(e, answers=tuple(Answer(text, 0) for text in golds[e.id])) for e in examples if e.id in golds]
    )


def summarize(data: dict[str, Any], predictions: list[Prediction]) -> dict[str, Any]:
    """Returns the official metrics in percent, an interval, and what was windowed, too long, empty or cut off.

    With probabilities that there is no answer, best_* and the average precisions are among them.
    """
    answers = {p.id: p.prediction for p in predictions}
    scores = question_scores(data, answers)
    titles = [s.title for s in scores.values()]
    exact = np.array([100 * s.exact for s in scores.values()])
    metrics = score(data, answers, na_probabilities(predictions)) | {
        "exact_interval": cluster_bootstrap(exact, titles),
        "articles": len(set(titles)),
        "windowed": sum(p.windows > 1 for p in predictions),
        "overlong": sum(p.windows == 0 for p in predictions),
        "empty": sum(not p.prediction for p in predictions),
        "cut_off": sum(not p.complete for p in predictions),
    }
    grades = sorted({s.grade for s in scores.values()} - {""})
    if grades:
        metrics["grades"] = {
            grade: 100 * float(np.mean([s.exact for s in scores.values() if s.grade == grade])) for grade in grades
        }
    return metrics


def longest_prompt(engine: Engine, max_new_tokens: int) -> int:
    """Returns how many tokens of a question and its context are read at once: 512, or what the model has room for."""
    return min(512, engine.prompt_limit(max_new_tokens) or 512)


def attainable_exact(tokenizer: Tokenizer, examples: list[Example]) -> float:
    """Returns the exact match, in percent, of a model that answers every question right, through this tokenizer.

    A gold that does not survive encoding and decoding (T5's normalises "½", for instance) cannot be written, nor can
    one that `clean_answer` takes for something else: what has a line break in it, or says that there is no answer.
    """

    def writable(gold: str) -> bool:
        return normalize_answer(clean_answer(tokenizer.decode(tokenizer.encode(gold)))) == normalize_answer(gold)

    reachable = [e.impossible or any(writable(answer.text) for answer in e.answers) for e in examples]
    return 100 * sum(reachable) / len(reachable)
