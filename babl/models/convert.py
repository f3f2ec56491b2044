"""Pickled weights into safetensors, read in a process that can do nothing else.

`torch.load(weights_only=True)` makes tensors, and runs nothing that a pickle names. Should it be fooled, it is alone:
its process has no network (where Linux lets us make a network namespace), bounded memory, none of the environment's
tokens, and a Python that starts no programs, opens no sockets and writes no files.
"""

import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from babl.errors import UserError
from babl.files import refuse_pointer
from babl.models.hub import COMPANIONS
from babl.models.weights import (
    FAMILIES,
    HEAD,
    INDEX,
    PICKLE,
    PICKLE_INDEX,
    SHARD_BYTES,
    SINGLE,
    build_config,
    describe,
    listed_files,
    read_config,
    save_index,
    shard_name,
)

HEADROOM = 1 << 30  # bytes of memory for the reading process, besides the weights it holds
FENCE = ("unshare", "--user", "--map-root-user", "--net", "--")
ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR")  # all that the reading process is given
# Audit events, or their beginnings, of what it may not do.
FORBIDDEN = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty.", "ctypes.",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.kill", "shutil.",
)  # fmt: skip


def convert(folder: Path, to: Path | None, say: Callable[[str], None]) -> Path:
    """Returns the folder that now holds the model in safetensors: the family's tensors, bit for bit the pickles'.

    Args:
        folder: Has config.json and `pytorch_model.bin`, or shards with an index.
        to: A folder to make; None writes into `folder`, beside the pickles.
        say: Is told in a line how the pickles were read.

    Raises:
        UserError: There are no pickles here, or they ask for code, are damaged, or hold other tensors than the config
            says; nothing is left behind.
    """
    if to is not None and to.exists():
        raise UserError(f"--to: {to} is there already; remove it, or choose another folder")
    hf = read_config(folder)
    try:
        build_config(hf, tied=True)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    if listed_files(folder, SINGLE, INDEX):
        raise UserError(f"{folder} holds safetensors already, there is nothing to convert")
    pickles = listed_files(folder, PICKLE, PICKLE_INDEX)
    if not pickles:
        raise UserError(f"{folder}: no pickled weights (expected {PICKLE} or {PICKLE_INDEX})")
    for path in pickles:
        refuse_pointer(path)
    beside = folder if to is None else to.parent
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside, prefix=".converting-") as aside:
            made = Path(aside) / "model"
            made.mkdir()
            _make(folder, made, say)
            if to is not None:
                made.rename(to)
            else:  # the index last: until it is there, so is no shard
                for path in sorted(made.glob("*.safetensors*"), key=lambda path: path.name == INDEX):
                    path.rename(folder / path.name)
    except OSError as error:
        raise UserError(f"{beside} cannot be written ({error.strerror})") from None
    return to or folder


def _make(folder: Path, made: Path, say: Callable[[str], None]) -> None:
    """The folder `made` is that of the same model in safetensors, checked."""
    for name in COMPANIONS:
        if (folder / name).is_file():
            shutil.copy(folder / name, made / name)
    say(_read_apart(folder, made))
    parts = sorted(made.glob("part-*"))
    for number, part in enumerate(parts):
        part.chmod(made.stat().st_mode & 0o666)  # safetensors lets nobody but the owner read it
        part.rename(made / shard_name(number, len(parts)))
    save_index(made, len(parts))
    try:
        describe(made)
    except UserError as error:
        raise UserError(str(error).replace(str(made), str(folder))) from None


def _read_apart(folder: Path, made: Path) -> str:
    """The folder `made` has the tensors of the pickles, in files `part-N`; returns how they were read."""
    fenced = shutil.which(FENCE[0]) and subprocess.run([*FENCE, "true"], capture_output=True).returncode == 0
    here = [sys.executable, "-P", "-m", "babl.models.convert", str(folder.resolve()), str(made.resolve())]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*FENCE, *here] if fenced else here, env=environment, capture_output=True, text=True)
    told = done.stderr.strip().splitlines()
    if done.returncode == 2 and told:
        raise UserError(told[-1].replace(str(folder.resolve()), str(folder)))
    if done.returncode:
        why = told[-1] if told else f"exit code {done.returncode}"
        raise UserError(f"{folder}: the process that read the pickles died ({why})")
    network = "without network" if fenced else "whose Python has no sockets (this system makes no network namespace)"
    return f"the pickles were read in a process {network}, with at most {int(done.stdout) >> 20:,} MiB of memory"


def confine(memory: int) -> int:
    """This process may no longer do what reading weights does not need; returns the bytes of memory it may have.

    Args:
        memory: Bytes on top of what it has now, and of `HEADROOM`. Linux keeps to it; macOS only notes it.
    """
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    most = psutil.Process().memory_info().vms + memory + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def refuse(event: str, values: tuple[Any, ...]) -> None:
        writes = event == "open" and bool((values[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        if writes or event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is refused while pickles are read")

    sys.addaudithook(refuse)
    return most


def _write_parts(folder: Path, made: Path) -> int:
    """The folder `made` has the tensors, read back and found equal; returns the bytes of memory that were allowed."""
    config, pickles = build_config(read_config(folder), tied=True), listed_files(folder, PICKLE, PICKLE_INDEX)
    largest = max(path.stat().st_size for path in pickles)
    most = confine(largest + 3 * min(largest, SHARD_BYTES))  # a pickle, and a shard: as bytes, written, and read back
    number = 0
    for path in pickles:
        for shard in _shards(_distinct(_tensors(path), config)):
            part = made / f"part-{number:05d}.safetensors"
            number += 1
            save_file(shard, part, metadata={"format": "pt"})
            with safe_open(part, framework="pt") as file:
                for name, tensor in shard.items():
                    if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                        raise UserError(f"{path}: {name} was not written as it was read; is the disk sound?")
    return most


def _tensors(path: Path) -> dict[str, Tensor]:
    """Returns what a pickle of tensors holds, mapped rather than read where its form lets it be."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(
                f"{path} is refused: reading it would run {code[1]}, which is code and no tensor; nothing was run"
            ) from None
        raise UserError(f"{path}: not a readable pickle of tensors") from None
    except (RuntimeError, KeyError, ValueError, TypeError, EOFError, IndexError, AttributeError, OSError) as error:
        raise UserError(f"{path}: not a readable pickle of tensors ({type(error).__name__}: {_line(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, expected names and their tensors")
    for name, tensor in found.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or not isinstance(name, str):
            raise UserError(f"{path}: {name!r} is no plain tensor, expected names and their tensors")
    return found


def _distinct(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Returns the tensors, of those that are one only the first, but for a head that the config says is its own."""
    embedding = FAMILIES[config.model_type].embedding[0]
    kept: dict[str, Tensor] = {}
    seen: set[Any] = set()
    for name in sorted(tensors, key=lambda name: name != embedding):  # the embedding under its own name
        tensor = tensors[name].detach()
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        if view in seen and (name != HEAD or config.tie_word_embeddings):
            continue
        kept[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in seen else tensor.contiguous()
        seen |= {storage, view}
    return kept


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors in parts of at most `SHARD_BYTES`, unless one alone is larger."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    if shard:
        yield shard


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def main() -> int:
    """Is the process that reads: `python -m babl.models.convert FOLDER MADE`."""
    folder, made = map(Path, sys.argv[1:])
    try:
        print(_write_parts(folder, made))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except MemoryError:
        print(f"{folder}: the pickles need more memory than their size explains", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
