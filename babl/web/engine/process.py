"""The process that owns the models: `python -m babl.web.engine.process --socket PATH --models DIR`.

It talks to the process that listens at PATH, and to no other; when that one has gone, or on SIGTERM, it ends.
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
from babl.web.engine.line import Line
from babl.web.engine.protocol import (
    Cancel,
    Count,
    Counted,
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
    Unload,
    Unreadable,
)
from babl.web.engine.turns import MOST_RUNNING, MOST_WAITING

GOODBYE = 2.0  # seconds that the last events have to arrive


class Worker(Protocol):
    """What answers: a `Scheduler`, or a `Scripted` one."""

    def submit(self, request: Request) -> None: ...  # noqa: D102
    def cancel(self, id: str) -> None: ...  # noqa: D102
    def cancel_all(self) -> None: ...  # noqa: D102
    async def count(self, request: Request) -> Counted: ...  # noqa: D102
    async def models(self) -> list[ModelState]: ...  # noqa: D102
    async def load(self, model: str) -> None: ...  # noqa: D102
    async def unload(self, model: str) -> None: ...  # noqa: D102
    async def stats(self) -> Stats: ...  # noqa: D102
    async def run(self, drained: Callable[[], Awaitable[None]]) -> None: ...  # noqa: D102


class Server:
    """Hands the messages of a line to a worker, and its events and replies back."""

    def __init__(self) -> None:
        self.worker: Worker
        self.line: Line
        self.ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls: set[asyncio.Task[None]] = set()

    def lost(self, error: Exception | None) -> None:
        """The other process has gone, or sent what is no message."""
        if not self.ended.done():
            self.ended.set_result(error)

    def receive(self, message: Any) -> None:
        """The message is on its way to the worker."""
        if isinstance(message, Request):
            self.worker.submit(message)
        elif isinstance(message, Unreadable):
            self.line.send(Failed(message.id, "prompt", f"the request cannot be read ({message.reason})"))
        elif isinstance(message, Cancel):
            self.worker.cancel(message.id)
        else:
            call = asyncio.create_task(self._call(message))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self, message: Any) -> None:
        code: FailureCode = "prompt" if isinstance(message, Count) else "model"
        result: Counted | ModelStates | Stats | Failed
        try:
            if isinstance(message, Count):
                result = await self.worker.count(message.request)
            elif isinstance(message, GetStats):
                result = await self.worker.stats()
            else:
                if isinstance(message, Load):
                    await self.worker.load(message.model)
                elif isinstance(message, Unload):
                    await self.worker.unload(message.model)
                result = ModelStates(await self.worker.models())
        except UserError as error:
            result = Failed(message.id, code, str(error))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            result = Failed(message.id, "engine", f"the engine could not say ({type(error).__name__})")
        try:
            self.line.send(Reply(message.id, result))
        except ValueError as error:  # whoever waits for it is told all the same
            self.line.send(Failed(message.id, "engine", f"what the engine would say cannot be sent ({error})"))


async def serve(socket: str, make: Callable[[Callable[[Event], None]], Worker]) -> int:
    """Returns the exit status, once the other process has gone or a signal has come.

    Args:
        socket: Where the other process listens.
        make: Gives the worker, which is to call its argument with every event.
    """
    loop = asyncio.get_running_loop()
    server = Server()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    _, line = await loop.create_unix_connection(lambda: Line(ToEngine, server.receive, server.lost), socket)
    server.line = line
    server.worker = make(line.send)  # what it imports takes seconds; nobody asks anything before it is ready
    line.send(Ready(os.getpid()))
    work: asyncio.Future[Any] = asyncio.ensure_future(server.worker.run(line.drained))
    stopped: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    await asyncio.wait([work, stopped, server.ended], return_when=asyncio.FIRST_COMPLETED)
    if work.done():  # it never ends by itself
        work.result()
    work.cancel()
    if not server.ended.done():
        server.worker.cancel_all()
        line.close()
        await asyncio.wait([server.ended], timeout=GOODBYE)
    error = server.ended.result() if server.ended.done() else None
    if isinstance(error, ValueError):
        print(f"babl engine: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m babl.web.engine.process", description="Owns the models.")
    parser.add_argument("--socket", required=True, metavar="PATH", help="where the other process listens")
    parser.add_argument("--models", type=Path, action="append", default=[], metavar="DIR", help="may be repeated")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--most-waiting", type=int, default=MOST_WAITING, metavar="N", help="requests in the queue")
    parser.add_argument("--most-running", type=int, default=MOST_RUNNING, metavar="N", help="requests answered at once")
    parser.add_argument("--scripted", action="store_true", help="no models: answers as the prompts say")
    args = parser.parse_args(argv)

    def make(emit: Callable[[Event], None]) -> Worker:
        if args.scripted:
            from babl.web.engine.scripted import Scripted

            return Scripted(emit, args.most_waiting, args.most_running)
        from babl.web.engine.scheduler import Scheduler

        return Scheduler(args.models, emit, args.device, args.dtype, args.most_waiting, args.most_running)

    # Not asyncio.run, which would wait for the thread of a model that is being loaded.
    return asyncio.new_event_loop().run_until_complete(serve(args.socket, make))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # nor is such a thread waited for here
