"""The loss of a micro-batch, and the name of what broke where it is not a number."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from babl import ops
from babl.data.collate import IGNORE, Batch


def token_loss(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Returns the summed cross-entropy of the batch's targets; the caller divides by the whole step's count."""
    logits = model(**batch.inputs)  # (N, V): the head ran on the N targets alone
    return ops.cross_entropy_sum(logits, batch.labels[batch.labels != IGNORE], label_smoothing)


@torch.no_grad()
def name_nonfinite(model: nn.Module, batches: list[Batch]) -> str:
    """Returns which module's parameters or output are not finite first, and for which examples, in words.

    Every rank must call it: where weights are shared out, a forward needs all of them.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name} is not finite"
    modules = [_first_module(model, batch) for batch in batches]  # all of them, as every other rank does
    for batch, module in zip(batches, modules, strict=True):
        if module:
            return f"the output of {module} is not finite for examples {', '.join(batch.ids[:8])}"
    ids = ", ".join(name for batch in batches for name in batch.ids[:8])
    return f"a gradient is not finite, though every output is; examples {ids}"


def _first_module(model: nn.Module, batch: Batch) -> str | None:
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if not list(m.children())]
    try:
        loss = token_loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None if loss.isfinite() else "the loss"
