"""The one thread that writes.

Everything that changes the database runs here, one call after the other, on one connection: SQLite then never has to
wait for a lock, only one connection moves its journal, and what two requests want is decided by who came first.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from django.db import OperationalError, connection
from django.db.backends.signals import connection_created
from django.dispatch import receiver

P = ParamSpec("P")
T = TypeVar("T")
NAME = "babl-writer"
CLAIM = 0x6261626C  # a number that stands for servers of Babl
PAGES = 1000  # of the journal, before it is moved into the database

CLAIM_SECONDS = 5.0  # until PostgreSQL has noticed that the connection which had the claim is gone

_writer = ThreadPoolExecutor(1, NAME)
_claimed = False


async def write(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Returns what a function of `services` returns, its changes committed; a cancelled caller does not stop it."""
    call = partial(_on_connection, partial(function, *args, **kwargs))
    return await asyncio.get_running_loop().run_in_executor(_writer, call)


def _on_connection(function: Callable[[], T]) -> T:
    connection.close_if_unusable_or_obsolete()  # a server may have hung up in the last call
    return function()


def claim() -> bool:
    """Returns whether no other server has this database, as far as PostgreSQL knows; then it is the caller's.

    Called on the writer's thread, whose connection keeps the claim, and takes it again where it had to be made anew.
    Two servers that share an embedded database share its folder, which `babl.web.serve` sees to.
    """
    global _claimed
    _claimed = connection.vendor != "postgresql" or _take(connection)
    return _claimed


def _take(connection: Any) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s)", [CLAIM])
        return cursor.fetchone()[0]


@receiver(connection_created)
def _keep_the_writers(connection: Any, **_: Any) -> None:
    """The writer's connection stays open, and is the one that moves SQLite's journal into the database."""
    if not threading.current_thread().name.startswith(NAME):
        return
    connection.close_at = None
    if _claimed and connection.vendor == "postgresql":
        deadline = time.monotonic() + CLAIM_SECONDS
        while not _take(connection):
            if time.monotonic() > deadline:
                connection.close()
                raise OperationalError("another server has taken this database")
            time.sleep(0.1)
    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            cursor.execute(f"PRAGMA wal_autocheckpoint={PAGES}")
