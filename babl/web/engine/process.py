"""The process that owns the models: `python -m babl.web.engine.process --socket PATH --models DIR`.

It connects to the process that listens at PATH, and ends when that one has gone, or on SIGTERM.
"""

import argparse
import asyncio
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from babl.errors import UserError
from babl.web.engine.channel import Channel
from babl.web.engine.fair_queue import MAX_RUNNING, MAX_WAITING
from babl.web.engine.protocol import (
    BadFrame,
    Cancel,
    CountTokens,
    Event,
    Failed,
    FailureCode,
    GetStats,
    Load,
    ModelState,
    ModelStates,
    Ready,
    Reply,
    Request,
    Stats,
    ToEngine,
    TokenCount,
    Unload,
)

FLUSH_SECONDS = 2.0  # for the last events to arrive


class SchedulerProtocol(Protocol):
    """The methods of `Scheduler` and `ScriptedScheduler`."""

    def submit(self, request: Request) -> None: ...  # noqa: D102
    def cancel(self, id: str) -> None: ...  # noqa: D102
    def cancel_all(self) -> None: ...  # noqa: D102
    async def count(self, request: Request) -> TokenCount: ...  # noqa: D102
    async def models(self) -> list[ModelState]: ...  # noqa: D102
    async def load(self, model: str) -> None: ...  # noqa: D102
    async def unload(self, model: str) -> None: ...  # noqa: D102
    async def stats(self) -> Stats: ...  # noqa: D102
    async def run(self, drained: Callable[[], Awaitable[None]]) -> None: ...  # noqa: D102


class Server:
    """Passes the channel's messages to the scheduler, and sends its replies back."""

    def __init__(self) -> None:
        self.scheduler: SchedulerProtocol
        self.channel: Channel
        self.ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls: set[asyncio.Task[None]] = set()

    def lost(self, error: Exception | None) -> None:
        """Notes that the connection is lost, or that a frame could not be read."""
        if not self.ended.done():
            self.ended.set_result(error)

    def receive(self, message: Any) -> None:
        """Passes a message to the scheduler."""
        if isinstance(message, Request):
            self.scheduler.submit(message)
        elif isinstance(message, BadFrame):
            self.channel.send(Failed(message.id, "prompt", f"the request cannot be read ({message.reason})"))
        elif isinstance(message, Cancel):
            self.scheduler.cancel(message.id)
        else:
            call = asyncio.create_task(self._call(message))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self, message: Any) -> None:
        code: FailureCode = "prompt" if isinstance(message, CountTokens) else "model"
        result: TokenCount | ModelStates | Stats | Failed
        try:
            if isinstance(message, CountTokens):
                result = await self.scheduler.count(message.request)
            elif isinstance(message, GetStats):
                result = await self.scheduler.stats()
            else:
                if isinstance(message, Load):
                    await self.scheduler.load(message.model)
                elif isinstance(message, Unload):
                    await self.scheduler.unload(message.model)
                result = ModelStates(await self.scheduler.models())
        except UserError as error:
            result = Failed(message.id, code, str(error))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            result = Failed(message.id, "engine", f"the engine failed ({type(error).__name__})")
        try:
            self.channel.send(Reply(message.id, result))
        except ValueError as error:  # the caller gets an answer all the same
            self.channel.send(Failed(message.id, "engine", f"the engine's answer cannot be sent ({error})"))


async def serve(socket: str, make: Callable[[Callable[[Event], None]], SchedulerProtocol]) -> int:
    """Serves the other process until it has gone or SIGTERM comes; returns the exit status.

    Args:
        socket: Where the other process listens.
        make: Returns the scheduler, which calls its argument with every event.
    """
    loop = asyncio.get_running_loop()
    server = Server()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    _, channel = await loop.create_unix_connection(lambda: Channel(ToEngine, server.receive, server.lost), socket)
    server.channel = channel
    server.scheduler = make(channel.send)  # its imports take seconds; requests come after `Ready`
    channel.send(Ready(os.getpid()))
    work: asyncio.Future[Any] = asyncio.ensure_future(server.scheduler.run(channel.drained))
    stopped: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    await asyncio.wait([work, stopped, server.ended], return_when=asyncio.FIRST_COMPLETED)
    if work.done():  # it never ends by itself
        work.result()
    work.cancel()
    if not server.ended.done():
        server.scheduler.cancel_all()
        channel.close()
        await asyncio.wait([server.ended], timeout=FLUSH_SECONDS)
    error = server.ended.result() if server.ended.done() else None
    if isinstance(error, ValueError):
        print(f"babl engine: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the process; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m babl.web.engine.process", description="Owns the models.")
    parser.add_argument("--socket", required=True, metavar="PATH", help="where the other process listens")
    parser.add_argument("--models", type=Path, action="append", default=[], metavar="DIR", help="may be repeated")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-waiting", type=int, default=MAX_WAITING, metavar="N", help="requests in the queue")
    parser.add_argument("--max-running", type=int, default=MAX_RUNNING, metavar="N", help="requests answered at once")
    parser.add_argument("--scripted", action="store_true", help="no models: answer as the prompts say")
    args = parser.parse_args(argv)

    def make(emit: Callable[[Event], None]) -> SchedulerProtocol:
        if args.scripted:
            from babl.web.engine.scripted import ScriptedScheduler

            return ScriptedScheduler(emit, args.max_waiting, args.max_running)
        from babl.web.engine.scheduler import Scheduler

        return Scheduler(args.models, emit, args.device, args.dtype, args.max_waiting, args.max_running)

    # Not asyncio.run, which would wait for the thread that loads a model.
    return asyncio.new_event_loop().run_until_complete(serve(args.socket, make))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without waiting for such a thread
