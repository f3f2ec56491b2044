"""The web process's side: starts the engine process, talks to it, and restarts it after a crash.

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

from babl.web.engine.channel import Channel
from babl.web.engine.fair_queue import MAX_RUNNING, MAX_WAITING
from babl.web.engine.protocol import (
    BadFrame,
    Cancel,
    CountTokens,
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
    TokenCount,
    Unload,
)

DEFAULT_FOLDERS = (Path("models"), Path("runs"))
START_SECONDS = 120.0  # until the engine process must be ready
STOP_SECONDS = 5.0  # until it is killed
RESTART_DELAYS = (0.0, 0.5, 2.0, 8.0, 30.0)  # seconds before each start since the last one that became ready
MAX_FAILED_STARTS = 3  # in a row, after which requests are refused
SOCKET_PATH_BYTES = 103  # that every system allows; Linux allows 107
MAX_HELD = 64  # requests that wait for an engine process
CRASHED = "the engine crashed while it was answering, and is being restarted"

Losses = asyncio.Queue["asyncio.Future[Exception | None]"]  # of each channel that was made: done when it is lost
R = TypeVar("R")


class EngineError(Exception):
    """A call failed, because it was refused or the engine process crashed; `failed` says which."""

    def __init__(self, failed: Failed):
        super().__init__(failed.message)
        self.failed = failed

    @property
    def code(self) -> FailureCode:
        """The failure's code."""
        return self.failed.code


class _Stream:
    """The events of a request that are not read yet; deltas are merged, so that a slow reader takes no more memory."""

    def __init__(self, request: Request):
        self.request = request
        self.sent = False
        self.events: deque[Event] = deque()
        self.ready = asyncio.Event()

    def put(self, event: Event) -> None:
        if isinstance(event, Delta) and self.events and isinstance(self.events[-1], Delta):
            event = Delta(event.id, self.events.pop().text + event.text, event.tokens)  # type: ignore[union-attr]
        self.events.append(event)
        self.ready.set()

    async def get(self) -> Event:
        while not self.events:
            self.ready.clear()
            await self.ready.wait()
        return self.events.popleft()


class EngineClient:
    """Answers requests through an engine process of its own.

    Args:
        folders: Searched for models.
        scripted: Whether the process runs `babl.web.engine.scripted` in place of models.
        device: As in `Engine.load`.
        dtype: Likewise.
        max_waiting: Requests in the queue.
        max_running: Requests answered at once.
    """

    def __init__(
        self,
        folders: Sequence[Path] = DEFAULT_FOLDERS,
        *,
        scripted: bool = False,
        device: str = "auto",
        dtype: str = "auto",
        max_waiting: int = MAX_WAITING,
        max_running: int = MAX_RUNNING,
    ):
        self._arguments = ["--device", device, "--dtype", dtype]
        self._arguments += ["--max-waiting", str(max_waiting), "--max-running", str(max_running)]
        self._arguments += ["--scripted"] if scripted else []
        self._arguments += [word for folder in folders for word in ("--models", str(folder.resolve()))]
        self.pid: int | None = None  # of the engine process, while it takes requests
        self.restarts = 0  # after crashes
        self._streams: dict[str, _Stream] = {}
        self._calls: dict[str, asyncio.Future[TokenCount | ModelStates | Stats]] = {}
        self._call_ids = itertools.count()
        self._channel: Channel | None = None
        self._started: asyncio.Future[None]  # done when the current process is ready
        self._settled = asyncio.Event()  # whether the process is ready, or cannot be started
        self._replacing = False  # the process is being restarted to free its memory
        self._replacement: asyncio.Task[None] | None = None
        self._start_error = ""  # why it cannot be started
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the engine process and waits until it is ready.

        Raises:
            EngineError: It cannot be started; the client goes on trying until `stop`.
        """
        self._supervisor = asyncio.create_task(self._supervise())
        await self._until_ready()

    async def stop(self) -> None:
        """Ends the engine process and every answer."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        self._fail_all("the engine was stopped", sent_only=False)

    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """Submits a request; returns its events, of which the last is `Done` or `Failed`.

        Closing the iterator before that, by `aclose`, cancels the request.

        Raises:
            ValueError: A request with this id is being answered.
        """
        if request.id in self._streams:
            raise ValueError(f"request {request.id} is being answered already")
        stream = self._streams[request.id] = _Stream(request)
        if self._start_error or self._supervisor is None:
            self._end(Failed(request.id, "engine", self._start_error or "the engine is not started"))
        elif self.pid is not None and not self._replacing:
            self._send(stream)
        elif sum(not stream.sent for stream in self._streams.values()) > MAX_HELD:
            self._end(Failed(request.id, "busy", "the engine is being started; ask again later", RESTART_DELAYS[2]))
        return self._events(stream)

    async def cancel(self, id: str) -> None:
        """Cancels a request, which ends at the engine's next step; unknown ids change nothing."""
        stream = self._streams.get(id)
        if stream is not None and not stream.sent:
            self._end(Done(id, "", "cancelled"))
        elif stream is not None and self._channel is not None:
            self._channel.send(Cancel(id))

    async def count(self, request: Request) -> TokenCount:
        """Returns the tokens that a request would take, by the tokenizer of its model.

        Raises:
            EngineError: Its model is unusable, or it cannot be answered.
        """
        return await self._call(lambda id: CountTokens(id, request), TokenCount)

    async def models(self) -> list[ModelState]:
        """Returns every model in the folders, with its state."""
        return (await self._call(ListModels, ModelStates)).models

    async def load(self, model: str) -> None:
        """Loads a model into memory.

        Raises:
            EngineError: It is unusable, or there is too little free memory.
        """
        await self._call(lambda id: Load(id, model), ModelStates)

    async def unload(self, model: str) -> None:
        """Unloads a model; after the last one, restarts the process, which gives all of its memory back.

        Raises:
            EngineError: It is being loaded, or is answering.
        """
        await self._call(lambda id: Unload(id, model), ModelStates)
        if not self._replacing and not self._streams:
            self._replacing = True  # new requests wait for the new process
            self._settled.clear()
            self._replacement = asyncio.create_task(self._replace())
            await asyncio.shield(self._replacement)  # the caller may be cancelled meanwhile
        await self._until_ready()

    async def _replace(self) -> None:
        """Tells the process to end, unless a model has been loaded meanwhile."""
        if self._calls:
            await asyncio.wait(self._calls.values())
        try:
            left = (await self._ask(ListModels, ModelStates)).models
        except EngineError:
            return  # it has crashed, so it is restarted anyway
        if any(state.state in ("loading", "loaded") for state in left):
            self._replacing = False
            self._send_waiting()
        elif self._channel is not None:
            self._channel.close()

    async def stats(self) -> Stats:
        """Returns figures of the engine process."""
        return await self._call(GetStats, Stats)

    async def _until_ready(self) -> None:
        """Waits until the engine process takes requests.

        Raises:
            EngineError: It cannot be started.
        """
        if self._supervisor is None:
            raise EngineError(Failed("", "engine", "the engine is not started"))
        while not self._settled.is_set():
            settled: asyncio.Future[Any] = asyncio.ensure_future(self._settled.wait())
            await asyncio.wait([settled, self._supervisor], return_when=asyncio.FIRST_COMPLETED)
            settled.cancel()
            if self._supervisor.done() and not self._start_error:
                raise EngineError(Failed("", "engine", "the engine was stopped"))
        if self._start_error:
            raise EngineError(Failed("", "engine", self._start_error))

    async def _call(self, make: Callable[[str], msgspec.Struct], kind: type[R]) -> R:
        await self._until_ready()
        return await self._ask(make, kind)

    async def _ask(self, make: Callable[[str], msgspec.Struct], kind: type[R]) -> R:
        id = f"call-{next(self._call_ids)}"
        if self._channel is None:
            raise EngineError(Failed(id, "engine", CRASHED))
        answer = self._calls[id] = asyncio.get_running_loop().create_future()
        try:
            self._channel.send(make(id))
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

    def _send_waiting(self) -> None:
        """Sends the requests that waited for the process to be ready."""
        self._settled.set()
        for stream in [stream for stream in self._streams.values() if not stream.sent]:
            self._send(stream)

    def _send(self, stream: _Stream) -> None:
        assert self._channel is not None
        try:
            self._channel.send(stream.request)
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

    def _receive(self, message: FromEngine | BadFrame) -> None:
        if isinstance(message, BadFrame):
            print(f"babl engine: a message about {message.id} cannot be read ({message.reason})", file=sys.stderr)
            message = Failed(message.id, "engine", "the engine's answer cannot be read")
        if isinstance(message, Failed) and message.id in self._calls:
            message = Reply(message.id, message)
        if isinstance(message, Ready):
            self.pid = message.pid
            self._start_error = ""
            self._started.set_result(None)
            self._send_waiting()
        elif isinstance(message, Reply):
            call = self._calls.get(message.id)
            if call is None or call.done():  # nobody waits for it any more
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
        """Keeps an engine process running until it is cancelled, which ends the process."""
        loop = asyncio.get_running_loop()
        losses: Losses = asyncio.Queue()

        def connect() -> Channel:
            loss: asyncio.Future[Exception | None] = loop.create_future()

            def made(channel: Channel) -> None:
                self._channel = channel
                losses.put_nowait(loss)

            return Channel(FromEngine, self._receive, loss.set_result, made)

        try:
            folder = _socket_folder()
            server = await loop.create_unix_server(connect, f"{folder}/engine")
        except OSError as error:
            self._start_error = f"the engine's socket cannot be created ({error}); set TMPDIR to a writable folder"
            print(f"babl engine: {self._start_error}", file=sys.stderr)
            self._settled.set()
            self._fail_all(self._start_error, sent_only=False)
            return
        failures = 0  # starts in a row that did not become ready
        try:
            while True:
                await asyncio.sleep(RESTART_DELAYS[min(failures, len(RESTART_DELAYS) - 1)])
                try:
                    was_ready = await self._run_process(f"{folder}/engine", losses)
                except OSError as error:  # such as too many processes
                    print(f"babl engine: cannot be started ({error})", file=sys.stderr)
                    was_ready = False
                failures = 0 if was_ready else failures + 1
                if not self._replacing:
                    self.restarts += 1
                self._replacing = False
                reason = CRASHED
                if failures >= MAX_FAILED_STARTS:
                    self._settled.set()
                    reason = self._start_error = (
                        "the engine cannot be started; what it says is in the log of the server"
                    )
                self._fail_all(reason, sent_only=failures < MAX_FAILED_STARTS)
        finally:
            server.close()
            shutil.rmtree(folder, ignore_errors=True)

    async def _run_process(self, socket: str, losses: "Losses") -> bool:
        """Starts a process and waits until it has ended; returns whether it became ready."""
        # In its own session, so that Ctrl-C reaches only this process, which then ends the other.
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
            self._channel, self.pid = None, None
            if not self._start_error:
                self._settled.clear()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await asyncio.wait([ended], timeout=STOP_SECONDS)
            if process.returncode is None:
                process.kill()
            await ended


def _socket_folder() -> str:
    """Creates a private folder for the socket, in /tmp if TMPDIR's path is too long, and returns it."""
    if len(os.fsencode(tempfile.gettempdir())) <= SOCKET_PATH_BYTES - len("/babl-12345678/engine"):
        return tempfile.mkdtemp(prefix="babl-")
    return tempfile.mkdtemp(prefix="babl-", dir="/tmp")
