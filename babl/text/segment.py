"""Sentences, words and line breaks in any script; every offset counts code points.

The rules are those of two libraries: sentences are Wikimedia's (the terminators of all scripts and the abbreviations
of English), words and line breaks ICU's, which has dictionaries for the scripts that are written without spaces.

Ref: Unicode Standard Annexes 14 (line breaking) and 29 (text segmentation); the sentencex library.
"""

import itertools
import re
from collections.abc import Sequence

from icu4py.breakers import LineBreaker, WordBreaker
from sentencex import get_sentence_boundaries

_CJK = "\u2e80-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_HAS_CJK = re.compile(f"[{_CJK}]")  # with its punctuation and full-width forms
_HAS_UNSPACED = re.compile(f"[{_CJK}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df]")  # Thai, Lao, Myanmar, Khmer
_SPACE_ENDS_SENTENCE = re.compile(r"(?<=[\u0e00-\u0eff])\s+(?=[\u0e00-\u0eff])")  # Thai and Lao have no full stop
_SURROGATE = re.compile("[\ud800-\udfff]")


def unspaced(text: str) -> bool:
    """Returns whether the text has a character of a script that is written without spaces between words."""
    return _HAS_UNSPACED.search(text) is not None


def sentences(text: str) -> list[tuple[int, int]]:
    """Returns the spans [start, end) of the sentences, without the whitespace around them."""
    found = [sentence["start_index"] for sentence in get_sentence_boundaries("en", _encodable(text))]
    starts = {at for at in found if not at or text[at - 1].isspace() or unspaced(text[at - 1 : at + 1])}
    starts |= {match.end() for match in _SPACE_ENDS_SENTENCE.finditer(text)}
    spans = [_stripped(text, start, end) for start, end in itertools.pairwise([*sorted(starts), len(text)])]
    return [(start, end) for start, end in spans if start < end]


def words(text: str) -> list[tuple[int, int]]:
    """Returns the spans of the words: what stands between spaces, and ICU's words where a script has no spaces."""
    spans = []
    for run in re.finditer(r"\S+", text):
        if not unspaced(run[0]):
            spans.append(run.span())
            continue
        ends = _ends(WordBreaker(_encodable(run[0]), "en"))
        parts = [(run.start() + start, run.start() + end) for start, end in itertools.pairwise([0, *ends])]
        spans += [(start, end) for start, end in parts if any(map(str.isalnum, text[start:end]))] or [run.span()]
    return spans


def line_breaks(text: str) -> list[int]:
    """Returns where a line may be broken, in increasing order, 0 and the end included; spaces end their line.

    In scripts with spaces only these count: a tokenizer reads the end of "five-year" otherwise when it stands alone.
    """
    ends = _ends(LineBreaker(_encodable(text), "en"))
    return [0, *(at for at in ends if at == len(text) or text[at - 1].isspace() or unspaced(text[at - 1 : at + 1]))]


def join(pieces: Sequence[str]) -> str:
    """Returns the sentences as one text, with a space between two unless it is Chinese or Japanese."""
    joined = ""
    for piece in pieces:
        together = _HAS_CJK.match(joined[-1:]) and _HAS_CJK.match(piece)
        joined += piece if not joined or together else f" {piece}"
    return joined


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def _ends(segments: LineBreaker | WordBreaker) -> list[int]:
    """Returns where each segment ends; summed over its text, since the library's own offsets count UTF-16 units."""
    return list(itertools.accumulate(map(len, segments)))


def _encodable(text: str) -> str:
    """Returns the text with a replacement character for each lone surrogate, which the libraries refuse."""
    return _SURROGATE.sub("\ufffd", text)
