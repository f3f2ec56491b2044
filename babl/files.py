"""Files that are whole or not there, and what is in them: the one place where files are replaced, synced and hashed.

What must survive a crash is written beside its place, synced, and renamed, so that a reader finds the old content or
the new, never a part. Locks are `filelock`'s.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from babl.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how the text begins that Git has in place of a large file


def write_whole(target: Path, content: str | bytes) -> None:
    """Replaces a file's content, on disk and in one step: a crash leaves the old content or the new.

    Args:
        target: The file, whose folder exists. One process at a time may write it.
        content: Text is written as UTF-8.

    Raises:
        OSError: It cannot be written; what was there before still is.
    """
    aside = target.with_name(f".{target.name}.tmp")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(aside)
        aside.rename(target)
        sync(target.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """Returns the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joint_hash(paths: Iterable[Path]) -> str:
    """Returns the sha256, in hex, of the files' own in this order; of one file it is that file's."""
    digests = [file_hash(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def refuse_pointer(path: Path) -> None:
    """The file is itself, not what Git has in its place.

    Raises:
        UserError: It is a pointer to the file, which Git LFS has not fetched.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(
                    f"{path} is a pointer to the file, not the file; `git lfs pull` in its folder fetches it"
                )
