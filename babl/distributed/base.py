"""What every backend gives the loop, and what the backends share."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from babl.config import PositiveInt
from babl.distributed.env import World
from babl.errors import UserError

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
        """Makes model and optimizer ready to train; a model on the meta device gets its values from `load`.

        Frozen parameters (`requires_grad` false, or in none of the optimizer's groups) stay as they are.

        Raises:
            UserError: The backend cannot shard this optimizer, or the groups' rates have no common scale.
        """

    def microbatch(self, last: bool) -> AbstractContextManager[None]:
        """Is entered for each forward and backward; the step's gradients are complete after its last micro-batch.

        A validation's forward also runs within one, for the precision of training.
        """

    def backward(self, loss: Tensor) -> None:
        """Adds up the gradients of the loss, which is already divided by the step's target tokens on all ranks.

        A trained parameter that none of a step's losses depends on has a gradient of zero: it decays, and moves on with
        its momentum, whatever the backend and the number of ranks.
        """

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and gradient of each parameter that has one, as this rank holds it.

        After the last micro-batch it is the step's, before clipping, and what is changed in place is what `step` takes.

        Raises:
            UserError: This backend does not hold gradients by parameter at this point.
        """

    def step(self, learning_rate: float, max_norm: float) -> float:
        """Clips, updates and forgets the gradients; returns their norm before clipping.

        A norm that is not finite updates nothing. A maximum of 0 clips nothing.

        Args:
            learning_rate: Of the groups whose own `lr` was 1.0 at `setup`; that of the others is a factor of it.
            max_norm: Of all gradients together.
        """

    def exchange(self, key: str) -> None:
        """Swaps the weights with the part `key` of the optimizer's state; a second call swaps them back.

        Raises:
            UserError: The optimizer's state has no such part.
        """

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and whole value of each parameter as a forward uses it; every rank must go through all."""

    def save(self) -> Share:
        """Returns this rank's share of weights and optimizer state; every rank must ask for its own."""

    def load(self, weights: Tensors, optimizer: Tensors) -> list[str]:
        """Sets weights and optimizer state, by the names of `Share`; each rank reads what it keeps.

        Returns:
            The parameters that `weights` does not have, which keep their values.

        Raises:
            UserError: There is a weight or a state of a parameter that the model does not have or does not train.
        """


def assign_writers(model: nn.Module, ranks: int) -> dict[str, int]:
    """Returns which rank writes each parameter: the largest first, each to the rank that has least to write."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    loads, owners = [0] * ranks, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def materialize(model: nn.Module) -> None:
    """Gives each parameter on the meta device memory on the CPU, a tied one once.

    It is memory without values, and the system gives a page its place only when something is written there: what is
    cut up and moved on before it is loaded never takes it.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                module._parameters[name] = made[parameter]


def settle(model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> list[float]:
    """Makes model and optimizer agree on what is trained; returns each group's factor of the learning rate.

    Frozen parameters leave the optimizer's groups and state, and what no group has is frozen.

    Raises:
        UserError: Nothing is trained, or `group_factors` says so.
    """
    factors = group_factors([group["lr"] for group in optimizer.param_groups])
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    kept = [i for i, group in enumerate(optimizer.param_groups) if group["params"]]
    optimizer.param_groups[:] = [optimizer.param_groups[i] for i in kept]
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if not trained:
        raise UserError("nothing is trained: every parameter is frozen, or the optimizer has none")
    left = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter not in trained
    ]
    if left and world.is_main:
        print(f"the optimizer has no group for {len(left)} parameters, first {left[0]}: frozen", file=sys.stderr)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
    for frozen in optimizer.state.keys() - trained:  # Adagrad makes its state when it is made
        del optimizer.state[frozen]
    return [factors[i] for i in kept]


def group_factors(rates: list[float]) -> list[float]:
    """Returns what the loop's learning rate is multiplied with in each parameter group.

    Args:
        rates: The groups' own `lr`. Where all are the same, whatever it is, groups follow the loop's rate.

    Raises:
        UserError: They differ, and none is 1.0, so it is not known what they are factors of.
    """
    if len(set(rates)) == 1:
        return [1.0] * len(rates)
    if 1.0 not in rates:
        found = ", ".join(f"{rate:g}" for rate in sorted(set(rates)))
        raise UserError(
            f"the optimizer's groups have lr {found}: a group's lr is a factor of the rate that the loop sets, so one "
            "of them must be 1.0; divide them by the rate of the group that is to follow the loop"
        )
    return [float(rate) for rate in rates]


def set_learning_rate(groups: Iterable[dict], factors: list[float], learning_rate: float) -> None:
    """Sets every parameter group's rate to its factor of this one."""
    for group, factor in zip(groups, factors, strict=True):
        group["lr"] = learning_rate * factor


def trained_names(model: nn.Module) -> set[str]:
    """Returns the names of the parameters that are not frozen."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_trained(model: nn.Module, trained: set[str]) -> None:
    """Checks that what is trained is what was to be trained at `setup`.

    Raises:
        UserError: A parameter was frozen, or no longer is, since.
    """
    changed = sorted(trained_names(model) ^ trained)
    if changed:
        raise UserError(
            f"{changed[0]}: requires_grad was changed after backend.setup, which a backend does not see; freeze before "
            "it, and go on with other parameters in a run of its own that starts from a checkpoint (model.path)"
        )


def check_stored(model: nn.Module, trained: set[str], weights: Tensors, optimizer: Tensors) -> list[str]:
    """Returns the model's parameters that `weights` lacks, where nothing is stored that the model has no use for.

    Raises:
        UserError: There is.
    """
    names = {name for name, _ in model.named_parameters()}
    for name in sorted(weights.keys() - names):
        raise UserError(f"{name} is in the checkpoint, but this model has no such parameter")
    for name in sorted({key.partition("/")[0] for key in optimizer} - trained):
        raise UserError(
            f"{name} was trained when the checkpoint was saved, and is frozen now; begin a run of another run.name "
            "from it with model.path"
        )
    return sorted(names - weights.keys())


@torch.no_grad()
def exchange_state(parameters: Iterable[Tensor], state: Mapping[Tensor, dict[str, Any]], key: str) -> None:
    """Swaps the values of the parameters with the part `key` of their optimizer state.

    Raises:
        UserError: There is no such part.
    """
    pairs = [(parameter, state[parameter][key]) for parameter in parameters if key in state[parameter]]
    if not pairs:
        raise UserError(f'the optimizer keeps no "{key}" of the weights, or has not made a step')
    for parameter, other in pairs:
        kept = parameter.detach().clone()
        parameter.copy_(other)
        other.copy_(kept)
