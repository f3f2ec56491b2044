"""What the engine process does with requests: it queues them, answers those that are there together, and takes turns.

Each model writes in two decodings, of questions and of the rest, which requests join at the boundaries of steps; the
prompts of those who come are read apart, in parts that take a fraction of a second. One step of one decoding at a
time: between any two of them a request may be cancelled, and another model has its turn.
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
from babl.web.engine.models import Loaded
from babl.web.engine.prepare import Prepared, prepare
from babl.web.engine.protocol import (
    Counted,
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
    TokenScore,
)
from babl.web.engine.spans import locate
from babl.web.engine.turns import MOST_RUNNING, MOST_WAITING, Turns

READ_TOKENS = (64, 2048)  # fewest and most prompt tokens of one step
READ_SECONDS = 0.25  # what a step of reading should take


@dataclass(eq=False)
class Task:
    """A request on its way."""

    request: Request
    position: int = -1  # in the queue, as last told
    told_loading: bool = False
    prepared: Prepared | None = None
    rows: list[Row] = field(default_factory=list)
    begun: float = 0.0

    @property
    def id(self) -> str:
        """Of the request."""
        return self.request.id

    @property
    def user(self) -> str:
        """Whose request it is."""
        return self.request.user


class Desk:
    """A model in memory, and those it answers."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        self.tasks: list[Task] = []
        self.reading: list[Decoding] = []
        self.writing: dict[bool, Decoding] = {}  # whether it drafts, as questions do -> those who write
        self.read_tokens = READ_TOKENS[0]
        self._turn = 0

    def cache_bytes(self, *tasks: Task) -> int:
        """Returns what keys and values take of those answered and of these tasks; each row has the longest's room."""
        rooms = [room for task in (*self.tasks, *tasks) if task.prepared for room in task.prepared.rooms()]
        longest = min(max(rooms, default=0), self.loaded.reader.context or sys.maxsize)
        return len(rooms) * longest * self.loaded.engine.cache_bytes

    def begin(self, tasks: list[Task]) -> None:
        """The tasks' prompts are going to be read, those of like length together."""
        waiting = []
        for task in tasks:
            assert task.prepared is not None
            waiting += [(task, ids) for ids in task.prepared.prompts]
        waiting.sort(key=lambda item: (_kind(item[0]), len(item[1])))
        batch: list[tuple[Task, list[int]]] = []
        for item in waiting:
            alike = not batch or _kind(batch[0][0]) == _kind(item[0])
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
        """One of the decodings has made a step; they take turns."""
        # Some may be done by a cancel.
        self.reading = [decoding for decoding in self.reading if not decoding.done]
        self.writing = {drafts: decoding for drafts, decoding in self.writing.items() if not decoding.done}
        # Of those to be read, the newest has its turn beside the oldest: who sends hundreds of windows holds nobody up.
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
        might = int(min(max(READ_SECONDS * tokens / (time.perf_counter() - started), READ_TOKENS[0]), READ_TOKENS[1]))
        if tokens > self.read_tokens // 2 or might > self.read_tokens:  # a short prompt says little of a long one
            self.read_tokens = might
        if not decoding.read:
            return
        self.reading.remove(decoding)
        drafts = rows[0].config.prompt_lookup_num_tokens > 0
        others = self.writing.get(drafts)
        if others is None or others.done:
            self.writing[drafts] = decoding
        elif not decoding.done:
            others.join(decoding)


def _kind(task: Task) -> tuple[bool, bool]:
    """Whether the task drafts, and whether its prompt is scored: those that are read together are alike in both."""
    assert task.prepared is not None
    return task.prepared.config.prompt_lookup_num_tokens > 0, task.prepared.config.echo


class Scheduler:
    """Answers requests with models from folders.

    Args:
        folders: Searched for models.
        emit: Called with every event.
        device: As of `Engine.load`.
        dtype: Likewise.
        most_waiting: Requests in the queue; more are refused as "busy".
        most_running: Requests answered at once; one user has at most half of the places.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        emit: Callable[[Event], None],
        device: str = "auto",
        dtype: str = "auto",
        most_waiting: int = MOST_WAITING,
        most_running: int = MOST_RUNNING,
    ):
        self.folders, self.emit, self.device, self.dtype = folders, emit, device, dtype
        self.most_waiting, self.most_running = most_waiting, most_running
        self.steps = 0
        self._waiting: Turns[Task] = Turns()
        self._desks: dict[str, Desk] = {}  # the model whose turn is next comes first
        self._loads: dict[str, asyncio.Task[str]] = {}
        self._one_load = asyncio.Lock()
        self._readers: dict[str, Reader] = {}
        self._room = 0  # bytes that caches may take
        self._seconds = 1.0  # that an answer takes, lately
        self._awake = asyncio.Event()

    def submit(self, request: Request) -> None:
        """The request is queued, or refused; one whose id is there already changes nothing."""
        if any(task.id == request.id for task in (*self._waiting, *self._running())):
            return
        if len(self._waiting) >= self.most_waiting:
            self.emit(busy(request.id, len(self._waiting), self._seconds))
            return
        self._waiting.add(Task(request))
        self._tell_positions()
        self._awake.set()

    def cancel(self, id: str) -> None:
        """The request ends with what is written; an unknown id changes nothing."""
        waiting = self._waiting.remove(id)
        if waiting is not None:
            self.emit(Done(id, "", "cancelled"))
            self._tell_positions()
        for desk in self._desks.values():
            for task in list(desk.tasks):
                if task.id == id:
                    for row in task.rows:
                        row.cancel()
                    self._report(desk)

    def cancel_all(self) -> None:
        """Every request has ended."""
        for task in (*self._waiting, *self._running()):
            self.cancel(task.id)

    async def count(self, request: Request) -> Counted:
        """Returns what the request would take.

        Raises:
            UserError: Its model is unusable, or it cannot be answered.
        """
        return prepare(request, await self._reader(request.model)).counted()

    async def models(self) -> list[ModelState]:
        """Returns every model and its state."""
        found = await asyncio.to_thread(models.find_models, self.folders)
        states = []
        for name, folder in found.items():
            state = await asyncio.to_thread(models.model_state, name, folder, self.device, self.dtype)
            if name in self._desks:
                state = _with(state, "loaded", self._desks[name].loaded.memory)
            elif name in self._loads:
                state = _with(state, "loading", state.memory)
            states.append(state)
        gone = [name for name in self._desks if name not in found]
        return states + [ModelState(name, state="loaded", memory=self._desks[name].loaded.memory) for name in gone]

    async def load(self, model: str) -> None:
        """The model is in memory.

        Raises:
            UserError: It is unusable, or the free memory is too small.
        """
        reason = "" if model in self._desks else await asyncio.shield(self._load(model))
        if reason:
            raise UserError(reason)

    async def unload(self, model: str) -> None:
        """The model is not in memory.

        Raises:
            UserError: It is being loaded, or is answering.
        """
        if model in self._loads:
            raise UserError(f"{model} is being loaded; unload it afterwards")
        if model in self._desks and self._desks[model].tasks:
            raise UserError(f"{model} is writing {len(self._desks[model].tasks)} answers; stop them first")
        self._desks.pop(model, None)
        self._readers.pop(model, None)
        models.give_back_memory()

    async def stats(self) -> Stats:
        """Returns how the process is."""
        rss = psutil.Process().memory_info().rss
        return Stats(len(self._waiting), len(self._running()), self.steps, rss, os.getpid())

    async def run(self, drained: Callable[[], Awaitable[None]]) -> None:
        """Works, for ever; between steps `drained` is awaited, so that they wait for who does not keep up."""
        while True:
            if not self.turn():
                self._awake.clear()
                await self._awake.wait()
            await drained()
            # The first pass of the event loop reads what has come, such as a cancel; in the second it has been done.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def turn(self) -> bool:
        """Returns whether there was anything to do; if so, one step of one decoding is made."""
        self._admit()
        name = next((name for name, desk in self._desks.items() if desk.tasks), None)
        if name is None:
            return False
        desk = self._desks[name] = self._desks.pop(name)  # the other models come first, next time
        self.steps += 1
        try:
            desk.step()
            self._report(desk)
        except FloatingPointError as error:
            self._give_up(name, "broken", f"{name}: {str(error).removeprefix(f'{desk.loaded.engine.name}: ')}")
        except Exception as error:  # whatever it is, the other models' answers go on
            traceback.print_exc(file=sys.stderr)
            self._give_up(name, "engine", f"{name} broke down ({type(error).__name__})")
        return True

    def _give_up(self, name: str, code: FailureCode, reason: str) -> None:
        """What the model was answering has failed; it is asked anew."""
        for task in self._desks[name].tasks:
            self.emit(Failed(task.id, code, reason))
        self._desks[name] = Desk(self._desks[name].loaded)

    def _admit(self) -> None:
        """Those whose turn it is, and whose model is in memory, are going to be read."""
        admitted: dict[str, list[Task]] = {}
        running = self._running()
        while len(running) < self.most_running:
            task = self._waiting.take(lambda task: self._may_go(task, running))
            if task is None:
                break
            try:
                loaded = self._desks[task.request.model].loaded
                task.prepared = prepare(task.request, loaded.reader)
                task.prepared.check()
                for ids in task.prepared.prompts:
                    loaded.engine.check(ids)
                if not self._has_room(task, [*running, task]):
                    self._waiting.give_back(task)
                    break
            except UserError as error:
                self.emit(Failed(task.id, "prompt", str(error)))
                continue
            except Exception as error:  # a chat template is a stranger's code
                traceback.print_exc(file=sys.stderr)
                self.emit(Failed(task.id, "prompt", f"the prompt cannot be made ({type(error).__name__})"))
                continue
            task.begun = time.monotonic()
            running.append(task)
            admitted.setdefault(task.request.model, []).append(task)
            prepared = task.prepared
            self.emit(Reading(task.id, prepared.tokens, len(prepared.prompts), prepared.cut_tokens))
        for name, tasks in admitted.items():
            self._desks[name].begin(tasks)
        absent = next((task for task in self._waiting if task.request.model not in self._desks), None)
        if absent is not None and not self._loads:
            self._load(absent.request.model)
        for task in self._waiting:
            if task.request.model in self._loads and not task.told_loading:
                task.told_loading = True
                self.emit(Loading(task.id, task.request.model))
        self._tell_positions()

    def _has_room(self, task: Task, running: list[Task]) -> bool:
        """Returns whether there is memory for the keys and values of these, of which the task is the last.

        Raises:
            UserError: There is too little for the task alone.
        """
        if len(running) == 1:  # what is free then is what caches may take
            self._room = free_memory(self._desks[task.request.model].loaded.engine.device.type) - SPARE
        needed = 0
        for name, desk in self._desks.items():
            new = [each for each in running if each.request.model == name and each not in desk.tasks]
            needed += desk.cache_bytes(*new)
        if needed <= self._room:
            return True
        alone = Desk(self._desks[task.request.model].loaded).cache_bytes(task)
        if len(running) == 1 or alone > self._room:
            needed, free = -(-alone >> 20), max(0, self._room) >> 20
            what = f"the answer needs {needed:,} MiB for its keys and values, but {free:,} MiB are free"
            raise UserError(f"{what}; ask for fewer tokens")
        return False

    def _may_go(self, task: Task, running: list[Task]) -> bool:
        others = sum(other.user == task.user for other in running)
        return task.request.model in self._desks and others < max(1, self.most_running // 2)

    def _running(self) -> list[Task]:
        return [task for desk in self._desks.values() for task in desk.tasks]

    def _tell_positions(self) -> None:
        for position, task in enumerate(self._waiting):
            if position != task.position:
                task.position = position
                self.emit(Queued(task.id, position))

    def _load(self, model: str) -> asyncio.Task[str]:
        """Returns what reads the model into memory, and gives the reason where it cannot."""
        if model not in self._loads:
            self._loads[model] = asyncio.create_task(self._loading(model))
        return self._loads[model]

    async def _loading(self, model: str) -> str:
        reason = ""
        try:
            async with self._one_load:  # the memory that is free is compared with what one model needs
                loaded = await asyncio.to_thread(models.load_model, model, self.folders, self.device, self.dtype)
            self._desks[model] = Desk(loaded)
            self._room -= loaded.memory
        except UserError as error:
            reason = str(error)
        except Exception as error:  # such as memory that ran out after all
            traceback.print_exc(file=sys.stderr)
            reason = f"{model} cannot be loaded ({type(error).__name__})"
        finally:
            del self._loads[model]
            self._awake.set()
        if reason:
            for task in [task for task in self._waiting if task.request.model == model]:
                self._waiting.remove(task.id)
                self.emit(Failed(task.id, "model", reason))
            self._tell_positions()
        return reason

    async def _reader(self, model: str) -> Reader:
        if model in self._desks:
            return self._desks[model].loaded.reader
        if model not in self._readers:
            self._readers[model] = await asyncio.to_thread(models.read_reader, model, self.folders)
        return self._readers[model]

    def _report(self, desk: Desk) -> None:
        """What is new in the desk's answers is told; those that are whole have left it."""
        for task in list(desk.tasks):
            assert task.prepared is not None
            question = bool(task.prepared.windows)
            whole = all(row.finish for row in task.rows)
            piece, tokens = ("", 0) if question else (task.rows[0].piece(), len(task.rows[0].ids))
            done = _done(task, desk.loaded) if whole else None
            if done is not None and question:
                piece, tokens = done.text, done.tokens
            if piece:
                self.emit(Delta(task.id, piece, tokens))
            if done is not None:
                desk.tasks.remove(task)
                self._seconds += (done.seconds - self._seconds) / 8
                self.emit(done)
        if not desk.tasks:  # what they had in memory is not kept for the next ones
            desk.reading, desk.writing = [], {}


def _done(task: Task, loaded: Loaded) -> Done:
    """Returns the answer; of a question's windows, the likeliest one's."""
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
        time.monotonic() - task.begun,
        loaded.weights,
        loaded.tokenizer,
        _texts(answer.scored, loaded.engine.tokenizer),
    )


def _texts(scored: Sequence[Scored], tokenizer: Tokenizer) -> list[TokenScore]:
    """Returns the tokens as texts: what each adds to the one before it, control tokens as they are written."""
    found = []
    for before, token in zip((None, *scored), scored, strict=False):
        start = [] if before is None else [before.id]
        length = len(tokenizer.decode(start))

        def text(id: int, start: list[int] = start, length: int = length) -> str:
            return tokenizer.written(id) or tokenizer.decode([*start, id])[length:]

        likeliest = [(text(id), value) for id, value in token.likeliest]
        found.append(TokenScore(text(token.id), token.log_prob, likeliest))
    return found


def busy(id: str, waiting: int, seconds: float) -> Failed:
    """Returns the refusal of a request because `waiting` others are there; answers take `seconds`."""
    return Failed(id, "busy", f"{waiting} requests are waiting already; ask again later", max(1.0, math.ceil(seconds)))


def _with(state: ModelState, now: LoadState, memory: int) -> ModelState:
    return msgspec.structs.replace(state, state=now, memory=memory)
