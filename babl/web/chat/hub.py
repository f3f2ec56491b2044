"""Answers that are being written: they belong to the server, not to the response that streams them.

Each has one task that reads the engine's events. Any number of streams read its text from where each of them is, and
are woken when there is more; none holds up another. Changes are saved twice a second, and the end of an answer before
any stream is told that it is done.
"""

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from django.db import DatabaseError

from babl.web.chat import services
from babl.web.chat.database import write
from babl.web.chat.metrics import ANSWERS, FIRST_TEXT, TOKENS, UNSAVED
from babl.web.chat.models import GENERATION_COLUMNS, LIVE, Status
from babl.web.engine.client import EngineClient, EngineError
from babl.web.engine.protocol import Delta, Done, Event, Failed, Loading, Queued, Reading, Request

SAVE_SECONDS = 0.5
RETRY_SECONDS = 1.0  # after a failed save
FIRST_EVENT_SECONDS = 2.0  # for the engine to say that it is full
T = TypeVar("T")
log = logging.getLogger("babl.web")


@dataclass(eq=False)
class RunningAnswer:
    """An answer that is being written.

    Attributes:
        request: To the engine.
        text: Written so far.
        tokens: Of the text.
        state: For the status line: status, and position, prompt_tokens, windows, cut_tokens where known.
        saved: Whether the last save succeeded.
        failure: Why the engine gave no answer.
        watchers: Events of streams, set when anything here changes.
    """

    request: Request
    text: str = ""
    tokens: int = 0
    state: dict[str, Any] = field(default_factory=lambda: {"status": str(Status.QUEUED)})
    saved: bool = True
    failure: Failed | None = None
    watchers: set[asyncio.Event] = field(default_factory=set)
    first_event: asyncio.Event = field(default_factory=asyncio.Event)  # set at the first event of the engine
    finished: asyncio.Event = field(default_factory=asyncio.Event)  # set once it has ended and is stored
    columns: dict[str, Any] = field(default_factory=lambda: {"status": Status.QUEUED})  # of Generation
    changed: bool = False  # since it was last saved
    started: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        """The id of the answer's message."""
        return self.request.id

    def notify(self) -> None:
        """Wakes every stream."""
        for watcher in self.watchers:
            watcher.set()

    def handle(self, event: Event) -> None:
        """Updates the answer by an event of the engine."""
        self.changed = True
        match event:
            case Queued(position=position):
                self.state = {"status": "queued", "position": position}
            case Loading():
                self.state = {"status": "loading"}
            case Reading():
                self.state = {"status": "reading", **_columns(event)}
                self.columns |= {"status": Status.RUNNING, **_columns(event)}
            case Delta(text=text, tokens=tokens):
                if not self.text:
                    self.columns |= {"status": Status.RUNNING, "first_seconds": time.monotonic() - self.started}
                    FIRST_TEXT.observe(self.columns["first_seconds"])
                    self.state = self.state | {"status": "answering"}
                    self.state.pop("position", None)
                self.text += text
                self.tokens = tokens
            case Done():
                self.text = event.text
                start, end = event.span or (None, None)
                self.columns |= _columns(event) | {"span_start": start, "span_end": end}
                self.columns["status"] = Status.STOPPED if event.finish == "cancelled" else Status.DONE
                TOKENS.inc(event.tokens)
            case Failed(code=code, message=message):
                self.failure = event
                # After a crash of the engine, what it wrote stays.
                status = Status.INTERRUPTED if code == "engine" else Status.ERROR
                self.columns |= {"status": status, "error": code, "error_message": message}
                if code == "broken":  # what such a model wrote is no answer
                    self.text = ""
        self.first_event.set()
        self.notify()


def _columns(event: Reading | Done) -> dict[str, Any]:
    """Returns the columns of `Generation` that are fields of the event."""
    return {name: getattr(event, name) for name in event.__struct_fields__ if name in GENERATION_COLUMNS}


class Hub:
    """All answers that are being written.

    Attributes:
        engine: Writes the answers.
        closing: Set when the server shuts down, which ends streams.
    """

    engine: EngineClient

    def __init__(self) -> None:
        self.closing = asyncio.Event()
        self._running: dict[str, RunningAnswer] = {}
        self._tasks: set[asyncio.Task] = set()
        self._open = False

    @property
    def saved(self) -> bool:
        """Whether every answer's last save succeeded."""
        return all(running.saved for running in self._running.values())

    @property
    def is_open(self) -> bool:
        """Whether questions are accepted."""
        return self._open and not self.closing.is_set()

    async def open(self, engine: EngineClient) -> None:
        """Marks what an earlier process left unfinished, starts the engine, and accepts questions from now on."""
        self.engine = engine
        left = await write(services.interrupt_all)
        await write(services.tidy)
        if left:
            log.warning("%d answers of an earlier process are marked interrupted", left)
        self._open = True
        self.spawn(self._save_regularly())
        self.spawn(self._start_engine())

    async def _start_engine(self) -> None:
        """Starts the engine, or logs why it cannot be started."""
        try:
            await self.engine.start()
        except EngineError as error:
            log.error("%s", error)

    def begin_close(self) -> None:
        """Refuses further questions, and tells every stream to reconnect."""
        self.closing.set()
        for running in self._running.values():
            running.notify()

    async def close(self) -> None:
        """Stores every answer as far as it is written, and ends the engine."""
        self.begin_close()
        self._open = False
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        rows = [(running.id, running.text, dict(running.columns)) for running in self._running.values()]
        try:
            await write(services.save_progress, rows)
            await write(services.interrupt_all)
        except DatabaseError as error:
            log.error("%d answers could not be stored (%s)", len(rows), type(error).__name__)
        await self.engine.stop()

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task:
        """Starts a task that outlives the request, and has nothing of its context."""
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def detached(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Awaits a coroutine that goes on if the caller is cancelled."""
        return await asyncio.shield(self.spawn(coroutine))

    def get(self, id: str) -> RunningAnswer | None:
        """Returns the answer with this id if it is being written; the caller has checked its owner."""
        return self._running.get(id)

    async def ask(
        self, service: Callable[..., services.Asked], *args: Any
    ) -> tuple[services.Asked, list[RunningAnswer]]:
        """Calls a service that stores a question, and starts its answers, even if the client leaves meanwhile."""

        async def store_and_start() -> tuple[services.Asked, list[RunningAnswer]]:
            asked = await write(service, *args)
            return asked, [self._start_answer(request) for request in asked.requests]

        return await self.detached(store_and_start())

    def _start_answer(self, request: Request) -> RunningAnswer:
        running = self._running[request.id] = RunningAnswer(request)
        self.spawn(self._listen(running))
        return running

    async def busy_failure(self, started: Sequence[RunningAnswer]) -> Failed | None:
        """Returns the engine's failure if it is too busy for one of these answers.

        Waits for the first event of each, and until those that were refused are stored.
        """
        refused: list[RunningAnswer] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_EVENT_SECONDS):
                for running in started:
                    await running.first_event.wait()
                refused = [running for running in started if running.failure and running.failure.code == "busy"]
                for running in refused:
                    await running.finished.wait()
        return refused[0].failure if refused else None

    async def stop(self, id: str) -> bool:
        """Stops an answer at the engine's next step; returns whether it was being written."""
        if id not in self._running:
            return False
        await self.engine.cancel(id)
        return True

    async def _listen(self, running: RunningAnswer) -> None:
        try:
            async for event in self.engine.submit(running.request):
                running.handle(event)
        except asyncio.CancelledError:
            raise
        except Exception:  # a bug must not leave an answer that never ends
            log.exception("an answer broke off")
            running.handle(Failed(running.id, "engine", "the answer broke off"))
        await self._finish(running)

    async def _finish(self, running: RunningAnswer) -> None:
        """Stores an answer that has ended, and retries until that succeeds."""
        while True:
            try:
                await write(services.finish, running.id, running.text, dict(running.columns))
                break
            except DatabaseError as error:
                self._mark_unsaved([running], error)
                await asyncio.sleep(RETRY_SECONDS)
        ANSWERS.labels(running.columns["status"]).inc()
        running.saved = True
        running.finished.set()
        del self._running[running.id]
        running.notify()

    async def _save_regularly(self) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            changed = [r for r in self._running.values() if r.changed and r.columns["status"] in LIVE]
            if not changed:
                continue
            for running in changed:
                running.changed = False
            try:
                await write(services.save_progress, [(r.id, r.text, dict(r.columns)) for r in changed])
            except DatabaseError as error:
                self._mark_unsaved(changed, error)
            else:
                for running in changed:
                    if not running.saved:
                        running.saved = True
                        running.notify()

    def _mark_unsaved(self, answers: Collection[RunningAnswer], error: DatabaseError) -> None:
        UNSAVED.inc()
        log.error("%d answers could not be stored (%s); trying again", len(answers), type(error).__name__)
        for running in answers:
            running.saved, running.changed = False, True
            running.notify()


hub = Hub()
"""Of this process; `babl.web.serve` opens it when the server starts."""
