"""Connections of clients: who opens many and says nothing keeps nobody out."""

import asyncio
import contextlib
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # that the head of a request may take; browsers open connections before they need them
MOST_FILES = 65_536  # that the process may have open: connections are files


class Connection(H11Protocol):
    """One connection, which is closed where the head of its next request does not come whole within `HEAD_SECONDS`."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client is waited for."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """The head is whole, or is waited for."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait_no_more()
        elif self._late is None:
            self._wait()

    def on_response_complete(self) -> None:
        """The next request may have begun already."""
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:
            self._wait_no_more()
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is waited for."""
        self._wait_no_more()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _wait_no_more(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def allow_many() -> None:
    """The process may have as many connections as the system lets it, not the few that shells allow."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    with contextlib.suppress(ValueError, OSError):  # some systems let a process have fewer than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
