"""Where a context says an answer, although file and context may differ in spaces, Unicode form or a few characters."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

PlaceKind = Literal["exact", "whitespace", "moved", "not found"]
PLACE_KINDS: tuple[PlaceKind, ...] = get_args(PlaceKind)


@dataclass(frozen=True, slots=True)
class Place:
    """A span of the context.

    Attributes:
        kind: How it was found, see `place`.
        start: Code point of the context at which it begins; None where it was not found.
        end: Code point after it.
        ambiguous: Whether the file gave no offset and the answer stands in several places.
    """

    kind: PlaceKind
    start: int | None = None
    end: int | None = None
    ambiguous: bool = False


def place(text: str, offset: int | None, context: str) -> Place:
    """Returns where the context says the text.

    * exact: at its offset, character by character; without an offset, so anywhere
    * whitespace: the same up to runs of whitespace and Unicode's compatibility forms (NFC, NFD, NFKC, NFKD)
    * moved: elsewhere, up to the same: the nearest occurrence, whole words before parts of words
    * not found: nowhere

    Args:
        text: The answer.
        offset: Code point of the context at which the file says it begins; None or negative where it does not say.
        context: The passage.
    """
    known = offset is not None and offset >= 0
    origin = offset if offset is not None and known else 0
    if known and text and context.startswith(text, origin):
        return Place("exact", origin, origin + len(text))
    there, spans = None, []
    folded = _fold(context)
    needle = _fold(text).text.strip(" ")
    for at in _occurrences(needle, folded):
        start, end = folded.begins[at], folded.ends[at + len(needle) - 1]
        spans.append((_inside_words(start, end, context), abs(start - origin), start, end))
        if known and (start == origin or (text[0].isspace() and context[origin:start].isspace())):
            there = Place("whitespace", start, end)
    if there or not spans:
        return there or Place("not found")
    inside, _, start, end = min(spans)
    if known:
        return Place("moved", start, end)
    alike = sum(span[0] == inside for span in spans)
    return Place("exact" if context[start:end] == text else "whitespace", start, end, alike > 1)


@dataclass(frozen=True, slots=True)
class _Folded:
    """A text in NFKD with single spaces, and the span of the original that each of its characters stands for."""

    text: str
    begins: list[int]
    ends: list[int]


_PIECE = re.compile(r"\s+|[!-~]+|[^\s!-~]+")  # whitespace; printable ASCII, which folds to itself; anything else


@lru_cache(maxsize=256)  # questions about one context follow each other
def _fold(text: str) -> _Folded:
    pieces: list[str] = []
    begins: list[int] = []
    ends: list[int] = []
    for piece in _PIECE.finditer(text):
        start, end = piece.span()
        if text[start].isspace():
            pieces.append(" ")
            begins.append(start)
            ends.append(end)
        elif "!" <= text[start] <= "~":
            pieces.append(piece[0])
            begins += range(start, end)
            ends += range(start + 1, end + 1)
        else:
            while start < end:  # a character with the marks on it: no other one changes its decomposition
                after = start + 1
                while after < end and unicodedata.combining(text[after]):
                    after += 1
                decomposed = unicodedata.normalize("NFKD", text[start:after])
                pieces.append(decomposed)
                begins += [start] * len(decomposed)
                ends += [after] * len(decomposed)
                start = after
    return _Folded("".join(pieces), begins, ends)


def _occurrences(needle: str, folded: _Folded) -> Iterator[int]:
    """Yields where the needle stands; never half of a character that folds to several."""
    at = folded.text.find(needle) if needle else -1
    while at >= 0:
        last = at + len(needle) - 1
        begins_whole = at == 0 or folded.begins[at] != folded.begins[at - 1]
        if begins_whole and (last + 1 == len(folded.ends) or folded.ends[last] != folded.ends[last + 1]):
            yield at
        at = folded.text.find(needle, at + 1)


def _inside_words(start: int, end: int, context: str) -> bool:
    """Whether the span begins or ends inside a word."""
    edges = ((start - 1, start), (end - 1, end))
    return any(before >= 0 and after < len(context) and _joined(context[before : after + 1]) for before, after in edges)


def _joined(pair: str) -> bool:
    """Whether both characters are letters, digits or marks on them."""
    return all(unicodedata.category(character)[0] in "LNM" for character in pair)
