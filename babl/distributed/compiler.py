"""Locks that a process killed while it compiled kernels has left, on which torch would wait endlessly."""

import os
import sys
import time
from pathlib import Path

import psutil
from torch.utils.cpp_extension import _get_build_directory

from babl.errors import UserError

SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "smb", "cifs", "9p", "afs", "panfs", "wekafs")
PATIENCE = 600.0  # seconds that compiling may take on another machine


def check_locks() -> None:
    """Refuses to compile where a process that is gone has left its lock, which torch would wait for.

    torch locks a folder of compiled kernels by a file that the compiling process holds open. One that no process here
    holds is left over, unless the folder is on a file system that other machines share: then it may be theirs, and is
    waited for until it is ten minutes old.

    Raises:
        UserError: A lock was left behind.
    """
    root = Path(_get_build_directory("babl", verbose=False)).parent  # makes an empty folder of that name
    for lock in sorted(root.glob("*/lock")):
        said = False
        while (age := _age(lock)) is not None and not _is_held(lock):
            if not _is_shared(lock) or age > PATIENCE:
                time.sleep(0.5)  # between letting go and removing
                if lock.exists() and not _is_held(lock):
                    raise UserError(
                        f"{lock} was left by a process that was killed while it compiled kernels, and the next would "
                        f"wait for it endlessly; where no other machine is compiling, remove it: rm {lock}"
                    )
            elif not said:
                said = True
                print(f"waiting for {lock}: another machine compiles, or has left it behind", file=sys.stderr)
            time.sleep(0.5)


def _age(lock: Path) -> float | None:
    """Returns the seconds since the lock was made, or None where there is none any more."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_held(lock: Path) -> bool:
    """Returns whether a process of this machine that we may look at has the file open."""
    for process in psutil.process_iter():
        folder = Path("/proc") / str(process.pid) / "fd"
        try:
            if any(os.readlink(link) == str(lock) for link in folder.iterdir()):
                return True
        except OSError:
            continue  # it has ended, closed the file, or is another user's
    return False


def _is_shared(path: Path) -> bool:
    """Returns whether other machines may see the file."""
    mounts = [m for m in psutil.disk_partitions(all=True) if path.is_relative_to(m.mountpoint)]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is None or nearest.fstype.startswith(SHARED)
