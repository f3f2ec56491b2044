"""The official SQuAD metrics, versions 1.1 and 2.0, to the last bit.

The two versions differ where texts normalise to nothing (an article, a full stop) and in questions without an answer,
which only 2.0 has. The rules are those of the scripts published with the data sets (evaluate-v1.1.py and
evaluate-v2.0.py), oddities included; those that look like bugs are named where they are.
"""

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from babl.data.squad import Version
from babl.errors import UserError
from babl.evaluation.selective import tie_safe_best
from babl.text.normalize import normalize_answer, without_surrogates

Missing = Literal["error", "zero"]


def exact_match(prediction: str, gold: str) -> float:
    """Returns 1.0 where both normalise to the same text, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def f1(prediction: str, gold: str, version: Version) -> float:
    """Returns the harmonic mean of token precision and recall, in [0, 1].

    Two texts that both normalise to nothing score 0 in version 1.1 and 1 in version 2.0.
    """
    return _f1(normalize_answer(prediction), normalize_answer(gold), version)


def _f1(prediction: str, gold: str, version: Version) -> float:
    """Returns the F1 of normalised texts."""
    if prediction == gold:
        return float(version == "2.0" or gold != "")
    predicted, golden = prediction.split(), gold.split()
    if set(predicted).isdisjoint(golden):
        return 0.0
    same = sum((Counter(predicted) & Counter(golden)).values())
    precision, recall = same / len(predicted), same / len(golden)
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True, slots=True)
class QuestionScore:
    """One question's scores, each in [0, 1], and what they are grouped by."""

    exact: float
    f1: float
    has_answer: bool
    title: str
    grade: str


def question_scores(
    dataset: Mapping[str, Any],
    predictions: Mapping[str, Any],
    version: Version | None = None,
    missing: Missing = "error",
) -> dict[str, QuestionScore]:
    """Returns the scores of every question by id: the best over its gold answers, exact match and F1 apart.

    Args:
        dataset: A parsed SQuAD file; of its questions, ids and gold texts alone are looked at.
        predictions: Question id -> text. More ids than the data set has are ignored.
        version: Whose rules; read off the data set where None.
        missing: `zero` scores a question without a prediction 0.

    Raises:
        UserError: A prediction is missing or no string, or an id stands twice in the data set.
    """
    version = version or dataset_version(dataset)
    scores: dict[str, QuestionScore] = {}
    absent = []
    for title, qa in questions(dataset):
        qid, golds = str(qa["id"]), gold_texts(qa)
        if qid in scores:
            raise UserError(f"question id {qid} stands twice in the data set")
        has_answer = bool(golds)
        normal = {normalize_answer(gold) for gold in golds}
        if version == "2.0":  # golds that normalise to nothing are dropped, and no gold is the gold ""
            normal = normal - {""} or {""}
        elif not golds:
            raise UserError(f"question {qid} has no answer, which version 1.1 does not know; score it as 2.0")
        prediction = predictions.get(qid)
        if prediction is None and qid not in predictions:
            absent.append(qid)
            exact = overlap = 0.0
        elif not isinstance(prediction, str):
            raise UserError(f"prediction of question {qid} is {reprlib.repr(prediction)}, expected a string")
        else:
            predicted = normalize_answer(prediction)
            exact = float(predicted in normal)
            overlap = max(_f1(predicted, gold, version) for gold in normal)
        scores[qid] = QuestionScore(exact, overlap, has_answer, title, str(qa.get("grade", "")))
    if absent and missing == "error":
        first = ", ".join(absent[:3])
        raise UserError(
            f"{len(absent)} of {len(scores)} predictions missing, first {first}; --missing zero scores them 0"
        )
    if not scores:
        raise UserError("the data set has no question")
    return scores


def score(
    dataset: Mapping[str, Any],
    predictions: Mapping[str, Any],
    na_prob: Mapping[str, float] | None = None,
    na_threshold: float = 1.0,
    version: Version | None = None,
    missing: Missing = "error",
) -> dict[str, Any]:
    """Returns the metrics in percent, under the official keys where there is one.

    Version 1.1: exact_match, f1, total. Version 2.0: exact, f1, total, the same for questions with an answer (HasAns_*)
    and without (NoAns_*), and, only where `na_prob` is given, best_* and the average precisions pr_*_ap. Beside the
    official best_*, oracle_best_* are what a threshold can in fact reach (`selective.tie_safe_best`); both are fitted
    on the very questions they are reported on.

    Args:
        dataset: A parsed SQuAD file.
        predictions: Question id -> text.
        na_prob: Question id -> probability that there is no answer.
        na_threshold: A prediction abstains where its probability is above this.
        version: Whose rules; read off the data set where None.
        missing: `zero` scores a question without a prediction 0, and counts it under "missing".

    Raises:
        UserError: As `question_scores`; or `na_prob` lacks a question, or comes with version 1.1, which has no such.
    """
    version = version or dataset_version(dataset)
    if math.isnan(na_threshold):
        raise UserError("the threshold of no answer (--na-threshold) is nan, expected a number")
    if na_prob is not None and version == "1.1":
        raise UserError(
            "no-answer probabilities (--na-prob) are for SQuAD 2.0, but the data is of version 1.1; leave them out, or "
            'let a file that is part of a 2.0 set say "version": "v2.0"'
        )
    scores = question_scores(dataset, predictions, version, missing)
    unanswered = sum(qid not in predictions for qid in scores)
    extra = {"missing": unanswered} if unanswered else {}
    if version == "1.1":
        return {
            "exact_match": _percent([s.exact for s in scores.values()]),
            "f1": _percent([s.f1 for s in scores.values()]),
            "total": len(scores),
        } | extra
    exact = {qid: s.exact for qid, s in scores.items()}
    overlap = {qid: s.f1 for qid, s in scores.items()}
    has_answer = {qid: s.has_answer for qid, s in scores.items()}
    probabilities = _checked_probabilities(na_prob, scores)

    def decided(raw: dict[str, float]) -> dict[str, float]:
        """The scores after abstention, which is right exactly where there is no answer."""
        return {
            qid: float(not has_answer[qid]) if probabilities[qid] > na_threshold else value
            for qid, value in raw.items()
        }

    final_exact, final_overlap = decided(exact), decided(overlap)
    result = _means(final_exact, final_overlap, list(scores))
    for name, wanted in (("HasAns", True), ("NoAns", False)):
        part = [qid for qid in scores if has_answer[qid] == wanted]
        if part:
            part_means = _means(final_exact, final_overlap, part)
            result |= {f"{name}_{key}": value for key, value in part_means.items()}
    if na_prob is not None:
        for name, raw in (("exact", exact), ("f1", overlap)):
            best, threshold = _best_threshold(raw, probabilities, has_answer, predictions)
            result |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
            columns = (np.array([column[qid] for qid in scores]) for column in (raw, probabilities, has_answer))
            best, threshold = tie_safe_best(*columns)
            result |= {f"oracle_best_{name}": 100.0 * best, f"oracle_best_{name}_thresh": threshold}
        if any(has_answer.values()):
            oracle = {qid: float(has) for qid, has in has_answer.items()}
            for name, raw in (("exact", exact), ("f1", overlap), ("oracle", oracle)):
                result[f"pr_{name}_ap"] = _average_precision(raw, probabilities, has_answer)
    return result | extra


def read_by_id(path: str | Path) -> dict[str, Any]:
    """Returns a file of question id -> prediction, or probability, as JSON; what the values are is not looked at.

    Raises:
        UserError: The file cannot be read, or is no object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: malformed JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f'{path}: expected an object {{"question id": answer}}, found {type(value).__name__}')
    return {
        without_surrogates(qid): without_surrogates(found) if isinstance(found, str) else found
        for qid, found in value.items()
    }


def dataset_version(dataset: Mapping[str, Any]) -> Version:
    """Returns 2.0 where the file says so or has a question without an answer, else 1.1."""
    says = "2.0" in str(dataset.get("version", ""))
    return "2.0" if says or any(not gold_texts(qa) for _, qa in questions(dataset)) else "1.1"


def questions(dataset: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields each question with its article's title."""
    for article in dataset["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield article.get("title", ""), qa


def gold_texts(qa: Mapping[str, Any]) -> list[str]:
    """Returns a question's gold answers, none where it has none."""
    answers = qa["answers"]
    return list(answers["text"]) if isinstance(answers, dict) else [answer["text"] for answer in answers]


def _checked_probabilities(na_prob: Mapping[str, float] | None, scores: Mapping[str, Any]) -> dict[str, float]:
    if na_prob is None:
        return dict.fromkeys(scores, 0.0)
    for qid in scores:
        value = na_prob.get(qid)
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise UserError(f"no-answer probability of question {qid} is {reprlib.repr(value)}, expected a number")
    return {qid: na_prob[qid] for qid in scores}


def _percent(values: list[float]) -> float:
    return 100.0 * sum(values) / len(values)


def _means(exact: dict[str, float], overlap: dict[str, float], ids: list[str]) -> dict[str, float]:
    return {
        "exact": _percent([exact[qid] for qid in ids]),
        "f1": _percent([overlap[qid] for qid in ids]),
        "total": len(ids),
    }


def _best_threshold(
    scores: dict[str, float],
    na_prob: dict[str, float],
    has_answer: dict[str, bool],
    predictions: Mapping[str, Any],
) -> tuple[float, float]:
    """Returns the best score over thresholds, in percent, and its threshold.

    As in the official script, questions of equal probability are taken one by one in the data set's order, although no
    threshold can part them, and an answer that normalises to nothing counts against an unanswerable question.
    """
    current = best = float(sum(not has for has in has_answer.values()))  # the score of always abstaining
    threshold = 0.0
    for qid in sorted(scores, key=lambda qid: na_prob[qid]):
        current += scores[qid] if has_answer[qid] else -float(bool(predictions.get(qid)))
        if current > best:
            best, threshold = current, na_prob[qid]
    return 100.0 * best / len(scores), threshold


def _average_precision(scores: dict[str, float], na_prob: dict[str, float], has_answer: dict[str, bool]) -> float:
    """Returns the area under precision over recall, in percent, as questions are answered from the surest on.

    Precision counts every question answered, recall those that have an answer; equal probabilities enter together.
    """
    order = sorted(scores, key=lambda qid: na_prob[qid])
    answerable = sum(has_answer.values())
    true_positives = area = last_recall = 0.0
    for i, qid in enumerate(order):
        if has_answer[qid]:
            true_positives += scores[qid]
        if i + 1 == len(order) or na_prob[qid] != na_prob[order[i + 1]]:
            recall = true_positives / answerable
            area += true_positives / (i + 1) * (recall - last_recall)
            last_recall = recall
    return 100.0 * area
