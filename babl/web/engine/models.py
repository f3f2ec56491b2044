"""The model folders of this machine: which there are, what they would take, and one in memory."""

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

PATTERNS = ("*", "**/model-*", "**/checkpoints/latest")  # pulled or copied models, then what `demo` and `train` leave
CONVERSATION = 2048  # tokens, for which there must be room beside the weights
DIGITS = 12  # of a sha256, to name weights and tokenizers by


def find_models(folders: Sequence[Path]) -> dict[str, Path]:
    """Returns the model folders by name: their path inside the folder searched; where two agree, the first one's.

    A folder that is itself a model has the name of the folder.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if (folder / "config.json").is_file():
            found.setdefault(folder.name, folder)
        for pattern in PATTERNS:
            for path in sorted(folder.glob(pattern)):
                name = path.relative_to(folder)
                if os.path.isfile(path / "config.json") and not any(part.startswith(".") for part in name.parts):
                    found.setdefault(os.fsencode(name.as_posix()).decode("utf-8", "backslashreplace"), path)
    return found


def _check_name(name: str, folder: Path) -> None:
    """The folder can be named in messages.

    Raises:
        UserError: Its name is not UTF-8.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of the folder {name} is not UTF-8; rename it") from None


def model_state(name: str, folder: Path, device: str, dtype: str) -> ModelState:
    """Returns what is known of a folder without reading its weights."""
    try:
        _check_name(name, folder)
        known = describe(folder)
        if known["tokenizer"] == "none":
            raise UserError(f"{folder}: no tokenizer here")
        needed = need(known, device, dtype, CONVERSATION)
    except UserError as error:
        return ModelState(name, state="unusable", reason=str(error))
    except Exception as error:  # whatever is the matter with one folder, the others are listed
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


def folder_of(name: str, folders: Sequence[Path]) -> Path:
    """Returns the folder of a model.

    Raises:
        UserError: There is none of this name.
    """
    found = find_models(folders)
    if name not in found:
        raise UserError(f"no model {name!r}{did_you_mean(name, found)}")
    _check_name(name, found[name])
    return found[name]


def read_reader(name: str, folders: Sequence[Path]) -> Reader:
    """Returns how a model reads.

    Raises:
        UserError: There is none of this name, or it is unusable.
    """
    folder = folder_of(name, folders)
    known = describe(folder)
    return Reader.of(folder, known["family"], known["context"])


@dataclass
class Loaded:
    """A model in memory.

    Attributes:
        engine: Answers.
        reader: Reads for it.
        weights: Prefix of the sha256 of its weights.
        tokenizer: Of its tokenizer.
        memory: Bytes of its weights.
    """

    engine: Engine
    reader: Reader
    weights: str
    tokenizer: str
    memory: int


def load_model(name: str, folders: Sequence[Path], device: str, dtype: str) -> Loaded:
    """Returns the model, read into memory.

    Raises:
        UserError: There is none of this name, it is unusable, or the memory that is free is too small for it.
    """
    folder = folder_of(name, folders)
    state = model_state(name, folder, device, dtype)
    if state.state == "unusable":
        raise UserError(state.reason)
    if state.needed > state.free:
        raise UserError(
            f"{name} needs {state.needed >> 20:,} MiB of memory, but {state.free >> 20:,} MiB are free; unload another "
            "model"
        )
    reader = read_reader(name, folders)
    files = weight_files(folder)
    tokenizer_files = [folder / name for name in (tokenizer_file(folder),) if name]
    stamps = _stamps([*files, *tokenizer_files])
    weights, tokenizer = _hash(files), _hash(tokenizer_files)
    loaded = Loaded(Engine.load(folder, device, dtype), reader, weights, tokenizer, state.memory)
    changed = [path for path, stamp in _stamps(stamps).items() if stamp != stamps[path]]
    if changed:  # what was hashed need not be what was loaded
        raise UserError(f"{changed[0]} was changed while {name} was read from it; load it again once it is whole")
    return loaded


def _stamps(files: Iterable[Path]) -> dict[Path, tuple[int, int, int] | None]:
    """Returns what changes about each file when it is written or replaced; None where it is gone."""
    found: dict[Path, tuple[int, int, int] | None] = {}
    for path in files:
        try:
            of = path.stat()
            found[path] = (of.st_ino, of.st_size, of.st_mtime_ns)
        except FileNotFoundError:
            found[path] = None
    return found


def _hash(files: Sequence[Path]) -> str:
    """Returns the prefix of the sha256 of the files' sha256, or of the one file's own."""
    return joint_hash(files)[:DIGITS]


def give_back_memory() -> None:
    """What is no longer used goes back to the system, as far as its allocators let it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
