"""Locates an answer in its context."""

import re
import unicodedata
from collections.abc import Iterator

_ARTICLES = {"a", "an", "the"}
Span = tuple[int, int]


def locate(answer: str, context: str, window: Span | None = None) -> Span | None:
    """Returns the code points [start, end) of the answer in the context, or None if it does not occur there.

    The same characters are looked for first, then the same words regardless of case, punctuation, articles and spaces.
    Of several places, the first inside the window counts, else the first of all.

    Args:
        answer: As written by the model.
        context: As sent by the user.
        window: The part of the context that the model saw, in code points.
    """
    if not answer.strip():
        return None
    low, high = window or (0, len(context))
    for spans in (_same_characters(answer.strip(), context), _same_words(answer, context)):
        found = list(spans)
        if found:
            return next((span for span in found if low <= span[0] and span[1] <= high), found[0])
    return None


def _same_characters(answer: str, context: str) -> Iterator[Span]:
    """Yields exact matches: whole words first, so that "man" is not found in "many"."""
    inside = []
    at = context.find(answer)
    while at >= 0:
        span = at, at + len(answer)
        if _whole(span, context):
            yield span
        else:
            inside.append(span)
        at = context.find(answer, at + 1)
    yield from inside


def _whole(span: Span, context: str) -> bool:
    """Returns whether the span begins and ends at word boundaries."""
    start, end = span
    goes_on = [0 < at < len(context) and context[at - 1].isalnum() and context[at].isalnum() for at in (start, end)]
    return not any(goes_on)


def _same_words(answer: str, context: str) -> Iterator[Span]:
    wanted = [word for word, _ in _words(answer)]
    words = list(_words(context))
    if not wanted:
        return
    for first in range(len(words) - len(wanted) + 1):
        if all(words[first + i][0] == word for i, word in enumerate(wanted)):
            yield words[first][1][0], words[first + len(wanted) - 1][1][1]


def _words(text: str) -> Iterator[tuple[str, Span]]:
    """Yields each word except articles, normalized (NFKC) and casefolded, with its code points."""
    for match in re.finditer(r"\w+", text):
        word = unicodedata.normalize("NFKC", match[0]).casefold()
        if word not in _ARTICLES:
            yield word, match.span()
