"""A run's folder: whose it is, what an earlier run has left in it, and the tokenizer that is made for it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from babl.data.squad import Example
from babl.distributed.env import World
from babl.errors import UserError
from babl.models.build import ModelConfig
from babl.models.weights import FAMILIES
from babl.text import train_tokenizer
from babl.text.prompts import Style, qa_prompt
from babl.training import CHECKPOINTS, CONFIG, METRICS
from babl.training.checkpoint import written_whole

LOCK_SECONDS = 5.0  # that the processes of a run which was ended a moment ago may take to be gone


@contextmanager
def sole_writer(folder: Path, world: World) -> Iterator[None]:
    """Creates the folder and locks it against other runs while the context lasts; rank 0 locks it for all ranks.

    The lock is the system's (flock), so that of a killed process is free at once. On a file system that has none,
    filelock takes a file with the owner's name in its place, and drops that of a process it knows to be dead.

    Raises:
        UserError: Another run holds the lock, or the folder cannot be written.
    """
    if not world.is_main:
        yield
        return
    owner = folder / ".owner"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=LOCK_SECONDS)
        lock.acquire()
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        owner.write_text(f"host {socket.gethostname()}, pid {os.getpid()}, since {since}\n", encoding="utf-8")
    except Timeout:
        raise UserError(
            f"{folder}: another run writes there ({_read(owner)}); wait until it has ended, or choose another run.name"
        ) from None
    except OSError as error:
        raise UserError(f"run.dir: {folder} cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _read(owner: Path) -> str:
    try:
        return owner.read_text(encoding="utf-8").strip()
    except OSError:
        return "which has not said who it is"


def refuse_existing(folder: Path) -> None:
    """Refuses a folder that holds anything of a run.

    Raises:
        UserError: Something is.
    """
    left = [name for name in (CONFIG, METRICS) if (folder / name).exists()]
    if (folder / CHECKPOINTS).is_dir() and any((folder / CHECKPOINTS).iterdir()):
        left.append(CHECKPOINTS)
    if left:
        raise UserError(
            f"{folder}: a run is there already ({', '.join(left)}); go on with run.resume=true, or choose another "
            "run.name"
        )


def prepare_tokenizer(target: Path, cfg: ModelConfig, examples: list[Example]) -> None:
    """Trains a tokenizer on the examples into `target`, where the configuration names none."""
    if cfg.path or cfg.tokenizer:
        return
    style: Style = "t5" if FAMILIES[cfg.family].model.is_encoder_decoder else "decoder"
    with written_whole(target) as aside:
        train_tokenizer((qa_prompt(e.question, e.context, style) for e in examples), cfg.tokenizer_size, aside)
