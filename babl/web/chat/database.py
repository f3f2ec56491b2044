"""The writer: one thread that makes every change of the database.

Changes run one after the other on one connection, so SQLite never waits for a lock, only one connection checkpoints its
journal, and of two requests the first one wins.
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
WRITER = "babl-writer"
LOCK = 0x6261626C  # PostgreSQL's advisory lock that a server of Babl holds
CHECKPOINT_PAGES = 1000  # of the journal, before it is moved into the database
LOCK_SECONDS = 5.0  # until PostgreSQL has noticed that the connection which held the lock is gone

_writer = ThreadPoolExecutor(1, WRITER)
_locked = False


async def write(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a function on the writer's thread, to its end even if the caller is cancelled; returns its result."""
    call = partial(_on_connection, partial(function, *args, **kwargs))
    return await asyncio.get_running_loop().run_in_executor(_writer, call)


def _on_connection(function: Callable[[], T]) -> T:
    connection.close_if_unusable_or_obsolete()  # the server may have closed it since the last call
    return function()


def lock() -> bool:
    """Locks the database for this server; returns whether no other server had it.

    Called on the writer's thread, whose connection holds PostgreSQL's lock, and takes it again when it reconnects. An
    embedded database is locked by its folder (`babl.web.serve`).
    """
    global _locked
    _locked = connection.vendor != "postgresql" or _try_lock(connection)
    return _locked


def _try_lock(connection: Any) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s)", [LOCK])
        return cursor.fetchone()[0]


@receiver(connection_created)
def _set_up_writer(connection: Any, **_: Any) -> None:
    """Keeps the writer's connection open, and lets it alone checkpoint SQLite's journal."""
    if not threading.current_thread().name.startswith(WRITER):
        return
    connection.close_at = None
    if _locked and connection.vendor == "postgresql":
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(connection):
            if time.monotonic() > deadline:
                connection.close()
                raise OperationalError("another server has locked this database")
            time.sleep(0.1)
    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            cursor.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
