"""The queue: users take turns, however much each of them asks."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Generic, Protocol, TypeVar

MOST_WAITING = 64  # requests in the queue
MOST_RUNNING = 64  # requests being answered


class Waiting(Protocol):
    """What can stand in the queue."""

    @property
    def id(self) -> str: ...  # noqa: D102

    @property
    def user(self) -> str: ...  # noqa: D102


W = TypeVar("W", bound=Waiting)


class Turns(Generic[W]):
    """Holds what waits; iterating gives it in the order it will be taken: one of each user in turn."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[W]] = {}  # user -> in the order of arrival; whose turn is next comes first

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[W]:
        for round_ in zip_longest(*self._queues.values()):
            yield from (waiting for waiting in round_ if waiting is not None)

    def add(self, waiting: W) -> None:
        """It stands behind its user's others."""
        self._queues.setdefault(waiting.user, deque()).append(waiting)

    def give_back(self, waiting: W) -> None:
        """It, which was taken, stands before all others again."""
        own = self._queues.pop(waiting.user, deque())
        own.appendleft(waiting)
        self._queues = {waiting.user: own, **self._queues}

    def take(self, may: Callable[[W], bool]) -> W | None:
        """Returns the next of those that may go, which has left; None where none may. Its user comes last now."""
        found = next((waiting for waiting in self if may(waiting)), None)
        if found is not None:
            self.remove(found.id)
            if found.user in self._queues:
                self._queues[found.user] = self._queues.pop(found.user)
        return found

    def remove(self, id: str) -> W | None:
        """Returns the one with this id, which has left; None where there is none."""
        found = next((waiting for waiting in self if waiting.id == id), None)
        if found is not None:
            self._queues[found.user].remove(found)
            if not self._queues[found.user]:
                del self._queues[found.user]
        return found
