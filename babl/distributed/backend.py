"""The five verbs behind which every way of spreading a model over processes hides."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

OptimizerFn = Callable[[nn.Module], torch.optim.Optimizer]
WeightsFn = Callable[[Any, Path], None]  # writes or reads a model folder's weights


class Backend(Protocol):
    """What the loop asks of a backend."""

    model: nn.Module
    """Call this one in the loop: it synchronises gradients."""

    def setup(self, model: nn.Module, optimizer_fn: OptimizerFn) -> None:
        """Model and optimizer are ready to train."""

    def microbatch(self, last: bool) -> AbstractContextManager[None]:
        """Within it a forward and a backward run; gradients meet only on the step's last micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, already divided by the step's target tokens on all ranks, are added up."""

    def step(self, learning_rate: float, max_norm: float) -> float:
        """Clips, updates and forgets the gradients; returns their norm before clipping.

        A norm that is not finite updates nothing.
        """

    def save(self, folder: Path, write_weights: WeightsFn) -> None:
        """The folder holds weights and optimizer state, by parameter name."""

    def load(self, folder: Path, read_weights: WeightsFn) -> None:
        """Weights and optimizer state are those of the folder."""


def set_learning_rate(groups: Iterable[dict], learning_rate: float) -> None:
    """Every parameter group steps with this rate."""
    for group in groups:
        group["lr"] = learning_rate
