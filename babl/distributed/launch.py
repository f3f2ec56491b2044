"""torchrun for clusters: it passes signals on, exits as its first failed process did, and says in a line what is wrong.

    python -m babl.distributed.launch --nnodes=2 --node_rank=0 --master_addr=HOST --master_port=PORT \
        --nproc_per_node=8 ... scripts/train.py CONFIG.toml

torchrun itself kills its processes 30 s after a SIGTERM, dies of SIGUSR1, exits with 1 whatever its processes say, and
shows a traceback, or waits for ever, where a port is taken or a machine does not come. On several machines gloo is told
which network interface leads to the first one; by itself it takes the one the host's own name resolves to, often the
loopback.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from argparse import Namespace
from contextlib import suppress

import psutil
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import get_args_parser, run

from babl.distributed.failure import SIGNALS, first_line
from babl.errors import UserError

POLL_SECONDS = 1.0


def main(argv: list[str] | None = None) -> int:
    """Runs torchrun with these arguments; returns what its first failed process did, or 0.

    A signal that comes when there is nothing to save yet gives 128 and its number, as a shell does.
    """
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    passed_on = _watch(arguments)
    try:
        if arguments.nnodes != "1":
            _choose_interface(arguments)
        run(arguments)
    except ChildFailedError as error:
        return _exit_code(error, passed_on)
    except SignalException as error:  # Ctrl-C, which torchrun has sent to its processes, too
        return 128 + error.sigval
    except UserError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    except (dist.DistError, RendezvousError) as error:
        reason = first_line(error.__cause__ or error)
        if "EADDRINUSE" in reason:
            line = "the port is taken on this machine; choose another (--master_port; port in launch/env.sh)"
            print(f"launch: {_endpoint(arguments)}: {line}", file=sys.stderr)
            return 2
        print(f"launch: the machines cannot meet at {_endpoint(arguments)} ({reason})", file=sys.stderr)
        return 1
    return 0


def _parse(argv: list[str]) -> Namespace:
    """Returns torchrun's arguments, with one more."""
    parser = get_args_parser()
    parser.add_argument(
        "--join_timeout", type=int, default=900, help="Seconds that the machines wait for one another at the start."
    )
    arguments = parser.parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *argv])
    # torch's own bound comes later than ours: before it gives up, it retries with a page of C++ on stderr.
    arguments.rdzv_conf = ",".join(filter(None, [arguments.rdzv_conf, f"timeout={2 * arguments.join_timeout}"]))
    return arguments


def _endpoint(arguments: Namespace) -> str:
    """Returns where the machines meet, on the first one, as torchrun reads its arguments."""
    return arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port or 29500}"


def _watch(arguments: Namespace) -> set[int]:
    """Starts the thread that passes SIGNALS on to the processes; returns the set in which it notes them.

    Until there are processes it ends this one on a signal, or when `join_timeout` is over. A thread, since Python runs
    a signal's handler in the main one, which may be waiting for another machine within torch.
    """
    passed_on: set[int] = set()
    deadline = time.monotonic() + arguments.join_timeout
    read, write = os.pipe()
    os.set_blocking(write, False)  # as set_wakeup_fd demands

    def watch() -> None:
        met = False
        while True:
            ready = select.select([read], [], [], None if met else POLL_SECONDS)[0]
            number = os.read(read, 1)[0] if ready else 0
            workers = psutil.Process().children()
            met = met or bool(workers)
            if number in SIGNALS:  # the others are torchrun's
                passed_on.add(number)
                for worker in workers:
                    with suppress(psutil.NoSuchProcess):  # one that has just ended
                        worker.send_signal(number)
                if not met:
                    os._exit(128 + number)
            if not met and time.monotonic() > deadline:
                where, seconds = _endpoint(arguments), arguments.join_timeout
                print(
                    f"launch: {arguments.nnodes} machines have not met at {where} within {seconds} s (--join_timeout)",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write)
    threading.Thread(target=watch, daemon=True).start()
    return passed_on


def _choose_interface(arguments: Namespace) -> None:
    """Has gloo use the interface over which this machine reaches the first one, unless the user has named another."""
    host, _ = parse_rendezvous_endpoint(_endpoint(arguments), default_port=0)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing, and looks up the route
            own = probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"there is no way to {host}, the first machine ({error.strerror}); is its name right?"
        ) from None
    for name, addresses in psutil.net_if_addrs().items():
        if own in {address.address for address in addresses}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _exit_code(error: ChildFailedError, passed_on: set[int]) -> int:
    """Returns the exit code of the first process that failed, and says which one a signal has killed."""
    # torchrun ends the others with SIGTERM, which may reach one that has already failed and is about to exit.
    own = {rank: each for rank, each in error.failures.items() if each.exitcode != -signal.SIGTERM}
    rank, failure = min((own or error.failures).items(), key=lambda item: item[1].timestamp)
    if failure.exitcode >= 0:
        return failure.exitcode
    if -failure.exitcode in passed_on:  # it came before the process could listen
        return 128 - failure.exitcode
    print(f"launch: rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
