"""How runs end before their time: on a signal, or because one rank fails, which ends all of them and is told once."""

import os
import re
import signal
import socket
import sys
import traceback
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from tqdm import tqdm

from babl.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # that ask a run to save and leave
EXIT_PREEMPTED = 75  # EX_TEMPFAIL in sysexits.h: come again; launch/train.sbatch requeues the job
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


class PeerFailure(Exception):
    """Another rank has failed, and says why."""


def report(program: str, error: Exception) -> int:
    """Returns the exit code of a failed run; the first rank to fail has said why on stderr.

    A user's mistake and a loss that is no number are one line; anything else is followed by its traceback. What breaks
    on the other ranks in consequence is not repeated. torchrun's summary names the same rank.

    Args:
        program: Starts the line.
        error: Caught by the caller; called within the `except`, before this process lets go of its peers.
    """
    # One that is silent may end first, and torchrun then sends SIGTERM to the one that still speaks.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    if not isinstance(error, PeerFailure) and _first_to_fail():
        _tell(program, error)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return 2 if isinstance(error, UserError) else 1


def _tell(program: str, error: Exception) -> None:
    """The error stands on stderr and in torchrun's summary."""
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    start = "\n" if os.environ.get("RANK", "0") != "0" else ""  # rank 0's progress bar may stand on this line
    if isinstance(error, UserError | FloatingPointError):
        line = str(error)
    elif "Timed out" in str(error) and _peer_is_gone(error):
        line = (
            f"{rank}another rank has not answered in time: its machine, or the network, is down, or it is busy for "
            f"longer than distributed.timeout_seconds ({first_line(error)})"
        )
    elif _peer_is_gone(error):
        line = f"{rank}another rank is gone ({first_line(error)})"
    else:
        line = f"{rank}{type(error).__name__}: {error}\n{traceback.format_exc().rstrip()}"
    tqdm.write(f"{start}{program}: {line}", file=sys.stderr)
    if not _peer_is_gone(error):
        get_error_handler().record_exception(error)


def _first_to_fail() -> bool:
    """Returns whether no rank has asked this before; torchrun's own store counts, which outlives every rank."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    key = f"babl/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection((address, port), timeout=5).close()  # torch would write a page of C++ to stderr
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5)).add(key, 1) == 1
    except (KeyError, OSError, dist.DistError):
        return True  # there is no torchrun, or the first machine's is gone, and nobody here has heard why


def first_line(error: BaseException) -> str:
    """Returns the error's first line without the place in gloo's source that it may start with."""
    return re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0])


def _peer_is_gone(error: Exception) -> bool:
    """Returns whether a collective failed because its other end is closed."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
