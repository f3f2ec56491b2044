"""Answers as server-sent events: one stream for any number of answers, which can be resumed.

The id of every frame has, for each answer of the stream in order, how many code points were sent: `40-12`. A browser
sends the last id when it reconnects, and the stream goes on there.

- `state {g, status, position?, prompt_tokens?, windows?, cut_tokens?, saved}`: for the status line
- `delta {g, at, text, tokens}`: the next piece of the answer, which begins at code point `at`, and the tokens so far
- `done {g, message}`: the answer as it is stored, a `serializers.message_json`
- `reconnect {}`: the server shuts down, or the stream is old: connect again

A stream ends after the last `done`; the client closes its EventSource then, which would reconnect.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import UUID

from asgiref.sync import sync_to_async
from django.core.exceptions import ObjectDoesNotExist
from django.db import connections

from babl.web.chat import selectors
from babl.web.chat.hub import RunningAnswer, hub
from babl.web.chat.metrics import STREAMS
from babl.web.chat.models import LIVE
from babl.web.chat.serializers import message_json

COALESCE_SECONDS = 0.04
PING_SECONDS = 15.0
RENEW_SECONDS = 600.0


def frame(event: str, data: Any, id: str = "") -> bytes:
    """Returns a frame of the stream."""
    head = f"id: {id}\n" if id else ""
    return f"{head}event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def parse_cursors(last_id: str, count: int) -> list[int]:
    """Returns the code points of each answer that were sent, by the id of the last frame; zeros if it is not valid."""
    parts = last_id.split("-")
    if len(parts) == count and all(part.isascii() and part.isdigit() for part in parts):
        return [int(part) for part in parts]
    return [0] * count


async def answers(user: Any, ids: Sequence[UUID], cursors: list[int]) -> AsyncIterator[bytes]:
    """Yields frames until these answers of the user are done, or the server shuts down."""
    wake = asyncio.Event()
    watched: dict[int, RunningAnswer] = {}
    sent: dict[int, Any] = {}
    started = last_sent = time.monotonic()
    STREAMS.inc()
    try:
        yield b"retry: 1000\n\n"
        for i, id in enumerate(ids):
            if running := hub.get(str(id)):
                watched[i] = running
                running.watchers.add(wake)
                continue
            stored, is_live = await _stored(user, id)
            if is_live:  # it has just ended, or is about to start
                yield frame("reconnect", {})
                return
            for each in _rest(i, stored["id"], stored["content"], stored["tokens"], cursors):
                yield each
            yield frame("done", {"g": stored["id"], "message": stored}, _id(cursors))
        while watched:
            wake.clear()
            for i, running in list(watched.items()):
                state = {"g": running.id, **running.state, "saved": running.saved}
                if sent.get(i) != state and not running.finished.is_set():
                    sent[i] = state
                    yield frame("state", state, _id(cursors))
                for each in _rest(i, running.id, running.text, running.tokens, cursors):
                    last_sent = time.monotonic()
                    yield each
                if running.finished.is_set():
                    del watched[i]
                    running.watchers.discard(wake)
                    try:
                        stored, _ = await _stored(user, ids[i])
                    except ObjectDoesNotExist:  # deleted meanwhile
                        continue
                    yield frame("done", {"g": running.id, "message": stored}, _id(cursors))
            if not watched:
                return
            if hub.closing.is_set() or time.monotonic() - started > RENEW_SECONDS:
                yield frame("reconnect", {})
                return
            if time.monotonic() - last_sent > PING_SECONDS:
                last_sent = time.monotonic()
                yield b": ping\n\n"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wake.wait(), PING_SECONDS)
            await asyncio.sleep(COALESCE_SECONDS)
    finally:
        STREAMS.dec()
        for running in watched.values():
            running.watchers.discard(wake)


def _rest(i: int, id: str, text: str, tokens: int | None, cursors: list[int]) -> list[bytes]:
    """Returns the frame with the rest of answer i, if there is any, and moves its cursor."""
    at = cursors[i]
    if at >= len(text):
        return []
    cursors[i] = len(text)
    return [frame("delta", {"g": id, "at": at, "text": text[at:], "tokens": tokens}, _id(cursors))]


def _id(cursors: Sequence[int]) -> str:
    return "-".join(map(str, cursors))


def _read(user: Any, id: UUID) -> tuple[dict[str, Any], bool]:
    try:
        message = selectors.message(user, id)
        return message_json(message), message.generation.status in LIVE
    finally:
        connections.close_all()  # a stream lasts longer than a connection should


async def _stored(user: Any, id: UUID) -> tuple[dict[str, Any], bool]:
    """Returns the stored answer, and whether it is being written."""
    return await sync_to_async(_read, thread_sensitive=False)(user, id)
