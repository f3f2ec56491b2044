"""Schedules requests: queues them, batches those that run on the same model, and lets models take turns.

Each model has two decodings, one of questions and one of all other requests, which requests join between steps. Prompts
of new requests are read apart, in chunks of a fraction of a second. One step of one decoding runs at a time: between
any two steps a request may be cancelled, and another model has its turn.
"""

import asyncio
import math
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil

from babl.errors import UserError
from babl.generation.conversation import Reader
from babl.generation.engine import Decoding
from babl.generation.memory import SPARE, free_memory
from babl.generation.row import Row, Scored
from babl.text import Tokenizer
from babl.text.prompts import clean_answer
from babl.web.engine import models
from babl.web.engine.fair_queue import MAX_RUNNING, MAX_WAITING, FairQueue, queue_full
from babl.web.engine.models import Loaded
from babl.web.engine.prepare import Prepared, prepare
from babl.web.engine.protocol import (
    Delta,
    Done,
    Event,
    Failed,
    FailureCode,
    Loading,
    LoadState,
    ModelState,
    Queued,
    Reading,
    Request,
    Stats,
    TokenCount,
    TokenScore,
)
from babl.web.engine.spans import locate

READ_TOKENS = (64, 2048)  # fewest and most prompt tokens of one step
READ_SECONDS = 0.25  # that a step of reading should take


@dataclass(eq=False)
class Task:
    """A request in the queue, or being answered."""

    request: Request
    position: int = -1  # in the queue, as last sent
    loading_sent: bool = False
    prepared: Prepared | None = None
    rows: list[Row] = field(default_factory=list)
    started: float = 0.0

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def user(self) -> str:
        """Who asks."""
        return self.request.user


class ModelWorker:
    """A loaded model and the requests that it answers."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        self.tasks: list[Task] = []
        self.reading: list[Decoding] = []
        self.writing: dict[bool, Decoding] = {}  # by whether they draft, as questions do
        self.read_tokens = READ_TOKENS[0]
        self._turn = 0

    def cache_bytes(self, *tasks: Task) -> int:
        """Returns the bytes of keys and values for its tasks and these; every row takes as much as the longest."""
        prepared = [task.prepared for task in (*self.tasks, *tasks) if task.prepared]
        lengths = [length for each in prepared for length in each.cache_lengths()]
        longest = min(max(lengths, default=0), self.loaded.reader.context or sys.maxsize)
        return len(lengths) * longest * self.loaded.engine.cache_bytes

    def start(self, tasks: list[Task]) -> None:
        """Starts to read the tasks' prompts, those of similar length together."""
        waiting = []
        for task in tasks:
            assert task.prepared is not None
            waiting += [(task, ids) for ids in task.prepared.prompts]
        waiting.sort(key=lambda item: (_batch_key(item[0]), len(item[1])))
        batch: list[tuple[Task, list[int]]] = []
        for item in waiting:
            alike = not batch or _batch_key(batch[0][0]) == _batch_key(item[0])
            if batch and not (alike and (len(batch) + 1) * len(item[1]) <= self.read_tokens):
                self._read_together(batch)
                batch = []
            batch.append(item)
        if batch:
            self._read_together(batch)
        self.tasks += tasks

    def _read_together(self, batch: list[tuple[Task, list[int]]]) -> None:
        configs = [task.prepared.config for task, _ in batch if task.prepared]
        decoding = self.loaded.engine.begin([ids for _, ids in batch], configs, self.read_tokens)
        for (task, _), row in zip(batch, decoding.rows, strict=True):
            task.rows.append(row)
        self.reading.append(decoding)

    def step(self) -> None:
        """Makes a step of one of the decodings, which take turns."""
        # Cancelled ones are done.
        self.reading = [decoding for decoding in self.reading if not decoding.done]
        self.writing = {drafts: decoding for drafts, decoding in self.writing.items() if not decoding.done}
        # Of those to be read, the oldest and the newest take turns: hundreds of windows of one request hold up nobody.
        turns = [*self.writing.values(), *self.reading[:1], *self.reading[1:][-1:]]
        if not turns:
            return
        self._turn = (self._turn + 1) % len(turns)
        decoding = turns[self._turn]
        if decoding.read:
            decoding.step()
        else:
            self._read(decoding)

    def _read(self, decoding: Decoding) -> None:
        started, rows = time.perf_counter(), decoding.rows
        tokens = min(self.read_tokens, len(rows) * max(len(row.prompt) for row in rows))
        decoding.step()
        affordable = READ_SECONDS * tokens / (time.perf_counter() - started)
        affordable = min(max(int(affordable), READ_TOKENS[0]), READ_TOKENS[1])
        if tokens > self.read_tokens // 2 or affordable > self.read_tokens:  # short prompts say little about long ones
            self.read_tokens = affordable
        if not decoding.read:
            return
        self.reading.remove(decoding)
        drafts = rows[0].config.prompt_lookup_num_tokens > 0
        others = self.writing.get(drafts)
        if others is None or others.done:
            self.writing[drafts] = decoding
        elif not decoding.done:
            others.join(decoding)


def _batch_key(task: Task) -> tuple[bool, bool]:
    """Returns whether the task drafts and whether its prompt is scored; prompts read together agree in both."""
    assert task.prepared is not None
    return task.prepared.config.prompt_lookup_num_tokens > 0, task.prepared.config.echo


class Scheduler:
    """Answers requests with the models of some folders.

    Args:
        folders: Searched for models.
        emit: Called with every event.
        device: As in `Engine.load`.
        dtype: Likewise.
        max_waiting: Requests in the queue; further ones fail as "busy".
        max_running: Requests answered at once; half of them at most are of one user.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        emit: Callable[[Event], None],
        device: str = "auto",
        dtype: str = "auto",
        max_waiting: int = MAX_WAITING,
        max_running: int = MAX_RUNNING,
    ):
        self.folders, self.emit, self.device, self.dtype = folders, emit, device, dtype
        self.max_waiting, self.max_running = max_waiting, max_running
        self.steps = 0
        self._waiting: FairQueue[Task] = FairQueue()
        self._workers: dict[str, ModelWorker] = {}  # the one whose turn is next first
        self._loads: dict[str, asyncio.Task[str]] = {}
        self._load_lock = asyncio.Lock()
        self._readers: dict[str, Reader] = {}
        self._cache_budget = 0  # bytes for keys and values
        self._mean_seconds = 1.0  # of recent answers
        self._wake = asyncio.Event()

    def submit(self, request: Request) -> None:
        """Queues or refuses a request; a second one with the same id changes nothing."""
        if any(task.id == request.id for task in (*self._waiting, *self._running())):
            return
        if len(self._waiting) >= self.max_waiting:
            self.emit(queue_full(request.id, len(self._waiting), self._mean_seconds))
            return
        self._waiting.add(Task(request))
        self._send_positions()
        self._wake.set()

    def cancel(self, id: str) -> None:
        """Ends a request with what is written so far; an unknown id changes nothing."""
        waiting = self._waiting.remove(id)
        if waiting is not None:
            self.emit(Done(id, "", "cancelled"))
            self._send_positions()
        for worker in self._workers.values():
            for task in list(worker.tasks):
                if task.id == id:
                    for row in task.rows:
                        row.cancel()
                    self._send_news(worker)

    def cancel_all(self) -> None:
        """Ends every request."""
        for task in (*self._waiting, *self._running()):
            self.cancel(task.id)

    async def count(self, request: Request) -> TokenCount:
        """Returns the tokens that a request would take.

        Raises:
            UserError: Its model is unusable, or it cannot be answered.
        """
        return prepare(request, await self._reader(request.model)).count()

    async def models(self) -> list[ModelState]:
        """Returns every model with its state."""
        found = await asyncio.to_thread(models.find_models, self.folders)
        states = []
        for name, folder in found.items():
            state = await asyncio.to_thread(models.model_state, name, folder, self.device, self.dtype)
            if name in self._workers:
                state = _with(state, "loaded", self._workers[name].loaded.memory)
            elif name in self._loads:
                state = _with(state, "loading", state.memory)
            states.append(state)
        gone = [name for name in self._workers if name not in found]
        return states + [ModelState(name, state="loaded", memory=self._workers[name].loaded.memory) for name in gone]

    async def load(self, model: str) -> None:
        """Loads a model.

        Raises:
            UserError: It is unusable, or there is too little free memory.
        """
        reason = "" if model in self._workers else await asyncio.shield(self._load(model))
        if reason:
            raise UserError(reason)

    async def unload(self, model: str) -> None:
        """Unloads a model.

        Raises:
            UserError: It is being loaded, or is answering.
        """
        if model in self._loads:
            raise UserError(f"{model} is being loaded; unload it afterwards")
        if model in self._workers and self._workers[model].tasks:
            raise UserError(f"{model} is writing {len(self._workers[model].tasks)} answers; stop them first")
        self._workers.pop(model, None)
        self._readers.pop(model, None)
        models.release_memory()

    async def stats(self) -> Stats:
        """Returns figures of the process."""
        rss = psutil.Process().memory_info().rss
        return Stats(len(self._waiting), len(self._running()), self.steps, rss, os.getpid())

    async def run(self, drained: Callable[[], Awaitable[None]]) -> None:
        """Runs for ever; awaits `drained` between steps, so that it waits for a reader that does not keep up."""
        while True:
            if not self.step():
                self._wake.clear()
                await self._wake.wait()
            await drained()
            # The first pass of the event loop reads messages, such as a cancel; the second handles them.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def step(self) -> bool:
        """Makes one step of one decoding; returns whether there was anything to do."""
        self._start_waiting()
        name = next((name for name, worker in self._workers.items() if worker.tasks), None)
        if name is None:
            return False
        worker = self._workers[name] = self._workers.pop(name)  # the other models come first, next time
        self.steps += 1
        try:
            worker.step()
            self._send_news(worker)
        except FloatingPointError as error:
            self._fail_worker(name, "broken", f"{name}: {str(error).removeprefix(f'{worker.loaded.engine.name}: ')}")
        except Exception as error:  # whatever it is, the other models go on
            traceback.print_exc(file=sys.stderr)
            self._fail_worker(name, "engine", f"{name} crashed ({type(error).__name__})")
        return True

    def _fail_worker(self, name: str, code: FailureCode, reason: str) -> None:
        """Fails the requests that a model was answering; the model stays loaded."""
        for task in self._workers[name].tasks:
            self.emit(Failed(task.id, code, reason))
        self._workers[name] = ModelWorker(self._workers[name].loaded)

    def _start_waiting(self) -> None:
        """Starts the requests whose turn it is and whose model is loaded, and loads the next model that is needed."""
        started: dict[str, list[Task]] = {}
        running = self._running()
        while len(running) < self.max_running:
            task = self._waiting.take(lambda task: self._may_start(task, running))
            if task is None:
                break
            try:
                loaded = self._workers[task.request.model].loaded
                task.prepared = prepare(task.request, loaded.reader)
                task.prepared.check()
                for ids in task.prepared.prompts:
                    loaded.engine.check(ids)
                if not self._fits_in_memory(task, [*running, task]):
                    self._waiting.put_back(task)
                    break
            except UserError as error:
                self.emit(Failed(task.id, "prompt", str(error)))
                continue
            except Exception as error:  # a chat template is foreign code
                traceback.print_exc(file=sys.stderr)
                self.emit(Failed(task.id, "prompt", f"the prompt cannot be made ({type(error).__name__})"))
                continue
            task.started = time.monotonic()
            running.append(task)
            started.setdefault(task.request.model, []).append(task)
            prepared = task.prepared
            self.emit(Reading(task.id, prepared.tokens, len(prepared.prompts), prepared.cut_tokens))
        for name, tasks in started.items():
            self._workers[name].start(tasks)
        absent = next((task for task in self._waiting if task.request.model not in self._workers), None)
        if absent is not None and not self._loads:
            self._load(absent.request.model)
        for task in self._waiting:
            if task.request.model in self._loads and not task.loading_sent:
                task.loading_sent = True
                self.emit(Loading(task.id, task.request.model))
        self._send_positions()

    def _fits_in_memory(self, task: Task, running: list[Task]) -> bool:
        """Returns whether there is memory for the keys and values of the running tasks, the task included.

        Raises:
            UserError: There is too little for the task alone.
        """
        if len(running) == 1:  # nothing else runs: all free memory is for keys and values
            self._cache_budget = free_memory(self._workers[task.request.model].loaded.engine.device.type) - SPARE
        needed = 0
        for name, worker in self._workers.items():
            new = [each for each in running if each.request.model == name and each not in worker.tasks]
            needed += worker.cache_bytes(*new)
        if needed <= self._cache_budget:
            return True
        alone = ModelWorker(self._workers[task.request.model].loaded).cache_bytes(task)
        if len(running) == 1 or alone > self._cache_budget:
            needed, free = -(-alone >> 20), max(0, self._cache_budget) >> 20
            what = f"the answer needs {needed:,} MiB for its keys and values, but {free:,} MiB are free"
            raise UserError(f"{what}; ask for fewer tokens")
        return False

    def _may_start(self, task: Task, running: list[Task]) -> bool:
        others = sum(other.user == task.user for other in running)
        return task.request.model in self._workers and others < max(1, self.max_running // 2)

    def _running(self) -> list[Task]:
        return [task for worker in self._workers.values() for task in worker.tasks]

    def _send_positions(self) -> None:
        for position, task in enumerate(self._waiting):
            if position != task.position:
                task.position = position
                self.emit(Queued(task.id, position))

    def _load(self, model: str) -> asyncio.Task[str]:
        """Starts to load a model; the task returns the reason why it cannot be loaded, or an empty string."""
        if model not in self._loads:
            self._loads[model] = asyncio.create_task(self._loading(model))
        return self._loads[model]

    async def _loading(self, model: str) -> str:
        reason = ""
        try:
            async with self._load_lock:  # the check of free memory is for one model at a time
                loaded = await asyncio.to_thread(models.load_model, model, self.folders, self.device, self.dtype)
            self._workers[model] = ModelWorker(loaded)
            self._cache_budget -= loaded.memory
        except UserError as error:
            reason = str(error)
        except Exception as error:  # such as running out of memory after all
            traceback.print_exc(file=sys.stderr)
            reason = f"{model} cannot be loaded ({type(error).__name__})"
        finally:
            del self._loads[model]
            self._wake.set()
        if reason:
            for task in [task for task in self._waiting if task.request.model == model]:
                self._waiting.remove(task.id)
                self.emit(Failed(task.id, "model", reason))
            self._send_positions()
        return reason

    async def _reader(self, model: str) -> Reader:
        if model in self._workers:
            return self._workers[model].loaded.reader
        if model not in self._readers:
            self._readers[model] = await asyncio.to_thread(models.load_reader, model, self.folders)
        return self._readers[model]

    def _send_news(self, worker: ModelWorker) -> None:
        """Sends what is new in a worker's answers, and removes those that are complete."""
        for task in list(worker.tasks):
            assert task.prepared is not None
            question = bool(task.prepared.windows)
            complete = all(row.finish for row in task.rows)
            piece, tokens = ("", 0) if question else (task.rows[0].piece(), len(task.rows[0].ids))
            done = _done(task, worker.loaded) if complete else None
            if done is not None and question:
                piece, tokens = done.text, done.tokens
            if piece:
                self.emit(Delta(task.id, piece, tokens))
            if done is not None:
                worker.tasks.remove(task)
                self._mean_seconds += (done.seconds - self._mean_seconds) / 8
                self.emit(done)
        if not worker.tasks:  # their keys and values are freed
            worker.reading, worker.writing = [], {}


def _done(task: Task, loaded: Loaded) -> Done:
    """Returns the answer; of a question's windows, the likeliest."""
    prepared = task.prepared
    assert prepared is not None
    answers = [row.answer() for row in task.rows]
    best = max(range(len(answers)), key=lambda i: answers[i].log_prob)
    answer, text, window = answers[best], answers[best].text, None
    finish = "cancelled" if any(a.finish == "cancelled" for a in answers) else answer.finish
    if prepared.windows:
        text, window = "" if finish == "cancelled" else clean_answer(text), prepared.windows[best]
    return Done(
        task.id,
        text,
        finish,
        len(answer.ids),
        answer.log_prob,
        math.exp(answer.log_prob),
        None if prepared.context is None else locate(text, prepared.context, window),
        time.monotonic() - task.started,
        loaded.weights,
        loaded.tokenizer,
        _texts(answer.scored, loaded.engine.tokenizer),
    )


def _texts(scored: Sequence[Scored], tokenizer: Tokenizer) -> list[TokenScore]:
    """Returns scores with texts for ids: what each token adds to the one before, control tokens by name."""
    found = []
    for before, token in zip((None, *scored), scored, strict=False):
        start = [] if before is None else [before.id]
        length = len(tokenizer.decode(start))

        def text(id: int, start: list[int] = start, length: int = length) -> str:
            return tokenizer.written(id) or tokenizer.decode([*start, id])[length:]

        likeliest = [(text(id), value) for id, value in token.likeliest]
        found.append(TokenScore(text(token.id), token.log_prob, likeliest))
    return found


def _with(state: ModelState, now: LoadState, memory: int) -> ModelState:
    return msgspec.structs.replace(state, state=now, memory=memory)
