"""Texts compared as the official SQuAD scripts compare them; scores, arms and overlap all use this one rule."""

import re
import string
from functools import lru_cache

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
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
