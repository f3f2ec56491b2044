"""Signals that ask a run to leave: it saves within a step and exits with `EXIT_PREEMPTED`; and other exit codes.

A handler only notes the signal. The loop's own reduction carries the note to all ranks, so that they save and leave
together; a signal during set-up or a save waits for the next step's end, and a second one changes nothing.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from babl.distributed.failure import EXIT_INTERRUPTED, EXIT_PREEMPTED, SIGNALS, report
from babl.training.memory import memory_advice

POLL_SECONDS, GRACE_SECONDS = 1.0, 5.0


class Preempted(Exception):
    """The run has saved and leaves, because a signal asked it to."""


@contextmanager
def asked_to_leave() -> Iterator[Callable[[], bool]]:
    """Yields whether one of SIGNALS has come; within, they do nothing else.

    torchrun sends SIGTERM for two reasons: somebody wants the run to leave, or another rank of this machine is gone. In
    the second case the ranks can agree on nothing any more, and this one may wait in a collective where no handler
    runs; a thread sees it, and ends the process. A rank whose torchrun is gone is asked to leave, too.
    """
    asked = threading.Event()
    read, write = os.pipe()
    os.set_blocking(write, False)  # as set_wakeup_fd demands
    handlers = {number: signal.signal(number, lambda *_: asked.set()) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch_peers, args=(read, asked), daemon=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        watcher.start()
    try:
        yield asked.is_set
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(write)  # ends the watcher
        if watcher.ident:
            watcher.join()
        os.close(read)


def _watch_peers(pipe: int, asked: threading.Event) -> None:
    """Ends the process GRACE_SECONDS after a signal has come and a rank beside this one is gone."""
    agent, signalled, alone = os.getppid(), False, 0.0
    while True:
        if select.select([pipe], [], [], POLL_SECONDS)[0]:
            if not os.read(pipe, 64):
                return
            signalled = True
        if os.getppid() != agent:
            asked.set()
        elif signalled and len(psutil.Process(agent).children()) < int(os.environ["LOCAL_WORLD_SIZE"]):
            alone += POLL_SECONDS
            if alone >= GRACE_SECONDS:
                os._exit(1)  # the rank that is gone has said why, or torchrun does


def exit_code(program: str, run: Callable[[], Path]) -> int:
    """Runs a training and returns its exit code; rank 0 prints the last checkpoint, or in a line why there is none."""
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        with memory_advice("training"):
            checkpoint = run()
    except Preempted as left:
        if is_main:
            print(f"{program}: {left}", file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        if is_main:
            print(f"\n{program}: interrupted; run.resume=true goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        return report(program, error)
    if is_main:
        print(checkpoint)
    return 0
