"""Two prediction files on the same questions, question by question."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from babl.data.squad import Example, to_squad
from babl.errors import UserError
from babl.evaluation.squad import dataset_version, question_scores, score
from babl.evaluation.statistics import estimate, mcnemar, randomisation_test

_EXAMPLES = 3  # questions shown of each side


@dataclass(frozen=True)
class Side:
    """One model's answers.

    Attributes:
        name: What errors call them.
        examples: The questions that were asked, and what is right.
        predictions: Question id -> text.
    """

    name: str
    examples: Sequence[Example]
    predictions: Mapping[str, Any]


def compare(a: Side, b: Side, common: bool = False) -> dict[str, Any]:
    """Returns the paired difference B - A in exact match and F1, in percentage points, and how sure it is.

    Interval, standard error and test are about these two models on more articles; how much another seed would change
    either is not in them. Under each metric:
    a, b, difference: Official scores in percent, and B - A.
    interval: 95 %, Student's over articles; None where the articles are too few or do not differ, as the next two, and
        the reason under no_interval.
    standard_error: Clustered by article.
    minimal_detectable_effect: The true difference that data like these find with power .8 at level .05.
    p_randomisation: The two files' labels exchanged article by article.
    p_mcnemar_naive: Exact match alone; takes questions for independent.
    b_better, a_better, equal: Numbers of questions.

    Args:
        a: Answers to every question asked, unless `common`.
        b: Likewise; its questions may have other right answers than A's, where a context was rewritten.
        common: Whether to leave out, and count, what only one side was asked or has answered.

    Raises:
        UserError: A question has no prediction, a prediction no question, or it is no string.
    """
    ids = _questions(a, b, common)
    sides = [Side(s.name, [e for e in s.examples if e.id in ids], {i: s.predictions[i] for i in ids}) for s in (a, b)]
    datasets = [to_squad(side.examples) for side in sides]
    found = [question_scores(data, side.predictions) for data, side in zip(datasets, sides, strict=True)]
    titles = [found[0][qid].title for qid in ids]
    exact = np.array([[100 * of[qid].exact for qid in ids] for of in found])  # (2, N)
    overlap = np.array([[100 * of[qid].f1 for qid in ids] for of in found])
    result: dict[str, Any] = {
        "difference": "B - A",
        "a": a.name,
        "b": b.name,
        "version": dataset_version(datasets[0]),
        "questions": len(titles),
        "left_out": len({e.id for side in (a, b) for e in side.examples}) - len(titles),
        "articles": len(set(titles)),
    }
    official = [score(data, side.predictions) for data, side in zip(datasets, sides, strict=True)]
    for metric, key, both in (("exact", "exact_match", exact), ("f1", "f1", overlap)):
        totals = [of.get(key, of.get(metric)) for of in official]  # version 2.0 says "exact"
        result[metric] = dict(zip(("a", "b"), totals, strict=True)) | _paired(both, titles)
    result["exact"]["p_mcnemar_naive"] = mcnemar(*exact)
    for name, better in (("b_better", exact[1] > exact[0]), ("a_better", exact[0] > exact[1])):
        shown = [list(ids)[i] for i in np.flatnonzero(better)[:_EXAMPLES]]
        result[f"{name}_examples"] = [_shown(qid, *sides) for qid in shown]
    return result


def describe(comparison: Mapping[str, Any]) -> str:
    """Returns what `compare` found as a table of a column per metric, and the questions it shows."""
    metrics = comparison["exact"], comparison["f1"]
    rows: list[tuple[str, ...]] = [("", "EM", "F1")]
    for label, key, form in (
        ("A", "a", _points),
        ("B", "b", _points),
        ("B - A", "difference", _points),
        ("95 % interval, new articles", "interval", _range),
        ("SE, clustered by article", "standard_error", _points),
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
    size += f"; {comparison['left_out']} left out, which not both have" if comparison["left_out"] else ""
    lines = [f"A  {comparison['a']}", f"B  {comparison['b']}", size, ""]
    lines += [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
    reasons = {metric["no_interval"]: None for metric in metrics if "no_interval" in metric}
    lines += [f"-: {reason}" for reason in reasons]
    lines += ["intervals and p are about these two models; another seed may give others"]
    for side, title in (("b_better", "B right, A wrong"), ("a_better", "A right, B wrong")):
        lines += ["", f"{title}:"] if comparison[f"{side}_examples"] else []
        for shown in comparison[f"{side}_examples"]:
            golds = "; ".join(" | ".join(map(_short, of)) or "no answer" for of in _distinct(shown))
            lines += [
                f"  {_short(shown['question'])}",
                f"    gold {golds}, A {_short(shown['a'])}, B {_short(shown['b'])}",
            ]
    return "\n".join(lines)


def _questions(a: Side, b: Side, common: bool) -> dict[str, None]:
    """Returns the ids to compare, in the order of A's questions.

    Raises:
        UserError: A side lacks one, and `common` is not set; or there is none; or a prediction is no answer to any.
    """
    asked = [dict.fromkeys(e.id for e in side.examples) for side in (a, b)]
    both = {i: None for i in asked[0] if i in asked[1] and i in a.predictions and i in b.predictions}
    for side, of in zip((a, b), asked, strict=True):
        unknown = [qid for qid in side.predictions if qid not in of]
        if unknown:
            raise UserError(
                f"{side.name}: {len(unknown)} of {len(side.predictions)} ids are not in the data, first {unknown[0]}"
            )
        absent = [qid for qid in {**asked[0], **asked[1]} if qid not in side.predictions]
        if absent and not common:
            raise UserError(
                f"{side.name}: {len(absent)} of {len({**asked[0], **asked[1]})} questions of the data missing, first "
                f"{absent[0]}; --common compares the {len(both)} that both files have"
            )
        for qid in both:
            if not isinstance(side.predictions[qid], str):
                raise UserError(
                    f"{side.name}: prediction of question {qid} is {side.predictions[qid]!r}, expected a string"
                )
    if not both:
        raise UserError(f"{a.name} and {b.name} have no question in common")
    return both


def _shown(qid: str, a: Side, b: Side) -> dict[str, Any]:
    """Returns a question with what is right and what was said, B's golds where they are others than A's."""
    of_a, of_b = (next(e for e in side.examples if e.id == qid) for side in (a, b))
    golds, golds_b = (sorted({answer.text for answer in of.answers}) for of in (of_a, of_b))
    row = {"id": qid, "question": of_a.question, "golds": golds}
    row |= {"golds_b": golds_b} if golds_b != golds else {}
    return row | {"a": a.predictions[qid], "b": b.predictions[qid]}


def _distinct(shown: Mapping[str, Any]) -> list[list[str]]:
    return [shown[key] for key in ("golds", "golds_b") if key in shown]


def _paired(both: np.ndarray, titles: Sequence[str]) -> dict[str, Any]:
    """Returns how one metric differs; both: (2, N) percent."""
    difference = both[1] - both[0]  # (N,)
    sure = estimate(difference[None], titles)
    return {
        "difference": sure.mean,
        "interval": sure.interval(),
        "standard_error": sure.error,
        "minimal_detectable_effect": sure.detectable,
        **({"no_interval": sure.unknown} if sure.unknown else {}),
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
