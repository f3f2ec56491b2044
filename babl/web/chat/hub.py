"""Answers on their way: they belong to the server, not to the response that shows them.

Each has one task that listens to the engine. Whoever wants to see it, in however many tabs, reads the text that is
there from the place it knows, and is woken when there is more; nobody holds up another. What has changed is saved twice
a second, and the last of it before anybody is told that the answer is done.
"""

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

from asgiref.sync import sync_to_async
from django.db import DatabaseError, connections

from babl.web.chat import question_sets, selectors, services
from babl.web.chat.database import write
from babl.web.chat.metrics import ANSWERS, FIRST_TEXT, TOKENS, UNSAVED
from babl.web.chat.models import GENERATION_COLUMNS, LIVE, Question, Run, RunAnswer, Status
from babl.web.chat.serializers import score
from babl.web.engine.client import EngineClient, EngineError
from babl.web.engine.protocol import Delta, Done, Event, Failed, Loading, QARequest, Queued, Reading, Request, Settings

SAVE_SECONDS = 0.5
RETRY_SECONDS = 1.0  # after a save that failed
FIRST_WORD_SECONDS = 2.0  # the engine takes to say that it is full
UNREADABLE = "prompt"  # the failure of a question that is too long for its model
SET_AT_ONCE = 8  # questions of a set that the engine has at once
T = TypeVar("T")
log = logging.getLogger("babl.web")


@dataclass(eq=False)
class Running:
    """One answer on its way.

    Attributes:
        request: What the engine was asked.
        text: Written so far.
        tokens: Of the text.
        state: What a status line tells: status, and position, prompt_tokens, windows, cut_tokens where known.
        saved: Whether the last attempt to store it went well.
        failure: Why the engine gave no answer.
        watchers: Set when anything here changes.
    """

    request: Request
    text: str = ""
    tokens: int = 0
    state: dict[str, Any] = field(default_factory=lambda: {"status": str(Status.QUEUED)})
    saved: bool = True
    failure: Failed | None = None
    watchers: set[asyncio.Event] = field(default_factory=set)
    heard: asyncio.Event = field(default_factory=asyncio.Event)  # the engine has said something
    over: asyncio.Event = field(default_factory=asyncio.Event)  # it has ended and is stored
    facts: dict[str, Any] = field(default_factory=lambda: {"status": Status.QUEUED})  # columns of Generation
    changed: bool = False  # since it was last saved
    begun: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        """The id of the answer's message."""
        return self.request.id

    def tell(self) -> None:
        """Everybody who watches looks again."""
        for watcher in self.watchers:
            watcher.set()

    def take(self, event: Event) -> None:
        """What the engine says is noted."""
        self.changed = True
        match event:
            case Queued(position=position):
                self.state = {"status": "queued", "position": position}
            case Loading():
                self.state = {"status": "loading"}
            case Reading():
                self.state = {"status": "reading", **_columns(event)}
                self.facts |= {"status": Status.RUNNING, **_columns(event)}
            case Delta(text=text, tokens=tokens):
                if not self.text:
                    self.facts |= {"status": Status.RUNNING, "first_seconds": time.monotonic() - self.begun}
                    FIRST_TEXT.observe(self.facts["first_seconds"])
                    self.state = self.state | {"status": "answering"}
                    self.state.pop("position", None)
                self.text += text
                self.tokens = tokens
            case Done():
                self.text = event.text
                start, end = event.span or (None, None)
                self.facts |= _columns(event) | {"span_start": start, "span_end": end}
                self.facts["status"] = Status.STOPPED if event.finish == "cancelled" else Status.DONE
                TOKENS.inc(event.tokens)
            case Failed(code=code, message=message):
                self.failure = event
                # The engine broke down: what it wrote stays, as after any crash.
                status = Status.INTERRUPTED if code == "engine" else Status.ERROR
                self.facts |= {"status": status, "error": code, "error_message": message}
                if code == "broken":  # nothing that such a model wrote is an answer
                    self.text = ""
        self.heard.set()
        self.tell()


def _columns(event: Reading | Done) -> dict[str, Any]:
    """Returns the columns of `Generation` that are fields of the event."""
    return {name: getattr(event, name) for name in event.__struct_fields__ if name in GENERATION_COLUMNS}


class Hub:
    """All that is going on.

    Attributes:
        engine: Answers.
        closing: Set once the server ends, so that streams do.
    """

    engine: EngineClient

    def __init__(self) -> None:
        self.closing = asyncio.Event()
        self._running: dict[str, Running] = {}
        self._sets: dict[UUID, asyncio.Task] = {}
        self._tasks: set[asyncio.Task] = set()
        self._open = False

    @property
    def saved(self) -> bool:
        """Whether everything that should be stored is, as far as is known."""
        return all(running.saved for running in self._running.values())

    @property
    def is_open(self) -> bool:
        """Whether questions are taken."""
        return self._open and not self.closing.is_set()

    async def open(self, engine: EngineClient) -> None:
        """What an earlier process left unfinished is marked; from now on, questions are taken."""
        self.engine = engine
        left = await write(services.interrupt_all)
        await write(services.tidy)
        if left:
            log.warning("%d answers of an earlier process are marked interrupted", left)
        self._open = True
        self.spawn(self._save_now_and_then())
        self.spawn(self._start())

    async def _start(self) -> None:
        """The engine is ready, or the log says why not; questions wait for it, or are told."""
        try:
            await self.engine.start()
        except EngineError as error:
            log.error("%s", error)

    def end(self) -> None:
        """No question is taken any more, and every stream is told to come again."""
        self.closing.set()
        for running in self._running.values():
            running.tell()

    async def close(self) -> None:
        """Every answer is stored as far as it came, and the engine has ended."""
        self.end()
        self._open = False
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        rows = [(running.id, running.text, dict(running.facts)) for running in self._running.values()]
        try:
            await write(services.save_progress, rows)
            await write(services.interrupt_all)
        except DatabaseError as error:
            log.error("%d answers could not be stored (%s)", len(rows), type(error).__name__)
        await self.engine.stop()

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task:
        """Returns a task of its own: it has nothing of the request that began it, and outlives it."""
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def lasting(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns what the coroutine returns, which goes on where the caller is cancelled."""
        return await asyncio.shield(self.spawn(coroutine))

    def get(self, id: str) -> Running | None:
        """Returns the answer of that id if it is on its way; the caller has made sure whose it is."""
        return self._running.get(id)

    async def ask(self, service: Callable[..., services.Asked], *args: Any) -> tuple[services.Asked, list[Running]]:
        """Returns what a service has stored, its answers on their way, even where the client has left meanwhile."""

        async def store_and_begin() -> tuple[services.Asked, list[Running]]:
            asked = await write(service, *args)
            return asked, [self._begin(request) for request in asked.requests]

        return await self.lasting(store_and_begin())

    def _begin(self, request: Request) -> Running:
        running = self._running[request.id] = Running(request)
        self.spawn(self._listen(running))
        return running

    async def refusal(self, begun: Sequence[Running]) -> Failed | None:
        """Returns that the engine has no room for one of these, as soon as it has spoken of all of them.

        That they were refused is then stored.
        """
        refused: list[Running] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_WORD_SECONDS):
                for running in begun:
                    await running.heard.wait()
                refused = [running for running in begun if running.failure and running.failure.code == "busy"]
                for running in refused:
                    await running.over.wait()
        return refused[0].failure if refused else None

    async def stop(self, id: str) -> bool:
        """Returns whether the answer was on its way; it ends at the engine's next step."""
        if id not in self._running:
            return False
        await self.engine.cancel(id)
        return True

    async def _listen(self, running: Running) -> None:
        try:
            async for event in self.engine.submit(running.request):
                running.take(event)
        except asyncio.CancelledError:
            raise
        except Exception:  # a fault of ours must not leave an answer that never ends
            log.exception("an answer broke off")
            running.take(Failed(running.id, "engine", "the answer broke off"))
        await self._finish(running)

    async def _finish(self, running: Running) -> None:
        """The answer is stored, however long that takes, and then over."""
        while True:
            try:
                await write(services.finish, running.id, running.text, dict(running.facts))
                break
            except DatabaseError as error:
                self._not_saved([running], error)
                await asyncio.sleep(RETRY_SECONDS)
        ANSWERS.labels(running.facts["status"]).inc()
        running.saved = True
        running.over.set()
        del self._running[running.id]
        running.tell()

    async def _save_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            changed = [r for r in self._running.values() if r.changed and r.facts["status"] in LIVE]
            if not changed:
                continue
            for running in changed:
                running.changed = False
            try:
                await write(services.save_progress, [(r.id, r.text, dict(r.facts)) for r in changed])
            except DatabaseError as error:
                self._not_saved(changed, error)
            else:
                for running in changed:
                    if not running.saved:
                        running.saved = True
                        running.tell()

    def _not_saved(self, these: Collection[Running], error: DatabaseError) -> None:
        UNSAVED.inc()
        log.error("%d answers could not be stored (%s); trying again", len(these), type(error).__name__)
        for running in these:
            running.saved, running.changed = False, True
            running.tell()

    async def run_set(self, service: Callable[..., Run], *args: Any) -> Run:
        """Returns the run of a question set that a service has stored, on its way."""

        async def store_and_begin() -> Run:
            run = await write(service, *args)
            task = self._sets[run.id] = self.spawn(self._answer_set(run))
            task.add_done_callback(lambda _: self._sets.pop(run.id, None))
            return run

        return await self.lasting(store_and_begin())

    async def stop_set(self, id: UUID) -> None:
        """The run is stopped, unless it has ended, and whether or not anybody works on it."""
        if task := self._sets.get(id):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await write(question_sets.stop_run, id)

    async def _answer_set(self, run: Run) -> None:
        try:
            await self._answer_questions(run)
        except Exception:  # a fault of ours must not leave a run that never ends
            log.exception("a run of a question set broke off")
            await self._interrupt(run)

    async def _interrupt(self, run: Run) -> None:
        """That the run broke off is stored, however long that takes where the disk is full."""
        while True:
            try:
                await write(question_sets.update_run, run.id, Status.INTERRUPTED)
                return
            except DatabaseError as error:
                UNSAVED.inc()
                log.error("the end of a run could not be stored (%s); trying again", type(error).__name__)
                await asyncio.sleep(RETRY_SECONDS)

    async def _answer_questions(self, run: Run) -> None:
        """Asks what has no answer yet, a few at once, and stores the answers as they come."""
        questions, user = await sync_to_async(_remaining, thread_sensitive=False)(run)
        await write(question_sets.update_run, run.id, Status.RUNNING)
        for at in range(0, len(questions), SET_AT_ONCE):
            part = questions[at : at + SET_AT_ONCE]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._answer_one(run, question, user)) for question in part]
            ends = [task.result() for task in tasks]
            answers = [
                answer
                for question, end in zip(part, ends, strict=True)
                if (answer := _run_answer(run, question, end)) is not None
            ]
            weights = next((end.weights for end in ends if isinstance(end, Done)), run.weights)
            failed = next((end for end in ends if isinstance(end, Failed) and end.code != UNREADABLE), None)
            if failed is not None:
                facts = {"weights": weights, "error_message": failed.message}
                await write(question_sets.update_run, run.id, Status.ERROR, answers, **facts)
                return
            await write(question_sets.update_run, run.id, Status.RUNNING, answers, weights=weights)
        await write(question_sets.update_run, run.id, Status.DONE)

    async def _answer_one(self, run: Run, question: Question, user: str) -> Done | Failed:
        context = question.passage.text if run.with_context else None
        id = f"{run.id}/{question.id}"
        request = QARequest(id, run.model, question.text, context, Settings(max_new_tokens=64), user)
        while True:
            end = await self.end_of(request)
            if not (isinstance(end, Failed) and end.code == "busy"):
                return end
            await asyncio.sleep(end.retry_after or RETRY_SECONDS)

    async def end_of(self, request: Request) -> Done | Failed:
        """Returns the last event of a request that nobody watches; it is cancelled where the caller is."""
        end: Done | Failed = Failed(request.id, "engine", "the engine gave no answer")
        async with contextlib.aclosing(self.engine.submit(request)) as events:
            async for event in events:
                if isinstance(event, Done | Failed):
                    end = event
        return end


def _remaining(run: Run) -> tuple[list[Question], str]:
    try:
        return selectors.unanswered(run), str(run.set.owner_id)
    finally:
        connections.close_all()


def _run_answer(run: Run, question: Question, end: Done | Failed) -> RunAnswer | None:
    """Returns what is stored of an answer; one that broke off is asked anew when the run goes on."""
    if isinstance(end, Failed) and end.code != UNREADABLE:
        return None
    text, probability, skipped = (end.text, end.probability, "") if isinstance(end, Done) else ("", None, end.message)
    scores = score(text, [answer["text"] for answer in question.answers])
    scores = {name: value / 100 for name, value in scores.items()}
    return RunAnswer(run=run, question=question, text=text, probability=probability, skipped=skipped, **scores)


hub = Hub()
"""Of this process; `babl.web.asgi` opens it when the server starts."""
