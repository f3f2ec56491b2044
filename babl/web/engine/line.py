"""One end of the socket between the web process and the engine process."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from babl.web.engine.protocol import Frames, frame


class Line(asyncio.Protocol):
    """Sends messages, hands on those that come, and knows when the other end does not keep up or has gone.

    Args:
        types: Of the messages that come.
        receive: Called with each of them, in order; with `Unreadable` for one that is no message.
        lost: Called once, with the reason or None, when nothing comes any more.
        made: Called with the line when the other end is there.
    """

    def __init__(
        self,
        types: object,
        receive: Callable[[Any], None],
        lost: Callable[[Exception | None], None],
        made: Callable[["Line"], None] = lambda line: None,
    ):
        self._frames, self._receive, self._lost, self._made = Frames(types), receive, lost, made
        self._room = asyncio.Event()  # whether the other end keeps up
        self._room.set()
        self._fault: Exception | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._made(self)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        try:
            messages = self._frames.feed(data)
        except ValueError as error:  # where the next frame begins is unknown from here on
            self._fault = error
            self._transport.abort()
            return
        for message in messages:
            self._receive(message)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: D102
        self._room.set()
        self._lost(self._fault or error)

    def pause_writing(self) -> None:  # noqa: D102
        self._room.clear()

    def resume_writing(self) -> None:  # noqa: D102
        self._room.set()

    def send(self, message: msgspec.Struct) -> None:
        """The message is on its way; to an end that has gone it is not.

        Raises:
            ValueError: It is too long, or cannot be encoded.
        """
        data = frame(message)
        if not self._transport.is_closing():
            self._transport.write(data)

    async def drained(self) -> None:
        """Returns once the other end keeps up."""
        await self._room.wait()

    def close(self) -> None:
        """What was sent arrives, then the line is lost."""
        self._transport.close()
