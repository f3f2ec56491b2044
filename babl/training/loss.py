"""The loss of a micro-batch, and the name of what broke where it is not a number."""

import torch
from torch import Tensor, nn

from babl import ops
from babl.data.collate import IGNORE, Batch


def token_loss(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Returns the summed cross-entropy of the batch's targets; the caller divides by the whole step's count."""
    logits = model(**batch.inputs)  # (N, V): the head ran on the N targets alone
    return ops.cross_entropy_sum(logits, batch.labels[batch.labels != IGNORE], label_smoothing)


@torch.no_grad()
def first_nonfinite(model: nn.Module, batch: Batch) -> str:
    """Returns the name of the first module whose parameters, or else whose output on this batch, are not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name}"
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if not list(m.children())]
    try:
        model(**batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return f"module {found[0]}" if found else "the backward pass"
