"""Linear layers in the layout a CPU multiplies fastest: oneDNN's blocks, made once instead of at every product."""

from typing import cast

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer, fp32 on a CPU, whose weight is packed for oneDNN and can only be multiplied by.

    torch's compiler packs frozen weights with the same two operations.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Returns x Wᵀ + b, (..., out), of x (..., in)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack(model: nn.Module) -> None:
    """The model's linear layers are packed, where this machine gains by it; it can be asked, but not trained or saved.

    Each weight is let go as its packed copy is made, so memory holds the model once; a head tied to the embedding is
    there twice, as a table and packed.
    """
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in layers:
        model.set_submodule(name, PackedLinear(cast(nn.Linear, model.get_submodule(name))))
