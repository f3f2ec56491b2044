"""Checkpoints: whole folders or none.

A folder is written aside, its files hashed and synced, then renamed; what a crash leaves behind has no name that
anybody picks up. Each is a model folder that can be moved, served, or loaded in transformers, and every backend goes on
from it at every world size: optimizer state is stored by parameter name, and what else a run needs is its step, for the
order of examples, dropout and the generators are functions of the seed and the step.
"""

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from babl.distributed.base import Share, Tensors
from babl.distributed.env import World
from babl.errors import UserError
from babl.files import file_hash, sync
from babl.models.weights import save_config, save_index, save_shard, shard_name, stored_weights

T = TypeVar("T")
MANIFEST, STATE = "manifest.json", "trainer.json"


def checkpoint_name(step: int) -> str:
    """Returns the folder's name."""
    return f"step_{step:06d}"


def find_checkpoints(folder: Path) -> list[Path]:
    """Returns the folders named `step_` and digits, by step; whatever else lies there is the user's."""
    named = [path for path in folder.glob("step_*") if re.fullmatch("step_[0-9]+", path.name) and path.is_dir()]
    return sorted(named, key=_step)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yields a folder to write into; on leaving without an error it is complete, hashed, synced, and named `target`."""
    aside = _begin(target)
    try:
        yield aside
        _finish(aside, target, _entries(aside, _files(aside)))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class Checkpoints:
    """The checkpoints of a run, written by all ranks together: each its share of the tensors, rank 0 the rest.

    The folder must be one that every rank sees. Ranks agree that all files are there before rank 0 gives a checkpoint
    its name, and where one rank fails, all do, naming it.
    """

    def __init__(self, folder: Path, world: World, keep_last: int, keep_every: int, background: bool):
        """Prepares to save; where `background` is true, a save returns at once and goes on in a thread.

        Args:
            folder: Of all checkpoints of the run.
            world: The processes.
            keep_last: How many of the newest stay; 0 for all.
            keep_every: Checkpoints of a multiple of this step stay for good; 0 for none.
            background: Whether training goes on meanwhile; at most one save is under way.
        """
        self.folder, self.world = folder, world
        self.keep_last, self.keep_every, self.background = keep_last, keep_every, background
        # A group of its own: what ranks say to each other in the thread must not meet what they say in a step.
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """Returns what `newest_whole` does, looked up by one rank for all."""
        return self.world.gather(newest_whole(self.folder) if self.world.is_main else (None, []))[0]

    def save(self, step: int, share: Share, config: Any, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Writes a checkpoint, points `latest` to it and deletes older ones as `keep_*` say, or starts to.

        Args:
            step: Optimizer steps done.
            share: This rank's, from the backend.
            config: The model's.
            state: What the loop needs to go on, as JSON.
            write: Puts what else belongs there into the folder it is given, in folders of its own or not; called on
                rank 0.

        Raises:
            UserError: This one or, in the background, the one before cannot be written.
        """
        self.join()
        job = partial(self._save, step, share, config, state, write)
        if not self.background:
            return job()

        def run() -> None:
            try:
                job()
            except Exception as error:  # raised by `join`, in the thread that asked
                self.failure = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def join(self) -> None:
        """Waits until no save is under way.

        Raises:
            UserError: The last one cannot be written.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def _save(self, step: int, share: Share, config: Any, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        target, main, ranks = self.folder / checkpoint_name(step), self.world.is_main, self.world.size
        aside = _aside(target)

        def begin() -> None:
            for stale in self.folder.glob(".step_*.tmp"):  # what crashes have left
                shutil.rmtree(stale, ignore_errors=True)
            _begin(target)

        def files() -> dict[str, dict[str, Any]]:
            optimizer = aside / optimizer_name(self.world.rank, ranks)
            mine = save_shard(config, share.weights, aside / shard_name(self.world.rank, ranks))
            save_file(share.optimizer, optimizer)
            return _entries(aside, [*mine, optimizer])

        def finish(entries: list[dict[str, dict[str, Any]]]) -> None:
            shards = _files(aside)
            save_config(config, torch.float32, aside)
            save_index(aside, ranks)
            write(aside)
            (aside / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            manifest = _entries(aside, _files(aside) - shards)
            for entry in entries:
                manifest |= entry
            _finish(aside, target, manifest)
            self.point_to(target)
            self._prune(target)

        try:
            self._together(target, lambda: begin() if main else None)
            entries = self._together(target, files)
            self._together(target, lambda: finish(entries) if main else None)
        finally:
            if main:
                shutil.rmtree(aside, ignore_errors=True)

    def _together(self, target: Path, part: Callable[[], T]) -> list[T]:
        """Returns what each rank's part returned; where one has failed, every rank raises."""
        results: list[T] = []
        reason, unexpected = "", None
        try:
            results.append(part())
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        except Exception as error:  # our own fault, but the others wait to hear of it
            reason, unexpected = repr(error), error
        reports = self.world.gather((results, reason), self.group)
        if unexpected is not None:
            raise unexpected
        for rank, (_, reason) in enumerate(reports):
            if reason:
                where = f"rank {rank}: " if self.world.size > 1 else ""
                raise UserError(f"{target}: cannot be written ({where}{reason})")
        return [result for results, _ in reports for result in results]

    def point_to(self, target: Path) -> None:
        """Points `latest` to the checkpoint."""
        link, latest = self.folder / ".latest.tmp", self.folder / "latest"
        if latest == target or (latest.is_symlink() and latest.readlink() == Path(target.name)):
            return
        if latest.is_dir() and not latest.is_symlink():  # the run was copied with links followed
            aside = self.folder / f"latest_before_{target.name}"
            while aside.exists():  # a copy of such a copy
                aside = aside.with_name(f"{aside.name}_")
            latest.rename(aside)
            _tell(f"{latest} is a folder: it is called {aside.name} now")
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.rename(latest)

    def _prune(self, target: Path) -> None:
        """Deletes the checkpoints up to the target that `keep_*` do not keep."""
        found = find_checkpoints(self.folder)
        # Newer ones are those that were passed over: they are neither kept for their age nor counted.
        found = found[: found.index(target) + 1]
        for old in found[: -self.keep_last if self.keep_last else 0]:
            if self.keep_every and _step(old) % self.keep_every == 0:
                continue
            try:
                old.rename(_aside(old))  # what is half deleted is no checkpoint
                shutil.rmtree(_aside(old))
            except OSError as error:
                _tell(f"warning: {old} cannot be deleted ({error.strerror}); the next save tries again")


def load_checkpoint(folder: Path, config: Any, load: Callable[[Tensors, Tensors], list[str]]) -> None:
    """Gives `load` the weights and optimizer state of a checkpoint.

    Args:
        folder: The checkpoint.
        config: The model's.
        load: The backend's.

    Raises:
        UserError: The weights are not those of this model.
    """
    with stored_weights(config, folder, extra=True) as weights, ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in folder.glob("optimizer*.safetensors")]
        absent = load(weights, {key: file.get_slice(key) for file in files for key in file.keys()})  # noqa: SIM118 (not a dict)
    if absent:
        raise UserError(
            f"run.resume: {absent[0]} is not in {folder}; begin a run of another run.name from it with model.path"
        )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns what `Checkpoints.save` was given as `state`.

    Raises:
        UserError: It lacks what every run needs to go on.
    """
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    for key in ("step", "loader", "data"):
        if key not in state:
            raise UserError(
                f"{checkpoint / STATE} has no '{key}', as other versions and loops write it, so the run cannot go on; "
                "begin one of another run.name from it with model.path"
            )
    return state


def optimizer_name(number: int, total: int) -> str:
    """Returns the name of one of `total` files of optimizer state; numbers count from 0."""
    return shard_name(number, total).replace("model", "optimizer")


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint without a fault, and a line for each newer one passed over.

    Raises:
        UserError: There are checkpoints, and none is whole.
    """
    passed: list[str] = []
    copied = folder / "latest"  # alone where only it was copied, with links followed
    candidates = find_checkpoints(folder) or [path for path in [copied] if path.is_dir()]
    for path in reversed(candidates):
        fault = find_fault(path)
        if fault is None:
            return path, passed
        passed.append(f"{path}: passed over, {fault}")
    if passed:
        raise UserError(f"no whole checkpoint is left; remove them to start over: {'; '.join(passed)}")
    return None, []


def find_fault(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, naming the file, or None where it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    try:
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (AttributeError, KeyError, TypeError):
        return f"{MANIFEST} is not what was written"
    if not expected:
        return f"{MANIFEST} names no file"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if file_hash(path) != digest:
            return f"{name} is not what was written (sha256 differs)"
    return None


def _tell(line: str) -> None:
    """Prints a line above the loop's progress bar."""
    tqdm.write(line, file=sys.stderr)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _begin(target: Path) -> Path:
    """Returns the empty folder to write `target` into."""
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def _files(folder: Path) -> set[Path]:
    """Returns the files in a folder and in those below it."""
    return {path for path in folder.rglob("*") if path.is_file()}


def _entries(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Returns the manifest's entries of these files of the folder, which are on disk."""
    entries = {}
    for path in sorted(paths):
        sync(path)
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    return entries


def _finish(aside: Path, target: Path, manifest: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest of the folder written aside, syncs it, and gives it its name."""
    (aside / MANIFEST).write_text(json.dumps(dict(sorted(manifest.items())), indent=2) + "\n", encoding="utf-8")
    for path in (aside / MANIFEST, *(path for path in aside.rglob("*") if path.is_dir()), aside):
        sync(path)
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)
    sync(target.parent)
