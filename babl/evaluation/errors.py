"""What kind of mistake an answer is, by rule, so that anybody counts the same; counts of an arm are a `Counter`."""

import re
from collections.abc import Sequence
from typing import Literal, get_args

from babl.evaluation.squad import exact_match, f1
from babl.text.normalize import normalize_answer

ErrorKind = Literal[
    "right", "unanswerable", "truncated", "empty", "boundary", "wrong entity", "not in context", "wrong"
]
ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)

_WORD = re.compile(r"\w+")


def error_kind(prediction: str, golds: Sequence[str], context: str | None, complete: bool) -> ErrorKind:
    """Returns the first of these that is true of a prediction.

    * right: exact match with a gold, or nothing where nothing is asked for; golds count as in version 2.0
    * unanswerable: something, where the question has no answer
    * truncated: the model had not come to its own end
    * empty: nothing is left of it after normalisation
    * boundary: it has a word in common with a gold
    * wrong entity: it stands in the context, and is something else
    * not in context: it does not stand there; the model made it up, or knew it
    * wrong: something else, and no context was shown in which it could stand

    Args:
        prediction: After `clean_answer`.
        golds: None of them for an unanswerable question.
        context: As the model saw it; None where it saw none.
        complete: Whether the model ended by itself.
    """
    wanted = [gold for gold in golds if normalize_answer(gold)] or [""]
    if any(exact_match(prediction, gold) for gold in wanted):
        return "right"
    if not golds:
        return "unanswerable"
    if not complete:
        return "truncated"
    if not normalize_answer(prediction):
        return "empty"
    if any(f1(prediction, gold, "2.0") for gold in wanted):
        return "boundary"
    if context is None:
        return "wrong"
    return "wrong entity" if _stands(prediction, context) else "not in context"


def _stands(prediction: str, context: str) -> bool:
    """Whether it is a run of whole words of the context, where normalised texts or their letters and digits agree.

    Normalised, "Smith" is no word of "Smith's", but its letters are; the letters of "US" are not in "U.S.".
    """
    forms = (normalize_answer, lambda text: " ".join(_WORD.findall(text.lower())))
    return any(f" {form(prediction)} " in f" {form(context)} " for form in forms)
