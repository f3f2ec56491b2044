"""What every family computes identically."""

import torch.nn.functional as F
from torch import Tensor, nn

from babl import ops


class Dropout(nn.Module):
    """Dropout whose mask belongs to the example, not to its place in a batch.

    `number_sites` gives each instance of a model its own stream.
    """

    site: int = 0

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        """Returns x, (B, ..., N), dropped by `key`, (B,) int64; by torch's own generator where key is None."""
        if not self.training or self.p == 0.0:
            return x
        return F.dropout(x, self.p) if key is None else ops.dropout(x, self.p, key, self.site)


def number_sites(model: nn.Module) -> None:
    """Every Dropout of the model has a number of its own, in the order the modules were built."""
    for site, module in enumerate(m for m in model.modules() if isinstance(m, Dropout)):
        module.site = site
