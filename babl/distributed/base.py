"""What every backend gives the loop, and what the backends share."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from babl.config import PositiveInt

OptimizerFn = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass
class DistributedConfig:
    """Section [distributed] of a run.

    Attributes:
        backend: ddp keeps a whole model on every process; fsdp and zero3 share out weights, gradients and optimizer,
            zero2 gradients and optimizer, zero1 the optimizer alone. zero1, zero2 and zero3 are DeepSpeed's.
        offload: What waits in the CPU's memory: the optimizer (zero1, zero2, zero3), or all (fsdp, zero3).
        deepspeed: A JSON file of DeepSpeed's own settings, merged into those made here.
        timeout_seconds: A process that has waited this long for another one ends the run.
    """

    backend: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    offload: Literal["none", "optimizer", "all"] = "none"
    deepspeed: str = ""
    timeout_seconds: PositiveInt = 600


class Stored(Protocol):
    """A tensor on disk, of which only what is indexed is read."""

    def get_shape(self) -> list[int]:
        """Returns its whole shape."""

    def __getitem__(self, index: Any, /) -> Tensor:
        """Returns a part of it; all with `...`."""


Tensors = Mapping[str, Stored]


class Share(NamedTuple):
    """What one rank writes of a checkpoint, copied to the CPU; the ranks' shares together hold every tensor once.

    Attributes:
        weights: By parameter name, in fp32.
        optimizer: By parameter name, a slash, and the optimizer's name for this part of its state.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class Backend(Protocol):
    """What the loop asks of a backend."""

    model: nn.Module
    """Call this one in the loop: it synchronises gradients."""

    whole: bool
    """Whether every rank has all weights, so that one alone can call the model it gave to `setup`."""

    def setup(self, model: nn.Module, optimizer_fn: OptimizerFn) -> None:
        """Model and optimizer are ready to train; a model on the meta device waits for `load` to have values."""

    def microbatch(self, last: bool) -> AbstractContextManager[None]:
        """Within it a forward and a backward run; the step's gradients are complete after its last micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, already divided by the step's target tokens on all ranks, are added up."""

    def step(self, learning_rate: float, max_norm: float) -> float:
        """Clips, updates and forgets the gradients; returns their norm before clipping.

        A norm that is not finite updates nothing. A maximum of 0 clips nothing.
        """

    def save(self) -> Share:
        """Returns this rank's share of weights and optimizer state; every rank must ask for its own."""

    def load(self, weights: Tensors, optimizer: Tensors) -> None:
        """Weights and optimizer state are these, by the names of `Share`; each rank reads what it keeps."""


def deal(model: nn.Module, ranks: int) -> dict[str, int]:
    """Returns which rank writes each parameter: the largest first, each to the rank that has least to write."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    loads, owners = [0] * ranks, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def materialize(model: nn.Module) -> None:
    """Each parameter on the meta device has memory on the CPU, a tied one once.

    It is memory without values, and the system gives a page its place only when something is written there: what is
    cut up and moved on before it is loaded never takes it.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
                module._parameters[name] = made[parameter]


def set_learning_rate(groups: Iterable[dict], learning_rate: float) -> None:
    """Every parameter group steps with this rate."""
    for group in groups:
        group["lr"] = learning_rate
