"""Forms in which texts are compared: answers as the official SQuAD scripts do, whole texts, and words as spelled."""

import re
import string
import unicodedata
from functools import lru_cache

from babl.text.segment import unspaced

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_POSSESSIVE = re.compile(r"['’]s\b")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@lru_cache(maxsize=1 << 18)
def normalize_answer(text: str) -> str:
    """Returns the text in lower case, ASCII punctuation deleted, then articles, then extra whitespace."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE_PUNCTUATION)).split())


def without_surrogates(text: str) -> str:
    """Returns the text with each lone surrogate, which JSON can spell but no file can hold, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@lru_cache(maxsize=1 << 16)
def same_form(text: str) -> str:
    """Returns the form in which two titles, contexts or questions are the same text.

    NFKC, case folded, an underscore for a space, whitespace collapsed: "Frédéric_Chopin" is "frédéric  chopin".
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("_", " ").split())


@lru_cache(maxsize=1 << 18)
def spelled_words(text: str) -> str:
    """Returns the words of a text as they are spelled, between single spaces, without punctuation and articles.

    Where `normalize_answer` glues, this cuts: "24–10" is "24 10", "five-year" "five year", "Gandhi's" "gandhi".
    In a script without spaces each character counts as a word, so that a phrase is found wherever it stands.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return normalize_answer.__wrapped__(_POSSESSIVE.sub("", folded).translate(_SPELLED))


class _Spelled(dict[int, str]):
    """A table for `str.translate`: letters, digits and marks stay, all else is a space."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        kept = unicodedata.category(char)[0] in "LNM"
        self[code] = " " if not kept else f" {char} " if unspaced(char) else char
        return self[code]


_SPELLED = _Spelled()
