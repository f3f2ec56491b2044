"""The one exception a user's mistake raises, and the words it shares: the nearest valid word, what to install."""

import difflib
from collections.abc import Iterable

EXTRA_OF = {  # the extra of pyproject.toml that brings each module a bare install lacks
    **dict.fromkeys(("django", "asgiref", "uvicorn", "starlette", "markdown_it", "pygments", "nh3"), "web"),
    **dict.fromkeys(("prometheus_client", "dj_database_url", "psycopg", "psycopg_pool"), "web"),
    **dict.fromkeys(("sklearn", "matplotlib"), "experiment"),
    "deepspeed": "deepspeed",
    "triton": "kernels",
    "tensorboard": "tensorboard",
    "pyarrow": "data",
}


class UserError(ValueError):
    """A mistake in the user's input: one line that names the value, the bound and the key or file.

    Programs print it without a traceback and exit with code 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the nearest known word, or an empty string where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def not_installed(module: str) -> str:
    """Returns that an optional module is not installed, and the command that installs its extra."""
    package = module.partition(".")[0]
    return f'{package} is not installed: pip install "babl[{EXTRA_OF[package]}]"'
