"""A model's answers to a data set, and their scores."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from babl.data.contexts import TestArm, View, build_views
from babl.data.squad import Answer, Example, to_squad
from babl.errors import UserError
from babl.evaluation.predictions import (
    Prediction,
    PromptLimits,
    answer_key,
    key_of,
    predict,
    predict_into,
    refuse_overlong,
)
from babl.evaluation.squad import question_scores, score
from babl.evaluation.statistics import estimate_score
from babl.files import write_whole
from babl.generation import Engine
from babl.text import Tokenizer
from babl.text.normalize import normalize_answer
from babl.text.prompts import clean_answer

DIGITS = 2  # after the point, of the percentages that are not official ones


@dataclass
class Evaluation:
    """What a model answered and how good it is.

    Attributes:
        predictions: Question id -> answer after `clean_answer`.
        metrics: Official keys in percent, and what the run lost or cut.
        questions: What was asked and is right, as a parsed SQuAD file; scores the predictions, whatever the arm.
        na_prob: Question id -> probability that it has no answer, where that was asked for.
    """

    predictions: dict[str, str]
    metrics: dict[str, Any]
    questions: dict[str, Any]
    na_prob: dict[str, float] | None = None

    def save(self, folder: Path) -> None:
        """The folder holds predictions.json, metrics.json, questions.json and, where it was asked for, na_prob.json."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: getattr(self, name) for name in ("predictions", "metrics", "questions", "na_prob")}
        for name, value in files.items():
            if value is not None:
                write_whole(folder / f"{name}.json", json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def evaluate(
    engine: Engine,
    examples: list[Example],
    arm: TestArm,
    limits: PromptLimits,
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
        limits: How prompts are cut and answers ended.
        context_seed: Of the arm's draws.
        model: The engine's folder.
        out: A folder that keeps each answer as it comes, so that a killed evaluation goes on; with `model` alone.
        overlong: Whether a question that is too long to be asked counts as answered with nothing, or is an error.

    Raises:
        UserError: The arm cannot be built for any question, one is too long and that is an error, or the folder has
            answers of another evaluation.
    """
    views, missing = build_views(examples, arm, context_seed)
    if not views:
        raise UserError(
            f"--context {arm} can be built for none of {len(examples)} questions: {missing[examples[0].id]}"
        )
    if overlong == "error":
        refuse_overlong(engine, views, limits)
    if model and out:
        key, path = answer_key(engine, model, views, limits), out / f"predictions-{arm}.jsonl"
        _check_own(out, path, key)
        predictions = predict_into(path, engine, views, limits, key)
    else:
        predictions = predict(engine, views, limits)
    questions = asked(examples, views)
    metrics = summarize(questions, predictions)
    metrics |= {
        "attainable_exact": attainable_exact(engine.tokenizer, views),
        "context": arm,
        "not_built": len(missing),
    }
    return Evaluation({p.id: p.prediction for p in predictions}, metrics, questions, na_probabilities(predictions))


def _check_own(folder: Path, path: Path, key: str) -> None:
    """The folder has nothing of an evaluation whose answers are not those of this file and key."""
    written = ("predictions*.json*", "metrics.json", "questions.json", "na_prob.json")
    others = [other for pattern in written for other in folder.glob(pattern)]
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
    """Returns the data set that the views ask, as a parsed SQuAD file.

    A question whose answer the arm rewrites stands with the rewritten context and answer, any other as it is.
    """
    of = {view.id: view for view in views}
    return to_squad([_as_asked(example, of[example.id]) for example in examples if example.id in of])


def _as_asked(example: Example, view: View) -> Example:
    if view.golds == tuple(answer.text for answer in example.answers):
        return example
    assert view.context is not None and view.at is not None  # an arm that rewrites answers shows them
    return replace(example, context=view.context, answers=tuple(Answer(text, view.at) for text in view.golds))


def summarize(data: dict[str, Any], predictions: list[Prediction]) -> dict[str, Any]:
    """Returns the official metrics in percent, an interval, and what was windowed, too long, empty or cut off.

    With probabilities that there is no answer, best_* and the average precisions are among them.
    exact_interval: Of exact match, 95 %, for this trained model on new articles (`Estimate.score_interval`); None, and
        the reason under no_interval, where articles, or right or wrong answers, are too few, or articles do not differ.
    """
    answers = {p.id: p.prediction for p in predictions}
    scores = question_scores(data, answers)
    titles = [s.title for s in scores.values()]
    exact = np.array([100 * s.exact for s in scores.values()])
    sure = estimate_score(exact[None], titles)
    interval = sure.score_interval()
    metrics = score(data, answers, na_probabilities(predictions)) | {
        "exact_interval": interval and tuple(round(end, DIGITS) for end in interval),
        **({"no_interval": sure.unknown} if sure.unknown else {}),
        "articles": len(set(titles)),
        "windowed": sum(p.windows > 1 for p in predictions),
        "overlong": sum(p.windows == 0 for p in predictions),
        "empty": sum(not p.prediction for p in predictions),
        "cut_off": sum(not p.complete for p in predictions),
    }
    grades = sorted({s.grade for s in scores.values()} - {""})
    if grades:
        metrics["grades"] = {
            grade: round(100 * float(np.mean([s.exact for s in scores.values() if s.grade == grade])), DIGITS)
            for grade in grades
        }
    return metrics


def longest_prompt(engine: Engine, max_new_tokens: int) -> int:
    """Returns how many tokens of a question and its context are read at once: 512, or what the model has room for."""
    return min(512, engine.prompt_limit(max_new_tokens) or 512)


def attainable_exact(tokenizer: Tokenizer, views: Sequence[View]) -> float:
    """Returns the exact match, in percent, of a model that answers every question right, through this tokenizer.

    A gold cannot be scored right if it does not survive encoding and decoding (T5's normalises "½", for instance) or
    `clean_answer` (which ends at a line break, and takes "unanswerable" for no answer).
    """

    def written(gold: str) -> str:
        return clean_answer(tokenizer.decode(tokenizer.encode(gold)))

    reachable = [
        not view.golds or any(normalize_answer(written(gold)) == normalize_answer(gold) for gold in view.golds)
        for view in views
    ]
    return round(100 * sum(reachable) / len(reachable), DIGITS)
