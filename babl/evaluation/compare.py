"""Two prediction files on the same questions, question by question."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from babl.data.squad import Example, to_squad
from babl.errors import UserError
from babl.evaluation.squad import dataset_version, question_scores, score
from babl.evaluation.statistics import (
    cluster_standard_error,
    crossed_interval,
    crossed_standard_error,
    mcnemar,
    minimal_detectable_effect,
    randomisation_test,
)

_EXAMPLES = 3  # questions shown of each side


def compare(
    examples: Sequence[Example],
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    names: tuple[str, str] = ("A", "B"),
) -> dict[str, Any]:
    """Returns the paired difference B - A in exact match and F1, in percentage points, and how sure it is.

    Interval, standard error and test are about these two models on more articles; how much another seed would change
    either is not in them. Under each metric:
    a, b, difference: Official scores in percent, and B - A.
    interval: 95 %, Student's over articles; none where there is one article, as the next two.
    standard_error: Cluster-robust.
    minimal_detectable_effect: The true difference that data like these find with power .8 at level .05.
    p_randomisation: The two files' labels exchanged article by article.
    p_mcnemar_naive: Exact match alone; takes questions for independent.
    b_better, a_better, equal: Numbers of questions.

    Args:
        examples: Every question of the data.
        a: Question id -> text, for exactly these questions.
        b: As `a`.
        names: What errors call the two.

    Raises:
        UserError: A question has no prediction, a prediction no question, or it is no string.
    """
    dataset = to_squad(examples)
    for name, predictions in zip(names, (a, b), strict=True):
        _check(name, predictions, [example.id for example in examples])
    sides = [question_scores(dataset, predictions) for predictions in (a, b)]
    titles = [found.title for found in sides[0].values()]
    exact = np.array([[100 * found.exact for found in side.values()] for side in sides])  # (2, N)
    overlap = np.array([[100 * found.f1 for found in side.values()] for side in sides])
    result: dict[str, Any] = {
        "difference": "B - A",
        "a": names[0],
        "b": names[1],
        "version": dataset_version(dataset),
        "questions": len(titles),
        "articles": len(set(titles)),
    }
    official = [score(dataset, predictions) for predictions in (a, b)]
    for metric, key, both in (("exact", "exact_match", exact), ("f1", "f1", overlap)):
        totals = [found.get(key, found.get(metric)) for found in official]  # version 2.0 says "exact"
        result[metric] = dict(zip(("a", "b"), totals, strict=True)) | _paired(both, titles)
    result["exact"]["p_mcnemar_naive"] = mcnemar(*exact)
    by_id, ids = {example.id: example for example in examples}, list(sides[0])
    for side, found_better in (("b_better", exact[1] > exact[0]), ("a_better", exact[0] > exact[1])):
        shown = [by_id[ids[i]] for i in np.flatnonzero(found_better)[:_EXAMPLES]]
        result[f"{side}_examples"] = [
            {
                "id": example.id,
                "question": example.question,
                "golds": sorted({answer.text for answer in example.answers}),
                "a": a[example.id],
                "b": b[example.id],
            }
            for example in shown
        ]
    return result


def describe(comparison: Mapping[str, Any]) -> str:
    """Returns what `compare` found as a table of a column per metric, and the questions it shows."""
    metrics = comparison["exact"], comparison["f1"]
    rows: list[tuple[str, ...]] = [("", "EM", "F1")]
    for label, key, form in (
        ("A", "a", _points),
        ("B", "b", _points),
        ("B - A", "difference", _points),
        ("95 % interval over articles", "interval", _range),
        ("cluster-robust SE", "standard_error", _points),
        ("detectable with power .8", "minimal_detectable_effect", _points),
        ("p, randomisation by article", "p_randomisation", _p),
        ("p, McNemar (naive)", "p_mcnemar_naive", _p),
        ("questions B answers better", "b_better", str),
        ("questions A answers better", "a_better", str),
        ("questions equal", "equal", str),
    ):
        rows.append((label, *("-" if metric.get(key) is None else form(metric[key]) for metric in metrics)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    size = f"{comparison['questions']} questions of {comparison['articles']} articles, SQuAD {comparison['version']}"
    lines = [f"A  {comparison['a']}", f"B  {comparison['b']}", size, ""]
    lines += [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
    for side, title in (("b_better", "B right, A wrong"), ("a_better", "A right, B wrong")):
        lines += ["", f"{title}:"] if comparison[f"{side}_examples"] else []
        for shown in comparison[f"{side}_examples"]:
            golds = " | ".join(map(_short, shown["golds"])) or "no answer"
            lines += [
                f"  {_short(shown['question'])}",
                f"    gold {golds}, A {_short(shown['a'])}, B {_short(shown['b'])}",
            ]
    return "\n".join(lines)


def _check(name: str, predictions: Mapping[str, Any], ids: Sequence[str]) -> None:
    absent = [qid for qid in ids if qid not in predictions]
    if absent:
        raise UserError(f"{name}: {len(absent)} of {len(ids)} questions of the data missing, first {absent[0]}")
    known = set(ids)
    unknown = [qid for qid in predictions if qid not in known]
    if unknown:
        raise UserError(f"{name}: {len(unknown)} of {len(predictions)} ids are not in the data, first {unknown[0]}")
    for qid, text in predictions.items():
        if not isinstance(text, str):
            raise UserError(f"{name}: prediction of question {qid} is {text!r}, expected a string")


def _paired(both: np.ndarray, titles: Sequence[str]) -> dict[str, Any]:
    """Returns how one metric differs; both: (2, N) percent."""
    difference = both[1] - both[0]  # (N,)
    error, (_, df) = cluster_standard_error(difference, titles), crossed_standard_error(difference[None], titles)
    known = math.isfinite(error)
    return {
        "difference": float(difference.mean()),
        "interval": crossed_interval(difference[None], titles) if known else None,
        "standard_error": error if known else None,
        "minimal_detectable_effect": minimal_detectable_effect(error, df=df) if known else None,
        "p_randomisation": randomisation_test(difference[None], titles),
        "b_better": int((difference > 0).sum()),
        "a_better": int((difference < 0).sum()),
        "equal": int((difference == 0).sum()),
    }


def _points(value: float) -> str:
    return f"{value:.2f}"


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def _p(value: float) -> str:
    return "< .0001" if value < 1e-4 else f"{value:.4f}"


def _short(text: str) -> str:
    return repr(textwrap.shorten(text, 60, placeholder=" ..."))
