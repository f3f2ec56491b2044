"""The application uvicorn serves: the hub lives as long as it, and files and /healthz never wait for Django."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from django.conf import settings
from django.core.asgi import get_asgi_application
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from babl.web.middleware import HEADERS

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


BODY_SECONDS = 30.0  # between two pieces of a body


class TooLong(Exception):
    """A request has more bytes than its address takes."""


class TooSlow(Exception):
    """The next piece of a request's body does not come."""


class Application:
    """Answers each connection.

    Args:
        open: Called once before the first request.
        close: Called once after the last one.
    """

    def __init__(self, open: Callable[[], Awaitable[None]], close: Callable[[], Awaitable[None]]):
        self._open, self._close = open, close
        self._django = get_asgi_application()
        self._static = StaticFiles(packages=[("babl.web.chat", "static")])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one."""
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            return None
        if scope["path"] == "/healthz":
            return await _respond(send, 200, b"ok\n")
        if scope["path"].startswith(settings.STATIC_URL):
            inner = {**scope, "root_path": scope.get("root_path", "") + settings.STATIC_URL.rstrip("/")}
            try:
                return await self._static(inner, receive, _with_headers(send))
            except (HTTPException, ValueError) as error:  # no such file, another method, or no name of a file at all
                status = error.status_code if isinstance(error, HTTPException) else 404
                return await _respond(_with_headers(send), status, b"there is no such file\n" if status == 404 else b"")
        most = settings.LOGIN_BYTES if scope["path"] == settings.LOGIN_URL else settings.UPLOAD_BYTES
        length = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if int(length if length.isdigit() else 0) > most:
                raise TooLong
            await self._django(scope, _at_most(receive, most), send)
        except TooLong:  # Django reads the whole body before it answers anything
            await _respond(send, 413, b"the request is too long\n")
        except TooSlow:
            await _respond(send, 408, b"the rest of the request did not come\n")

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._open()
        except BaseException as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._close()
        await send({"type": "lifespan.shutdown.complete"})


async def _respond(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _at_most(receive: Receive, most: int) -> Receive:
    """Returns a receiver of at most `most` bytes, whatever length the request says, none of them waited for long.

    It raises `TooLong` or `TooSlow`; after the body, it waits for ever for the client to leave.
    """
    got, more = 0, True

    async def counting() -> MutableMapping[str, Any]:
        nonlocal got, more
        try:
            async with asyncio.timeout(BODY_SECONDS if more else None):
                message = await receive()
        except TimeoutError:
            raise TooSlow from None
        more = message.get("more_body", False)
        got += len(message.get("body", b""))
        if got > most:
            raise TooLong
        return message

    return counting


def _with_headers(send: Send) -> Send:
    """Returns a sender of files that the browser asks about each time; a new version may have others."""
    ours = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *ours, (b"cache-control", b"no-cache")]}
        await send(message)

    return sending
