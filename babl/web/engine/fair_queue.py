"""The queue of requests, in which users take turns however many requests each has."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Generic, Protocol, TypeVar

from babl.web.engine.protocol import Failed

MAX_WAITING = 64  # requests in the queue
MAX_RUNNING = 64  # requests answered at once


class Item(Protocol):
    """An item of the queue."""

    @property
    def id(self) -> str: ...  # noqa: D102

    @property
    def user(self) -> str: ...  # noqa: D102


T = TypeVar("T", bound=Item)


class FairQueue(Generic[T]):
    """A queue that takes one item of each user in turn; iterating gives the items in that order."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[T]] = {}  # by user, the one whose turn is next first

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[T]:
        for turn in zip_longest(*self._queues.values()):
            yield from (item for item in turn if item is not None)

    def add(self, item: T) -> None:
        """Adds an item after its user's others."""
        self._queues.setdefault(item.user, deque()).append(item)

    def put_back(self, item: T) -> None:
        """Puts an item that was taken back before all others."""
        own = self._queues.pop(item.user, deque())
        own.appendleft(item)
        self._queues = {item.user: own, **self._queues}

    def take(self, may: Callable[[T], bool]) -> T | None:
        """Removes and returns the first item that `may` accepts, or None; its user's turn is last then."""
        found = next((item for item in self if may(item)), None)
        if found is not None:
            self.remove(found.id)
            if found.user in self._queues:
                self._queues[found.user] = self._queues.pop(found.user)
        return found

    def remove(self, id: str) -> T | None:
        """Removes and returns the item with this id, or None."""
        found = next((item for item in self if item.id == id), None)
        if found is not None:
            self._queues[found.user].remove(found)
            if not self._queues[found.user]:
                del self._queues[found.user]
        return found


def queue_full(id: str, waiting: int, seconds: float) -> Failed:
    """Returns the failure of a request that finds `waiting` others in the queue; answers take `seconds`."""
    return Failed(id, "busy", f"{waiting} requests are waiting already; ask again later", max(1.0, math.ceil(seconds)))
