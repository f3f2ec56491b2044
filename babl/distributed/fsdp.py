"""Weights, gradients and optimizer in shards, one block of the model put together at a time: torch's FSDP2."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from babl.distributed.base import (
    OptimizerFn,
    Share,
    Stored,
    Tensors,
    assign_writers,
    check_stored,
    check_trained,
    exchange_state,
    materialize,
    set_learning_rate,
    settle,
    trained_names,
)
from babl.distributed.env import World, start_group
from babl.distributed.trial import check_sharded
from babl.errors import UserError


class FSDP:
    """See `babl.distributed.base.Backend`."""

    whole = False

    def __init__(self, world: World, bf16: bool, offload: bool):
        self.world, self.offload = world, offload
        self.precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()

    def setup(self, model: nn.Module, optimizer_fn: OptimizerFn) -> None:
        """Makes model and optimizer ready to train."""
        start_group(self.world)
        self.owners = assign_writers(model, self.world.size)
        materialize(model)
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        # On a CPU there is nothing to offload to, and torch would look for a GPU.
        offload = CPUOffloadPolicy() if self.offload and self.world.device.type != "cpu" else OffloadPolicy()
        units: list[nn.Module] = getattr(model, "units", list)()  # a module without any is sharded as one
        for part in (*units, model):
            sharded = fully_shard(part, mesh=mesh, mp_policy=self.precision, offload_policy=offload)
            sharded.set_gradient_divide_factor(1.0)  # a loss is a share of a sum: gradients are added, never averaged
            sharded.set_force_sum_reduction_for_comms(True)
        self.model: nn.Module = model
        # The shards. What the model calls its parameters are, between a forward and a backward, its whole tensors.
        self.parameters = dict(model.named_parameters())
        self.optimizer = optimizer_fn(model)
        self.factors = settle(model, self.optimizer, self.world)
        check_sharded(self.optimizer, mesh, "fsdp")
        self.trained = trained_names(model)

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Is entered for each forward and backward; ranks' gradients are reduced on the last micro-batch alone.

        Until then each rank keeps them whole.
        """
        assert isinstance(self.model, FSDPModule)
        check_trained(self.model, self.trained)
        self.model.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Adds up gradients."""
        loss.backward()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yields this rank's shards (rows) of the gradients; none has one before the last micro-batch has met.

        Raises:
            UserError: It has not.
        """
        found = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if not found:
            raise UserError("fsdp has no gradients before the step's last micro-batch; distributed.backend=ddp has")
        for name, gradient in found.items():
            assert isinstance(gradient, DTensor)
            yield name, gradient.to_local()

    def step(self, learning_rate: float, max_norm: float) -> float:
        """Clips, updates and forgets the gradients; returns their norm before clipping."""
        for parameter in self.parameters.values():
            if parameter.requires_grad and parameter.grad is None:  # no loss of this step depends on it
                parameter.grad = torch.zeros_like(parameter)
        total = torch.nn.utils.clip_grad_norm_(self.parameters.values(), max_norm or math.inf)
        norm = _whole(total).item()
        if math.isfinite(norm):
            set_learning_rate(self.optimizer.param_groups, self.factors, learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def exchange(self, key: str) -> None:
        """Swaps the weights with that part of the optimizer's state."""
        self._forget_whole()
        exchange_state(self.parameters.values(), self.optimizer.state, key)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and whole value of each parameter, one put together at a time."""
        yield from ((name, _whole(parameter.detach())) for name, parameter in self.parameters.items())

    def save(self) -> Share:
        """Returns this rank's share; tensors are put together one at a time."""
        share = Share({}, {})
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            found = [(share.weights, name, parameter.detach())]
            found += [(share.optimizer, f"{name}/{key}", value) for key, value in state.items()]
            for target, key, value in found:
                whole = _whole(value)  # every rank takes part, for it gives its shard
                if self.owners[name] == self.world.rank:
                    target[key] = torch.as_tensor(whole).to("cpu", copy=True)
        return share

    @torch.no_grad()
    def load(self, weights: Tensors, optimizer: Tensors) -> list[str]:
        """Sets weights and optimizer state; each rank reads the rows of its shards."""
        absent = check_stored(self.model, self.trained, weights, optimizer)
        self._forget_whole()
        for name, stored in weights.items():
            _read_shard(self.parameters[name].data, stored)
        for key, stored in optimizer.items():
            name, _, part = key.partition("/")
            parameter = self.parameters[name]
            assert isinstance(parameter, DTensor)
            state = self.optimizer.state[parameter]
            if tuple(stored.get_shape()) == tuple(parameter.shape):
                state[part] = torch.zeros_like(parameter)
                _read_shard(state[part], stored)
            elif stored.get_shape():  # what an optimizer keeps of rows, sharded as they are, or of columns
                rows = stored.get_shape()[0] == parameter.shape[0]
                value, placement = stored[...].to(parameter.device), Shard(0) if rows else Replicate()
                state[part] = distribute_tensor(value, parameter.device_mesh, [placement], src_data_rank=None)
            else:  # the count of steps
                state[part] = stored[...].to(parameter.device, copy=True)
        return absent

    def _forget_whole(self) -> None:
        """Frees the whole tensors that a forward has left, so that none outlives the shards it was made of."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _read_shard(target: Tensor, stored: Stored) -> None:
    """Reads this rank's rows of the stored tensor into the target."""
    assert isinstance(target, DTensor)
    local = target.to_local()
    rows = -(-target.shape[0] // target.device_mesh.size())  # of every rank but the last ones
    first = min(target.device_mesh.get_local_rank() * rows, target.shape[0])
    if len(local):
        local.copy_(stored[first : first + len(local)])
