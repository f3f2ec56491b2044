"""The ASGI application: opens and closes the hub, and serves files and /healthz without Django."""

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


BODY_SECONDS = 30.0  # between two pieces of a request's body


class TooLong(Exception):
    """A request's body is longer than its URL accepts."""


class TooSlow(Exception):
    """The next piece of a request's body did not arrive in time."""


class Application:
    """The ASGI application.

    Args:
        open: Awaited before the first request.
        close: Awaited after the last request.
    """

    def __init__(self, open: Callable[[], Awaitable[None]], close: Callable[[], Awaitable[None]]):
        self._open, self._close = open, close
        self._django = get_asgi_application()
        self._static = StaticFiles(packages=[("babl.web.chat", "static")])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request, or the lifespan."""
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
            except (HTTPException, ValueError) as error:  # no such file, another method, or an invalid name
                status = error.status_code if isinstance(error, HTTPException) else 404
                return await _respond(_with_headers(send), status, b"there is no such file\n" if status == 404 else b"")
        most = settings.LOGIN_BYTES if scope["path"] == settings.LOGIN_URL else settings.UPLOAD_BYTES
        length = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if int(length if length.isdigit() else 0) > most:
                raise TooLong
            await self._django(scope, _limited(receive, most), send)
        except TooLong:  # Django reads the whole body before it answers
            await _respond(send, 413, b"the request is too long\n")
        except TooSlow:
            await _respond(send, 408, b"the rest of the request did not arrive\n")

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


def _limited(receive: Receive, most: int) -> Receive:
    """Returns a `receive` that raises `TooLong` after `most` bytes, and `TooSlow` if the body stalls.

    After the body, it waits without limit for the client to disconnect.
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
    """Returns a `send` that adds the security headers, and lets the browser revalidate files each time."""
    ours = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *ours, (b"cache-control", b"no-cache")]}
        await send(message)

    return sending
