"""One end of the socket between the web process and the engine process."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from babl.web.engine.protocol import Frames, frame


class Channel(asyncio.Protocol):
    """Sends and receives messages, and knows whether the other end keeps up.

    Args:
        types: Of the messages to receive.
        receive: Called with each message, in order; with a `BadFrame` for one that cannot be decoded.
        on_lost: Called once, with the error or None, when the connection is lost.
        on_made: Called with the channel when the connection is made.
    """

    def __init__(
        self,
        types: object,
        receive: Callable[[Any], None],
        on_lost: Callable[[Exception | None], None],
        on_made: Callable[["Channel"], None] = lambda channel: None,
    ):
        self._frames, self._receive, self._on_lost, self._on_made = Frames(types), receive, on_lost, on_made
        self._writable = asyncio.Event()  # whether the other end keeps up
        self._writable.set()
        self._error: Exception | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._on_made(self)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        try:
            messages = self._frames.feed(data)
        except ValueError as error:  # where the next frame begins is unknown from here on
            self._error = error
            self._transport.abort()
            return
        for message in messages:
            self._receive(message)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: D102
        self._writable.set()
        self._on_lost(self._error or error)

    def pause_writing(self) -> None:  # noqa: D102
        self._writable.clear()

    def resume_writing(self) -> None:  # noqa: D102
        self._writable.set()

    def send(self, message: msgspec.Struct) -> None:
        """Sends a message, unless the connection is closed.

        Raises:
            ValueError: The message is too long, or cannot be encoded.
        """
        data = frame(message)
        if not self._transport.is_closing():
            self._transport.write(data)

    async def drained(self) -> None:
        """Waits until the other end keeps up."""
        await self._writable.wait()

    def close(self) -> None:
        """Closes the connection once everything has been sent."""
        self._transport.close()
