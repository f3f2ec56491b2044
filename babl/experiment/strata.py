"""The strata that results are broken down by: declared beforehand, described only, never tested."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from babl.data.fictional import GRADES
from babl.data.kinds import ANSWER_KINDS, QUESTION_KINDS, answer_kind, question_kind
from babl.data.squad import Example
from babl.text.normalize import normalize_answer
from babl.text.segment import sentences

UNANSWERABLE = "no answer"
POSITIONS = ("0", "1", "2", "3+")  # sentence of the context in which the answer stands
ANSWER_WORDS = ("1", "2", "3–4", "5+")

STRATA = (
    "question kind",
    "answer kind",
    "answer words",
    "context words",
    "answer position",
    "lexical overlap",
    "annotators agreeing",
    "grade",
    "overlap class (strict)",
    "overlap class (loose)",
)


def stratify(test: Sequence[Example], classes: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, np.ndarray]]:
    """Returns, for each of `STRATA` that the data allow, the (N,) mask of each value's questions.

    Args:
        test: N questions.
        classes: Threshold (strict, loose) -> question id -> overlap class.
    """
    values: dict[str, tuple[Sequence[str], Sequence[str]]] = {  # values in their order, and that of each question
        "question kind": (QUESTION_KINDS, [question_kind(e.question) for e in test]),
        "answer kind": (ANSWER_KINDS, _of_answer(test, answer_kind)),
        "answer words": (ANSWER_WORDS, _of_answer(test, _answer_words)),
        "context words": _quartiles([len(e.context.split()) for e in test], "words"),
        "answer position": (POSITIONS, [_position(e) for e in test]),
        "lexical overlap": _quartiles([round(100 * lexical_overlap(e)) for e in test], "%"),
    }
    agreeing = [_agreeing(e) for e in test]
    if max(agreeing) > 1:
        values["annotators agreeing"] = ([], [str(min(n, 5)) + ("+" if n >= 5 else "") for n in agreeing])
    if any(e.grade for e in test):
        values["grade"] = (GRADES, [e.grade or "none" for e in test])
    for threshold, of in sorted(classes.items(), reverse=True):
        values[f"overlap class ({threshold})"] = (("question", "answer", "none"), [of[e.id] for e in test])
    return {name: _masks(order, found) for name, (order, found) in values.items()}


def position_label(context: str, at: int) -> str:
    """Returns which sentence of the context the code point is in, of `POSITIONS`."""
    index = sum(start <= at for start, _ in sentences(context)) - 1
    return str(max(index, 0)) if index < 3 else "3+"


def lexical_overlap(example: Example) -> float:
    """Returns the share of the question's different words that the context has too, both normalised, in [0, 1]."""
    asked = set(normalize_answer(example.question).split())
    return len(asked & set(normalize_answer(example.context).split())) / max(len(asked), 1)


def _masks(order: Sequence[str], found: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the mask of each value, those in `order` first; together they hold each question once."""
    array = np.array(found)
    names = [name for name in order if name in found] + sorted(set(found) - set(order))
    masks = {name: array == name for name in names}
    assert sum(mask.sum() for mask in masks.values()) == len(found)
    return masks


def _of_answer(test: Sequence[Example], label: Callable[[str], str]) -> list[str]:
    return [UNANSWERABLE if e.impossible else label(e.answers[0].text) for e in test]


def _answer_words(answer: str) -> str:
    words = len(answer.split())
    return str(words) if words <= 2 else "3–4" if words <= 4 else "5+"


def _position(example: Example) -> str:
    if example.span:
        return position_label(example.context, example.span[0])
    return UNANSWERABLE if example.impossible else "nowhere"


def _agreeing(example: Example) -> int:
    """Returns how many annotators gave the most frequent answer."""
    return max(Counter(normalize_answer(answer.text) for answer in example.answers).values(), default=0)


def _quartiles(numbers: Sequence[int], unit: str) -> tuple[list[str], list[str]]:
    """Returns the names of the quarters of the questions by a number, and each question's; ties stay together."""
    array = np.array(numbers)
    quarter = np.searchsorted(np.quantile(array, [0.25, 0.5, 0.75]), array)  # (N,) 0..3
    names = {q: f"{array[quarter == q].min()}–{array[quarter == q].max()} {unit}" for q in sorted(set(quarter))}
    return list(names.values()), [names[q] for q in quarter]
