"""The one thread that writes.

Everything that changes the database runs here, one call after the other, on one connection: SQLite then never has to
wait for a lock, only one connection moves its journal, and what two requests want is decided by who came first.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from django.db import connection
from django.db.backends.signals import connection_created
from django.dispatch import receiver

P = ParamSpec("P")
T = TypeVar("T")
NAME = "babl-writer"
CLAIM = 0x6261626C  # a number that stands for servers of Babl
PAGES = 1000  # of the journal, before it is moved into the database

_writer = ThreadPoolExecutor(1, NAME)


async def write(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Returns what a function of `services` returns, its changes committed; a cancelled caller does not stop it."""
    call = partial(_on_connection, partial(function, *args, **kwargs))
    return await asyncio.get_running_loop().run_in_executor(_writer, call)


def _on_connection(function: Callable[[], T]) -> T:
    connection.close_if_unusable_or_obsolete()  # a server may have hung up in the last call
    return function()


def claim() -> bool:
    """Returns whether no other server has this database, as far as PostgreSQL knows; then it is the caller's.

    Called on the writer's thread, whose connection keeps the claim. Two servers that share an embedded database share
    its folder, which `babl.web.serve` sees to.
    """
    if connection.vendor != "postgresql":
        return True
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s)", [CLAIM])
        return cursor.fetchone()[0]


@receiver(connection_created)
def _keep_the_writers(connection: Any, **_: Any) -> None:
    """The writer's connection stays open, and is the one that moves SQLite's journal into the database."""
    if not threading.current_thread().name.startswith(NAME):
        return
    connection.close_at = None
    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            cursor.execute(f"PRAGMA wal_autocheckpoint={PAGES}")
