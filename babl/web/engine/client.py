"""The web process's side: starts the engine process, talks to it, and starts it again when it has broken down.

Neither torch nor Django is imported here.
"""

import asyncio
import contextlib
import itertools
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from babl.web.engine.line import Line
from babl.web.engine.protocol import (
    Cancel,
    Count,
    Counted,
    Delta,
    Done,
    Event,
    Failed,
    FailureCode,
    FromEngine,
    GetStats,
    ListModels,
    Load,
    ModelState,
    ModelStates,
    Ready,
    Reply,
    Request,
    Stats,
    Unload,
    Unreadable,
)
from babl.web.engine.turns import MOST_RUNNING, MOST_WAITING

DEFAULT_FOLDERS = (Path("models"), Path("runs"))
START_SECONDS = 120.0  # that the engine process has to be ready
GRACE = 5.0  # seconds to end after it was asked to
WAITS = (0.0, 0.5, 2.0, 8.0, 30.0)  # seconds before each start after the last one that became ready
HOPELESS = 3  # starts in a row that failed, after which nobody is kept waiting
SOCKET_PATH_BYTES = 103  # that every system takes; Linux takes 107
MOST_HELD = 64  # requests kept while there is no engine process
BROKE_DOWN = "the engine broke down while it was answering, and is started again"

Truncation = asyncio.Queue["asyncio.Future[Exception | None]"]  # when each line that was made is lost
R = TypeVar("R")


class EngineError(Exception):
    """A call was refused, or the engine process broke down meanwhile; `failed` says which."""

    def __init__(self, failed: Failed):
        super().__init__(failed.message)
        self.failed = failed

    @property
    def code(self) -> FailureCode:
        """Of the failure."""
        return self.failed.code


class _Stream:
    """The events of a request that are not taken yet; pieces of text grow together, so a slow reader costs no more."""

    def __init__(self, request: Request):
        self.request = request
        self.sent = False
        self.events: deque[Event] = deque()
        self.news = asyncio.Event()

    def put(self, event: Event) -> None:
        if isinstance(event, Delta) and self.events and isinstance(self.events[-1], Delta):
            event = Delta(event.id, self.events.pop().text + event.text, event.tokens)  # type: ignore[union-attr]
        self.events.append(event)
        self.news.set()

    async def get(self) -> Event:
        while not self.events:
            self.news.clear()
            await self.news.wait()
        return self.events.popleft()


class EngineClient:
    """Answers through an engine process of its own.

    Args:
        folders: Searched for models.
        scripted: Whether to start `babl.web.engine.scripted` in place of models.
        device: As of `Engine.load`.
        dtype: Likewise.
        most_waiting: Requests in the queue.
        most_running: Requests answered at once.
    """

    def __init__(
        self,
        folders: Sequence[Path] = DEFAULT_FOLDERS,
        *,
        scripted: bool = False,
        device: str = "auto",
        dtype: str = "auto",
        most_waiting: int = MOST_WAITING,
        most_running: int = MOST_RUNNING,
    ):
        self._arguments = ["--device", device, "--dtype", dtype]
        self._arguments += ["--most-waiting", str(most_waiting), "--most-running", str(most_running)]
        self._arguments += ["--scripted"] if scripted else []
        self._arguments += [word for folder in folders for word in ("--models", str(folder.resolve()))]
        self.pid: int | None = None  # of the engine process, while it takes requests
        self.restarts = 0  # after it broke down
        self._streams: dict[str, _Stream] = {}
        self._calls: dict[str, asyncio.Future[Counted | ModelStates | Stats]] = {}
        self._call_ids = itertools.count()
        self._line: Line | None = None
        self._started: asyncio.Future[None]  # when the process of now says that it is ready
        self._settled = asyncio.Event()  # whether the process is ready, or hopeless
        self._replacing = False  # the process is ended on purpose, for its memory
        self._replacement: asyncio.Task[None] | None = None
        self._hopeless = ""  # why it cannot be started
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """The engine process is ready.

        Raises:
            EngineError: It cannot be started; that is tried again all the same, until `stop`.
        """
        self._supervisor = asyncio.create_task(self._supervise())
        await self._until_ready()

    async def stop(self) -> None:
        """The engine process has ended, and with it every answer."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        self._fail_all("the engine was stopped", sent_only=False)

    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """Returns the events of the request, which is on its way now; the last one is `Done` or `Failed`.

        Leaving the iteration before that, by `aclose`, cancels the request.

        Raises:
            ValueError: A request with this id is being answered.
        """
        if request.id in self._streams:
            raise ValueError(f"request {request.id} is being answered already")
        stream = self._streams[request.id] = _Stream(request)
        if self._hopeless or self._supervisor is None:
            self._end(Failed(request.id, "engine", self._hopeless or "the engine is not started"))
        elif self.pid is not None and not self._replacing:
            self._send(stream)
        elif sum(not stream.sent for stream in self._streams.values()) > MOST_HELD:
            self._end(Failed(request.id, "busy", "the engine is being started; ask again later", WAITS[2]))
        return self._events(stream)

    async def cancel(self, id: str) -> None:
        """The request ends at the engine's next step; an id that is not being answered changes nothing."""
        stream = self._streams.get(id)
        if stream is not None and not stream.sent:
            self._end(Done(id, "", "cancelled"))
        elif stream is not None and self._line is not None:
            self._line.send(Cancel(id))

    async def count(self, request: Request) -> Counted:
        """Returns what a request would take, by the tokenizer of its model.

        Raises:
            EngineError: Its model is unusable, or it cannot be answered.
        """
        return await self._call(lambda id: Count(id, request), Counted)

    async def models(self) -> list[ModelState]:
        """Returns every model of the folders, and its state."""
        return (await self._call(ListModels, ModelStates)).models

    async def load(self, model: str) -> None:
        """The model is in memory.

        Raises:
            EngineError: It is unusable, or the free memory is too small.
        """
        await self._call(lambda id: Load(id, model), ModelStates)

    async def unload(self, model: str) -> None:
        """The model is not in memory, and if it was the last one, the process is a new one that never had any.

        Raises:
            EngineError: It is being loaded, or is answering.
        """
        await self._call(lambda id: Unload(id, model), ModelStates)
        if not self._replacing and not self._streams:
            self._replacing = True  # who comes now is held until the new process is there
            self._settled.clear()
            self._replacement = asyncio.create_task(self._replace())
            await asyncio.shield(self._replacement)  # who asked for it may go away meanwhile
        await self._until_ready()

    async def _replace(self) -> None:
        """The process is about to end, unless somebody has loaded a model meanwhile."""
        if self._calls:
            await asyncio.wait(self._calls.values())
        try:
            left = (await self._ask(ListModels, ModelStates)).models
        except EngineError:
            return  # it has broken down, so it is replaced anyway
        if any(state.state in ("loading", "loaded") for state in left):
            self._replacing = False
            self._release()
        elif self._line is not None:
            self._line.close()

    async def stats(self) -> Stats:
        """Returns how the engine process is."""
        return await self._call(GetStats, Stats)

    async def _until_ready(self) -> None:
        """Returns once the engine process takes requests.

        Raises:
            EngineError: It cannot be started.
        """
        if self._supervisor is None:
            raise EngineError(Failed("", "engine", "the engine is not started"))
        while not self._settled.is_set():
            settled: asyncio.Future[Any] = asyncio.ensure_future(self._settled.wait())
            await asyncio.wait([settled, self._supervisor], return_when=asyncio.FIRST_COMPLETED)
            settled.cancel()
            if self._supervisor.done() and not self._hopeless:
                raise EngineError(Failed("", "engine", "the engine was stopped"))
        if self._hopeless:
            raise EngineError(Failed("", "engine", self._hopeless))

    async def _call(self, make: Callable[[str], msgspec.Struct], kind: type[R]) -> R:
        await self._until_ready()
        return await self._ask(make, kind)

    async def _ask(self, make: Callable[[str], msgspec.Struct], kind: type[R]) -> R:
        id = f"call-{next(self._call_ids)}"
        if self._line is None:
            raise EngineError(Failed(id, "engine", BROKE_DOWN))
        answer = self._calls[id] = asyncio.get_running_loop().create_future()
        try:
            self._line.send(make(id))
            result = await answer
        except ValueError as error:
            raise EngineError(Failed(id, "prompt", str(error))) from None
        finally:
            self._calls.pop(id, None)
        assert isinstance(result, kind)
        return result

    async def _events(self, stream: _Stream) -> AsyncGenerator[Event, None]:
        last = False
        try:
            while not last:
                event = await stream.get()
                last = isinstance(event, Done | Failed)
                yield event
        finally:
            if not last:
                await self.cancel(stream.request.id)

    def _release(self) -> None:
        """Who was held goes to the engine process, which is ready."""
        self._settled.set()
        for stream in [stream for stream in self._streams.values() if not stream.sent]:
            self._send(stream)

    def _send(self, stream: _Stream) -> None:
        assert self._line is not None
        try:
            self._line.send(stream.request)
            stream.sent = True
        except ValueError as error:
            self._end(Failed(stream.request.id, "prompt", str(error)))

    def _end(self, event: Done | Failed) -> None:
        stream = self._streams.pop(event.id, None)
        if stream is not None:
            stream.put(event)

    def _fail_all(self, reason: str, sent_only: bool) -> None:
        for id, stream in list(self._streams.items()):
            if stream.sent or not sent_only:
                self._end(Failed(id, "engine", reason))
        for id, call in self._calls.items():
            if not call.done():
                call.set_exception(EngineError(Failed(id, "engine", reason)))

    def _receive(self, message: FromEngine | Unreadable) -> None:
        if isinstance(message, Unreadable):
            print(f"babl engine: what it said of {message.id} cannot be read ({message.reason})", file=sys.stderr)
            message = Failed(message.id, "engine", "what the engine said cannot be read")
        if isinstance(message, Failed) and message.id in self._calls:
            message = Reply(message.id, message)
        if isinstance(message, Ready):
            self.pid = message.pid
            self._hopeless = ""
            self._started.set_result(None)
            self._release()
        elif isinstance(message, Reply):
            call = self._calls.get(message.id)
            if call is None or call.done():  # nobody waits any more
                return
            if isinstance(message.result, Failed):
                call.set_exception(EngineError(message.result))
            else:
                call.set_result(message.result)
        elif isinstance(message, Done | Failed):
            self._end(message)
        elif message.id in self._streams:
            self._streams[message.id].put(message)

    async def _supervise(self) -> None:
        """Keeps an engine process running, for ever; cancelled, it has ended."""
        loop = asyncio.get_running_loop()
        losses: Truncation = asyncio.Queue()

        def answer() -> Line:
            loss: asyncio.Future[Exception | None] = loop.create_future()

            def made(line: Line) -> None:
                self._line = line
                losses.put_nowait(loss)

            return Line(FromEngine, self._receive, loss.set_result, made)

        try:
            folder = _socket_folder()
            server = await loop.create_unix_server(answer, f"{folder}/engine")
        except OSError as error:
            self._hopeless = f"the engine's socket has no place ({error}); set TMPDIR to a folder that can be written"
            print(f"babl engine: {self._hopeless}", file=sys.stderr)
            self._settled.set()
            self._fail_all(self._hopeless, sent_only=False)
            return
        failures = 0  # starts in a row that did not become ready
        try:
            while True:
                await asyncio.sleep(WAITS[min(failures, len(WAITS) - 1)])
                try:
                    was_ready = await self._live(f"{folder}/engine", losses)
                except OSError as error:  # such as too many processes
                    print(f"babl engine: cannot be started ({error})", file=sys.stderr)
                    was_ready = False
                failures = 0 if was_ready else failures + 1
                if not self._replacing:
                    self.restarts += 1
                self._replacing = False
                reason = BROKE_DOWN
                if failures >= HOPELESS:
                    self._settled.set()
                    reason = self._hopeless = "the engine cannot be started; what it says is in the log of the server"
                self._fail_all(reason, sent_only=failures < HOPELESS)
        finally:
            server.close()
            shutil.rmtree(folder, ignore_errors=True)

    async def _live(self, socket: str, losses: "Truncation") -> bool:
        """Returns whether the process became ready; one has been started, and has ended."""
        # In a session of its own, so that Ctrl-C reaches this process alone, which then ends the other.
        command = [sys.executable, "-m", "babl.web.engine.process", "--socket", socket, *self._arguments]
        self._started = asyncio.get_running_loop().create_future()
        process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
        ended = asyncio.ensure_future(process.wait())
        connecting = asyncio.ensure_future(losses.get())
        try:
            await asyncio.wait([connecting, ended], timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                return False
            lost: asyncio.Future[Any] = connecting.result()
            await asyncio.wait([self._started, lost], timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not self._started.done():
                return False
            await asyncio.wait([lost])  # unlike `await lost`, this can be cancelled without cancelling the loss
            return True
        finally:
            connecting.cancel()
            self._line, self.pid = None, None
            if not self._hopeless:
                self._settled.clear()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await asyncio.wait([ended], timeout=GRACE)
            if process.returncode is None:
                process.kill()
            await ended


def _socket_folder() -> str:
    """Returns a new folder for a socket, which nobody else may enter, under /tmp where TMPDIR's path is too long."""
    if len(os.fsencode(tempfile.gettempdir())) <= SOCKET_PATH_BYTES - len("/babl-12345678/engine"):
        return tempfile.mkdtemp(prefix="babl-")
    return tempfile.mkdtemp(prefix="babl-", dir="/tmp")
