"""Running out of memory, told in one line that says what takes less."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from babl.errors import UserError

ON_CPU = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")  # which torch raises as RuntimeError


@contextmanager
def memory_advice(doing: str) -> Iterator[None]:
    """Turns running out of memory within the context into one line that says what takes less.

    Args:
        doing: What is being done, for the message.

    Raises:
        UserError: In place of torch's or Python's error of a failed allocation.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(sign in first for sign in ON_CPU):
            raise
        raise UserError(
            f"out of memory in {doing} ({first[:160]}): raise batch.accumulation (same steps in smaller parts), lower "
            "batch.tokens or data.max_source_tokens, set train.activation_checkpointing=all, or share weights and "
            "optimizer among ranks (distributed.backend=fsdp or zero3; distributed.offload)"
        ) from error
