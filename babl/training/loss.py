"""The loss of a micro-batch, and the name of what broke where it is not a number."""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn

from babl.data.collate import IGNORE, Batch
from babl.distributed.env import World
from babl.distributed.failure import PeerFailure


def token_loss(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Returns the summed cross-entropy of the batch's targets; the caller divides by the whole step's count."""
    labels = batch.labels[batch.labels != IGNORE]  # (N,): the head runs on the N targets alone
    return model(**batch.inputs, labels=labels, label_smoothing=label_smoothing)


def raise_nonfinite(step: int, me: World, model: nn.Module, batches: list[Batch]) -> NoReturn:
    """Ends the run on every rank, each of which calls it; the first rank that finds what broke names it.

    Raises:
        FloatingPointError: Names step, rank, module and examples.
        PeerFailure: On the other ranks.
    """
    module = _first_nonfinite(model, batches)
    found = me.sum(*(float(module is not None and rank == me.rank) for rank in range(me.size)))
    if me.rank != found.index(max(found)):  # where no rank has found anything, the first one says so
        raise PeerFailure
    what = f"{module} is not finite" if module else "a gradient is not finite, though every output is"
    ids = ", ".join(name for batch in batches for name in batch.ids[:8])
    raise FloatingPointError(
        f"step {step}, rank {me.rank}: {what}; examples {ids}; nothing was updated: begin again, or "
        "from a checkpoint (model.path), with a lower optim.lr or optim.max_grad_norm, or a longer optim.warmup_steps"
    )


@torch.no_grad()
def _first_nonfinite(model: nn.Module, batches: list[Batch]) -> str | None:
    """Returns the first parameter or output that is not finite; each rank computes all its batches."""
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    outputs = [_first_module(model, batch) for batch in batches]
    return f"parameter {broken[0]}" if broken else next((f"the output of {name}" for name in outputs if name), None)


def _first_module(model: nn.Module, batch: Batch) -> str | None:
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            if any(isinstance(part, Tensor) and not part.isfinite().all() for part in parts):
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        loss = token_loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None if loss.isfinite() else "the loss"
