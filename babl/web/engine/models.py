"""The model folders of this machine: finding them, the memory they need, and loading one."""

import ctypes
import gc
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from babl.errors import UserError, did_you_mean
from babl.files import joint_hash
from babl.generation import Engine
from babl.generation.conversation import Reader
from babl.generation.memory import need
from babl.models.weights import describe, weight_files
from babl.text.tokenizer import tokenizer_file
from babl.web.engine.protocol import ModelState

PATTERNS = ("*", "**/model-*", "**/checkpoints/latest")  # pulled or copied models, then those of `demo` and `train`
CONVERSATION_TOKENS = 2048  # that must fit in memory beside the weights
HASH_DIGITS = 12  # of a sha256, which name weights and tokenizers


def find_models(folders: Sequence[Path]) -> dict[str, Path]:
    """Returns the model folders by name, which is the path inside the folder searched; the first of a name counts.

    A folder that is itself a model has the name of the folder; one that several paths lead to, the first path's.
    """
    found: dict[str, Path] = {}
    seen: set[Path] = set()
    for folder in folders:
        if (folder / "config.json").is_file():
            found.setdefault(folder.name, folder)
        for pattern in PATTERNS:
            for path in sorted(folder.glob(pattern)):
                name = path.relative_to(folder)
                hidden = any(part.startswith(".") for part in name.parts)
                if os.path.isfile(path / "config.json") and not hidden and path.resolve() not in seen:
                    seen.add(path.resolve())
                    found.setdefault(os.fsencode(name.as_posix()).decode("utf-8", "backslashreplace"), path)
    return found


def _check_name(name: str, folder: Path) -> None:
    """Checks that a folder can be named in messages.

    Raises:
        UserError: Its name is not UTF-8.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of the folder {name} is not UTF-8; rename it") from None


def model_state(name: str, folder: Path, device: str, dtype: str) -> ModelState:
    """Returns the state of an unloaded model, from its folder without the weights."""
    try:
        _check_name(name, folder)
        known = describe(folder)
        if known["tokenizer"] == "none":
            raise UserError(f"{folder}: no tokenizer here")
        needed = need(known, device, dtype, CONVERSATION_TOKENS)
    except UserError as error:
        return ModelState(name, state="unusable", reason=str(error))
    except Exception as error:  # whatever is wrong with one folder, the others are listed
        traceback.print_exc(file=sys.stderr)
        return ModelState(name, state="unusable", reason=f"{folder}: cannot be read ({type(error).__name__})")
    return ModelState(
        name,
        known["family"],
        known["parameters"],
        known["bytes"],
        known["context"],
        memory=needed.weights,
        needed=needed.total,
        free=needed.free,
    )


def find_folder(name: str, folders: Sequence[Path]) -> Path:
    """Returns the folder of a model.

    Raises:
        UserError: There is no such model.
    """
    found = find_models(folders)
    if name not in found:
        raise UserError(f"no model {name!r}{did_you_mean(name, found)}")
    _check_name(name, found[name])
    return found[name]


def load_reader(name: str, folders: Sequence[Path]) -> Reader:
    """Returns the reader of a model, which makes its prompts.

    Raises:
        UserError: There is no such model, or it is unusable.
    """
    folder = find_folder(name, folders)
    known = describe(folder)
    return Reader.of(folder, known["family"], known["context"])


@dataclass
class Loaded:
    """A model that is loaded.

    Attributes:
        engine: Answers.
        reader: Makes its prompts.
        weights: Prefix of the sha256 of its weights.
        tokenizer: Likewise, of its tokenizer.
        memory: Bytes of its weights.
    """

    engine: Engine
    reader: Reader
    weights: str
    tokenizer: str
    memory: int


def load_model(name: str, folders: Sequence[Path], device: str, dtype: str) -> Loaded:
    """Loads a model.

    Raises:
        UserError: There is no such model, it is unusable or changes meanwhile, or there is too little free memory.
    """
    folder = find_folder(name, folders)
    state = model_state(name, folder, device, dtype)
    if state.state == "unusable":
        raise UserError(state.reason)
    if state.needed > state.free:
        raise UserError(
            f"{name} needs {state.needed >> 20:,} MiB of memory, but {state.free >> 20:,} MiB are free; unload another "
            "model"
        )
    reader = load_reader(name, folders)
    files = weight_files(folder)
    tokenizer_files = [folder / name for name in (tokenizer_file(folder),) if name]
    stats = _file_stats([*files, *tokenizer_files])
    weights, tokenizer = _hash(files), _hash(tokenizer_files)
    loaded = Loaded(Engine.load(folder, device, dtype), reader, weights, tokenizer, state.memory)
    changed = [path for path, stat in _file_stats(stats).items() if stat != stats[path]]
    if changed:  # what was hashed may differ from what was loaded
        raise UserError(f"{changed[0]} was changed while {name} was read from it; load it again once it is complete")
    return loaded


def _file_stats(files: Iterable[Path]) -> dict[Path, tuple[int, int, int] | None]:
    """Returns inode, size and time of change of each file; None if it is gone."""
    found: dict[Path, tuple[int, int, int] | None] = {}
    for path in files:
        try:
            of = path.stat()
            found[path] = (of.st_ino, of.st_size, of.st_mtime_ns)
        except FileNotFoundError:
            found[path] = None
    return found


def _hash(files: Sequence[Path]) -> str:
    """Returns the prefix of the joint sha256 of the files."""
    return joint_hash(files)[:HASH_DIGITS]


def release_memory() -> None:
    """Returns unused memory to the system, as far as the allocators allow."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
