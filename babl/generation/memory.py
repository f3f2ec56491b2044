"""Where a model is loaded, what it takes of the memory there, and whether that much is free."""

from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from babl.errors import UserError

SPARE = 256 << 20  # bytes of memory to leave free
UNBOUNDED = 2048  # tokens that are reckoned with where a model's context has no bound


def placement(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """Returns where a model is loaded, and the dtype of its parameters there.

    Args:
        device: "auto", "cpu", "cuda" or "mps"; auto takes the fastest there is.
        dtype: "auto", "float32" or "bfloat16"; auto takes bfloat16 where a GPU has it, float32 elsewhere.

    Raises:
        UserError: This machine has no such device.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, found in here.items() if found)
    if not here[device]:
        raise UserError(f"--device is {device!r}, but torch finds {' and '.join(n for n in here if here[n])} alone")
    if dtype == "auto":
        halves = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if halves else "float32"
    return device, getattr(torch, dtype)


def free_memory(device: str) -> int:
    """Returns the bytes that are free on "cuda", or, for any other device, in the memory this process may have.

    What torch keeps of a GPU's memory and does not use is free, too.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(psutil.virtual_memory().available, *left_of_limits(Path("/")))


def left_of_limits(root: Path) -> list[int]:
    """Returns the bytes left of each limit that a container, or a job of a cluster, sets on this process.

    What files have cached counts as left: Linux gives it back.

    Args:
        root: Of the file system that has `proc` and `sys`; where they are not Linux's, there are no limits.

    Ref: Linux's admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for controllers, path in (line.split(":", 2)[1:] for line in groups):
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif controllers == "memory":
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        inside = Path(path.lstrip("/"))
        for group in {top / inside, *(top / each for each in inside.parents)}:
            try:
                most, used, stat = ((group / name).read_text() for name in (*names[:2], "memory.stat"))
            except OSError:  # the root has no limit, and what is above a container is not seen in it
                continue
            if most.strip() != "max":
                cached = dict(line.split() for line in stat.splitlines())
                files = sum(int(cached.get(f"{names[2]}{kind}_file", 0)) for kind in ("inactive", "active"))
                left.append(int(most) - int(used) + files)
    return left


class Need(NamedTuple):
    """What a model takes where it is loaded.

    Attributes:
        device: Where that is.
        dtype: Of its parameters.
        weights: Bytes of its parameters.
        cache: Bytes of keys and values of one conversation.
        context: Tokens of that conversation.
        free: Bytes that are free.
    """

    device: str
    dtype: torch.dtype
    weights: int
    cache: int
    context: int
    free: int

    @property
    def total(self) -> int:
        """Bytes that must be free."""
        return self.weights + self.cache + SPARE

    @property
    def fits(self) -> bool:
        """Whether they are."""
        return self.total <= self.free

    @property
    def room(self) -> int:
        """Tokens of a conversation that there is memory for, at most `context`."""
        return max(0, min(self.context, (self.free - SPARE - self.weights) * self.context // self.cache))

    def facts(self) -> dict[str, Any]:
        """Returns it by name, for people and for JSON."""
        return {
            "device": self.device,
            "loaded_dtype": str(self.dtype).removeprefix("torch."),
            "weights_bytes": self.weights,
            "cache_bytes": self.cache,
            "cache_tokens": self.context,
            "needed_bytes": self.total,
            "free_bytes": self.free,
            "fits": self.fits,
            "room": self.room,
        }


def need(known: dict[str, Any], device: str, dtype: str, context: int | None = None) -> Need:
    """Returns what `Engine.load`, and then a conversation, take of the memory.

    Args:
        known: From `babl.models.weights.describe`.
        device: As for `placement`.
        dtype: As for `placement`.
        context: Tokens of the conversation, at most the model's own; all of them where None.

    Raises:
        UserError: This machine has no such device, or there is no such context.
    """
    if context is not None and context < 1:
        raise UserError(f"--context is {context}, expected at least 1")
    device, loaded = placement(device, dtype)
    parameters = known["parameters"]
    if device == "cpu" and loaded == torch.float32 and torch.backends.mkldnn.is_available():
        parameters += known["shared_parameters"]  # as a table, and packed, see `babl.generation.packed`
    most = known["context"] or max(UNBOUNDED, context or 0)
    tokens = most if context is None else min(context, most)
    cache = known["cache_per_token"] * tokens * loaded.itemsize
    return Need(device, loaded, parameters * loaded.itemsize, cache, tokens, free_memory(device))
