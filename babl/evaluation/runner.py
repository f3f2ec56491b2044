"""A model's answers to a data set, and their scores."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from babl.data.contexts import TestArm, View, see
from babl.data.squad import Answer, Example, to_squad
from babl.errors import UserError
from babl.evaluation.predictions import Asking, Prediction, answer_key, predict, predict_into
from babl.evaluation.squad import question_scores, score
from babl.evaluation.statistics import cluster_bootstrap
from babl.generation import Engine
from babl.text import Tokenizer
from babl.text.normalize import normalize_answer


@dataclass
class Evaluation:
    """What a model answered and how good it is.

    Attributes:
        predictions: Question id -> answer after `clean_answer`.
        metrics: Official keys in percent, and what the run lost or cut.
    """

    predictions: dict[str, str]
    metrics: dict[str, Any]

    def save(self, folder: Path) -> None:
        """The folder holds predictions.json and metrics.json."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in asdict(self).items():
            text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")


def evaluate(
    engine: Engine,
    examples: list[Example],
    arm: TestArm,
    asking: Asking,
    context_seed: int = 0,
    model: Path | None = None,
    out: Path | None = None,
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

    Raises:
        UserError: The arm cannot be built for any question.
    """
    views, missing = see(examples, arm, context_seed)
    if not views:
        raise UserError(
            f"--context {arm} can be built for none of {len(examples)} questions: {missing[examples[0].id]}"
        )
    if model and out:
        key = answer_key(engine, model, views, asking)
        predictions = predict_into(out / f"predictions-{arm}.jsonl", engine, views, asking, key)
    else:
        predictions = predict(engine, views, asking)
    metrics = summarize(asked(examples, views), predictions)
    metrics |= {
        "attainable_exact": attainable_exact(engine.tokenizer, examples),
        "context": arm,
        "not_built": len(missing),
    }
    return Evaluation({p.id: p.prediction for p in predictions}, metrics)


def asked(examples: Sequence[Example], views: Sequence[View]) -> dict[str, Any]:
    """Returns the data set that the views ask, with the answers that are right for them, as a parsed SQuAD file."""
    golds = {view.id: view.golds for view in views}
    return to_squad(
        [replace(e, answers=tuple(Answer(text, 0) for text in golds[e.id])) for e in examples if e.id in golds]
    )


def summarize(data: dict[str, Any], predictions: list[Prediction]) -> dict[str, Any]:
    """Returns the official metrics in percent, an interval, and what was windowed, empty or cut off."""
    answers = {p.id: p.prediction for p in predictions}
    scores = question_scores(data, answers)
    titles = [s.title for s in scores.values()]
    exact = np.array([100 * s.exact for s in scores.values()])
    metrics = score(data, answers) | {
        "exact_interval": cluster_bootstrap(exact, titles),
        "articles": len(set(titles)),
        "windowed": sum(p.windows > 1 for p in predictions),
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

    A gold that does not survive encoding and decoding (T5's normalises "½", for instance) cannot be written.
    """
    reachable = [
        e.impossible
        or any(
            normalize_answer(tokenizer.decode(tokenizer.encode(a.text))) == normalize_answer(a.text) for a in e.answers
        )
        for e in examples
    ]
    return 100 * sum(reachable) / len(reachable)
