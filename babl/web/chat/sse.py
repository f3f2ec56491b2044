"""Running answers as server-sent events: one stream for any number of them, taken up again where it broke.

The id of every frame has, for each answer of the stream in its order, how many code points of it were sent: `40-12`. A
browser sends the last id when it connects again, and goes on there.

- `state {g, status, position?, prompt_tokens?, windows?, cut_tokens?, saved}`: what the status line tells
- `delta {g, at, text, tokens}`: the next piece of the answer, which begins at code point `at`, and the tokens so far
- `done {g, message}`: the answer as it is stored, a `serializers.message_json`
- `reconnect {}`: the server ends, or the stream grew old; come again

A stream ends after the last `done`; an EventSource is then to be closed, for it would come again.
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
from babl.web.chat.hub import Running, hub
from babl.web.chat.metrics import STREAMS
from babl.web.chat.models import LIVE
from babl.web.chat.serializers import message_json

COALESCE_SECONDS = 0.04
PING_SECONDS = 15.0
RENEW_SECONDS = 600.0


def frame(event: str, data: Any, id: str = "") -> bytes:
    """Returns one event as it goes over the line."""
    head = f"id: {id}\n" if id else ""
    return f"{head}event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def parse_cursors(last_id: str, count: int) -> list[int]:
    """Returns how much of each answer was seen, by the id of the last frame; nothing where it is not one."""
    parts = last_id.split("-")
    if len(parts) == count and all(part.isascii() and part.isdigit() for part in parts):
        return [int(part) for part in parts]
    return [0] * count


async def answers(user: Any, ids: Sequence[UUID], cursors: list[int]) -> AsyncIterator[bytes]:
    """Yields frames until all of these answers, which are the user's, are done, or the server ends."""
    woken = asyncio.Event()
    watched: dict[int, Running] = {}
    told: dict[int, Any] = {}
    begun = spoken = time.monotonic()
    STREAMS.inc()
    try:
        yield b"retry: 1000\n\n"
        for i, id in enumerate(ids):
            if running := hub.get(str(id)):
                watched[i] = running
                running.watchers.add(woken)
                continue
            stored, is_live = await _stored(user, id)
            if is_live:  # it has ended a moment ago, or nobody has begun it yet
                yield frame("reconnect", {})
                return
            for each in _rest(i, stored["id"], stored["content"], stored["tokens"], cursors):
                yield each
            yield frame("done", {"g": stored["id"], "message": stored}, _id(cursors))
        while watched:
            woken.clear()
            for i, running in list(watched.items()):
                state = {"g": running.id, **running.state, "saved": running.saved}
                if told.get(i) != state and not running.over.is_set():
                    told[i] = state
                    yield frame("state", state, _id(cursors))
                for each in _rest(i, running.id, running.text, running.tokens, cursors):
                    spoken = time.monotonic()
                    yield each
                if running.over.is_set():
                    del watched[i]
                    running.watchers.discard(woken)
                    try:
                        stored, _ = await _stored(user, ids[i])
                    except ObjectDoesNotExist:  # purged meanwhile
                        continue
                    yield frame("done", {"g": running.id, "message": stored}, _id(cursors))
            if not watched:
                return
            if hub.closing.is_set() or time.monotonic() - begun > RENEW_SECONDS:
                yield frame("reconnect", {})
                return
            if time.monotonic() - spoken > PING_SECONDS:
                spoken = time.monotonic()
                yield b": ping\n\n"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(woken.wait(), PING_SECONDS)
            await asyncio.sleep(COALESCE_SECONDS)
    finally:
        STREAMS.dec()
        for running in watched.values():
            running.watchers.discard(woken)


def _rest(i: int, id: str, text: str, tokens: int | None, cursors: list[int]) -> list[bytes]:
    """Returns the frame with what is not yet seen of answer i, if there is anything; its cursor is moved."""
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
        connections.close_all()  # a stream lasts longer than a connection should be kept


async def _stored(user: Any, id: UUID) -> tuple[dict[str, Any], bool]:
    """Returns the answer as it is stored, and whether it counts as being written."""
    return await sync_to_async(_read, thread_sensitive=False)(user, id)
