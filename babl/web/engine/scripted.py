"""An engine without models, for tests and load tests: it writes what the prompt says, as slowly as the prompt says.

A prompt may begin with words such as `tokens=500 delay=0.05`; the rest of it, over and over, is the answer:

* tokens=N: so many words (default 20, at most max_new_tokens); delay=S: seconds before each (default 0.02).
* loading=S, reading=S: seconds before the first word.
* fail=CODE: in place of the words behind the first `after=N`, the request fails; fail=crash ends the process.

A question with a context is answered with the first words of the context, as many as `tokens` (default 3).
"""

import asyncio
import math
import os
import re
from collections.abc import Awaitable, Callable
from typing import get_args

import psutil

from babl.errors import UserError
from babl.web.engine.fair_queue import MAX_RUNNING, MAX_WAITING, FairQueue, queue_full
from babl.web.engine.protocol import (
    ChatRequest,
    CompletionRequest,
    Delta,
    Done,
    Event,
    Failed,
    FailureCode,
    FinishReason,
    Loading,
    ModelState,
    Queued,
    Reading,
    Request,
    Stats,
    TokenCount,
)
from babl.web.engine.spans import locate

SETTING = re.compile(r"(tokens|after)=\d+|(delay|loading|reading)=(\d+\.?\d*|\.\d+)|fail=[a-z]+")
CONTEXT = 4096  # words that it claims to read
MODEL = "scripted"


def script_of(request: Request) -> str:
    """Returns the text of a request that is its script."""
    if isinstance(request, ChatRequest):
        return request.messages[-1].content if request.messages else ""
    if isinstance(request, CompletionRequest):
        return request.prompt if isinstance(request.prompt, str) else " ".join(map(str, request.prompt))
    return request.question


def parse(text: str) -> tuple[dict[str, str], list[str]]:
    """Returns the settings at the beginning of a script, and the words after them."""
    words, script = text.split(), {}
    while words and SETTING.fullmatch(words[0]):
        key, _, value = words.pop(0).partition("=")
        script[key] = value
    return script, words or ["word"]


class ScriptedScheduler:
    """Takes the place of a `Scheduler`; the arguments are the same, without folders."""

    def __init__(self, emit: Callable[[Event], None], max_waiting: int = MAX_WAITING, max_running: int = MAX_RUNNING):
        self.emit, self.max_waiting, self.max_running = emit, max_waiting, max_running
        self.loaded = False
        self.steps = 0
        self._waiting: FairQueue[Request] = FairQueue()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._written: dict[str, list[str]] = {}
        self._drained: Callable[[], Awaitable[None]]

    def submit(self, request: Request) -> None:
        """See `Scheduler.submit`."""
        if request.id in self._running or any(waiting.id == request.id for waiting in self._waiting):
            return
        if len(self._waiting) >= self.max_waiting:
            self.emit(queue_full(request.id, len(self._waiting), 1.0))
            return
        self._waiting.add(request)
        self.emit(Queued(request.id, [waiting.id for waiting in self._waiting].index(request.id)))
        self._start_waiting()

    def _start_waiting(self) -> None:
        while len(self._running) < self.max_running:
            request = self._waiting.take(lambda _: True)
            if request is None:
                return
            self._running[request.id] = asyncio.create_task(self._answer(request))

    def cancel(self, id: str) -> None:
        """See `Scheduler.cancel`."""
        if self._waiting.remove(id) is not None:
            self.emit(Done(id, "", "cancelled"))
        elif id in self._running:
            self._running[id].cancel()
            self._end(id, Done(id, "".join(self._written.get(id, [])), "cancelled", len(self._written.get(id, []))))

    def cancel_all(self) -> None:
        """See `Scheduler.cancel_all`."""
        for id in [*(waiting.id for waiting in self._waiting), *self._running]:
            self.cancel(id)

    async def count(self, request: Request) -> TokenCount:
        """Returns the number of words, as tokens."""
        _, words = parse(script_of(request))
        context = getattr(request, "context", None) or ""
        number = len(words) + len(context.split())
        return TokenCount(min(number, CONTEXT), CONTEXT, max(0, number - CONTEXT), 1)

    async def models(self) -> list[ModelState]:
        """Returns the only model."""
        return [ModelState(MODEL, "llama", 0, 0, CONTEXT, "loaded" if self.loaded else "unloaded")]

    async def load(self, model: str) -> None:
        """Says that the model is loaded from now on."""
        if model != MODEL:
            raise UserError(f"no model {model!r}")
        self.loaded = True

    async def unload(self, model: str) -> None:
        """Says that the model is unloaded from now on."""
        if self._running:
            raise UserError(f"{model} is writing {len(self._running)} answers; stop them first")
        self.loaded = False

    async def stats(self) -> Stats:
        """Returns figures of the process."""
        rss = psutil.Process().memory_info().rss
        return Stats(len(self._waiting), len(self._running), self.steps, rss, os.getpid())

    async def run(self, drained: Callable[[], Awaitable[None]]) -> None:
        """Never returns; each request has a task of its own."""
        self._drained = drained
        await asyncio.get_running_loop().create_future()

    def _end(self, id: str, event: Event) -> None:
        self.emit(event)
        self._running.pop(id, None)
        self._written.pop(id, None)
        self._start_waiting()

    async def _answer(self, request: Request) -> None:
        loop = asyncio.get_running_loop()
        script, words = parse(script_of(request))
        context = getattr(request, "context", None) or None
        if context:
            words = context.split()
        number = min(int(script.get("tokens", 3 if context else 20)), request.settings.max_new_tokens)
        failing = int(script.get("after", 0)) if "fail" in script else number
        if request.model != MODEL:
            self._end(request.id, Failed(request.id, "model", f"no model {request.model!r}"))
            return
        if not self.loaded or "loading" in script:
            self.emit(Loading(request.id, MODEL))
            await asyncio.sleep(float(script.get("loading", 0)))
            self.loaded = True
        begun = loop.time()
        counted = await self.count(request)
        self.emit(Reading(request.id, counted.prompt_tokens, 1, counted.cut_tokens))
        await asyncio.sleep(float(script.get("reading", 0)))
        written = self._written[request.id] = []
        for i in range(min(number, failing)):
            await asyncio.sleep(float(script.get("delay", 0.02)))
            await self._drained()
            self.steps += 1
            written.append(words[i % len(words)] if i == 0 else f" {words[i % len(words)]}")
            self.emit(Delta(request.id, written[-1], len(written)))
        if "fail" in script:
            self._fail(request.id, script["fail"])
            return
        text, log_prob = "".join(written), -0.1 * len(written)
        span = locate(text, context) if context else None
        finish: FinishReason = "eos" if number < request.settings.max_new_tokens else "length"
        seconds = loop.time() - begun
        done = Done(request.id, text, finish, number, log_prob, math.exp(log_prob), span, seconds, MODEL, MODEL)
        self._end(request.id, done)

    def _fail(self, id: str, code: str) -> None:
        if code == "crash":
            os._exit(70)
        known: FailureCode = next((known for known in get_args(FailureCode) if known == code), "engine")
        self._end(id, Failed(id, known, f"the script says fail={code}", 1.0 if known == "busy" else None))
