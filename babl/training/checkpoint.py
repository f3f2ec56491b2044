"""Checkpoints: whole folders or none.

A folder is written aside, its files hashed and synced, then renamed; what a crash leaves behind has no name that
anybody picks up. Each is a model folder that can be moved, served, or loaded in transformers.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from babl.errors import UserError

MANIFEST, STATE = "manifest.json", "trainer.json"


def checkpoint_name(step: int) -> str:
    """Returns the folder's name, which sorts by step."""
    return f"step_{step:06d}"


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yields a folder to write into; on leaving without an error it is complete, hashed, synced, and named `target`."""
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        files = sorted(path for path in aside.iterdir() if path.is_file())
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*files, aside / MANIFEST, aside):
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], keep_last: int, write: Callable[[Path], None]
) -> Path:
    """Returns the new checkpoint in `folder`, which `latest` now points to; older ones beyond `keep_last` are gone.

    Args:
        folder: Of all checkpoints of the run.
        step: Optimizer steps done.
        state: What the loop needs to go on, as JSON.
        keep_last: How many stay; 0 for all.
        write: Puts the model and the optimizer into the folder it is given.
    """
    target = folder / checkpoint_name(step)
    with written_whole(target) as aside:
        write(aside)
        (aside / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    link = folder / ".latest.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.rename(folder / "latest")
    for old in sorted(folder.glob("step_*"))[: -keep_last if keep_last else 0]:
        shutil.rmtree(old)
    return target


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint without a fault, and a line for each newer one passed over."""
    passed: list[str] = []
    for path in sorted(folder.glob("step_*"), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return path, passed
        passed.append(f"{path}: passed over, {fault}")
    return None, passed


def find_fault(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, naming the file, or None where it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, entry in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {entry['bytes']}"
        if _sha256(path) != entry["sha256"]:
            return f"{name} is not what was written (sha256 differs)"
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns what `save_checkpoint` was given as `state`."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
