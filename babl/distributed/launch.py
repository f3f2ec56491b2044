"""torchrun for schedulers: it passes signals on, and its exit code is that of the first process that failed.

    python -m babl.distributed.launch --nnodes=2 --nproc_per_node=8 ... scripts/train.py CONFIG.toml

torchrun itself kills its processes 30 s after a SIGTERM, dies of SIGUSR1, and exits with 1 whatever its processes say.
"""

import signal
import sys
from contextlib import suppress

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from babl.distributed.failure import EXIT_PREEMPTED, SIGNALS


def main(argv: list[str] | None = None) -> int:
    """Runs torchrun with these arguments; returns what its first failed process did, or 0."""
    passed_on: set[int] = set()

    def pass_on(number: int, frame: object) -> None:
        passed_on.add(number)
        workers = psutil.Process().children()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):  # one that has just ended
                worker.send_signal(number)
        if not workers:  # still meeting the other machines: there is nothing to save
            sys.exit(EXIT_PREEMPTED)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    arguments = sys.argv[1:] if argv is None else argv
    try:
        run(parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments]))
    except ChildFailedError as error:
        # torchrun ends the others with SIGTERM, which may reach one that has already failed and is about to exit.
        own = {rank: each for rank, each in error.failures.items() if each.exitcode != -signal.SIGTERM}
        rank, failure = min((own or error.failures).items(), key=lambda item: item[1].timestamp)
        if -failure.exitcode in passed_on:  # it came before the process could listen, so there is nothing to save
            return EXIT_PREEMPTED
        if failure.exitcode < 0:
            print(f"launch: rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
            return 1
        return failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
