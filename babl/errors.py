"""The one exception a user's mistake raises, and the helper that names the nearest valid word."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the user's input: one line that names the value, the bound and the key or file.

    Programs print it without a traceback and exit with code 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the nearest known word, or an empty string where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
