"""A whole model on every process, gradients averaged: DistributedDataParallel. One process is world size 1."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from babl.distributed.base import (
    OptimizerFn,
    Share,
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
from babl.distributed.env import World


class DDP:
    """See `babl.distributed.base.Backend`."""

    whole = True

    def __init__(self, world: World, bf16: bool):
        self.world, self.bf16 = world, bf16

    def setup(self, model: nn.Module, optimizer_fn: OptimizerFn) -> None:
        """Makes model and optimizer ready to train."""
        materialize(model)
        self.module = model.to(self.world.device)
        self.owners = assign_writers(model, self.world.size)
        self.optimizer = optimizer_fn(self.module)
        self.factors = settle(model, self.optimizer, self.world)
        self.trained = trained_names(model)
        self.model: nn.Module = DistributedDataParallel(self.module) if self.world.size > 1 else self.module

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Is entered for each forward and backward; ranks' gradients are reduced on the last micro-batch alone."""
        check_trained(self.module, self.trained)
        self.last = last
        alone = last or not isinstance(self.model, DistributedDataParallel)
        with (
            nullcontext() if alone else cast(DistributedDataParallel, self.model).no_sync(),
            torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            yield

    def backward(self, loss: Tensor) -> None:
        """Adds up gradients; DDP averages over ranks, and the loss is a share of a sum, hence the factor."""
        if self.last:  # DDP waits for a gradient of every parameter, also of those that this loss does not depend on
            reached = _leaves(loss)
            unused = [p for p in self.module.parameters() if p.requires_grad and p not in reached]
            loss = loss + sum(p.sum() * 0.0 for p in unused)
        (loss * self.world.size).backward()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yields gradients: before the last micro-batch the sum of this rank's, scaled by the number of ranks."""
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad

    def step(self, learning_rate: float, max_norm: float) -> float:
        """Clips, updates and forgets the gradients; returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), max_norm or math.inf).item()
        if math.isfinite(norm):
            set_learning_rate(self.optimizer.param_groups, self.factors, learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def exchange(self, key: str) -> None:
        """Swaps the weights with that part of the optimizer's state."""
        exchange_state(self.module.parameters(), self.optimizer.state, key)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and value of each parameter."""
        yield from ((name, parameter.detach()) for name, parameter in self.module.named_parameters())

    def save(self) -> Share:
        """Returns this rank's share; each rank has all, and copies its part."""
        share = Share({}, {})
        for name, parameter in self.module.named_parameters():
            if self.owners[name] == self.world.rank:
                share.weights[name] = parameter.detach().to("cpu", copy=True)
                for key, value in self.optimizer.state[parameter].items():
                    share.optimizer[f"{name}/{key}"] = torch.as_tensor(value).to("cpu", copy=True)
        return share

    @torch.no_grad()
    def load(self, weights: Tensors, optimizer: Tensors) -> list[str]:
        """Sets weights and optimizer state."""
        absent = check_stored(self.module, self.trained, weights, optimizer)
        parameters = dict(self.module.named_parameters())
        for name, stored in weights.items():
            parameters[name].copy_(stored[...])
        for key, stored in optimizer.items():
            name, _, part = key.partition("/")
            self.optimizer.state[parameters[name]][part] = stored[...].to(self.world.device, copy=True)
        return absent


def _leaves(loss: Tensor) -> set[Tensor]:
    """Returns the parameters that the loss depends on."""
    leaves, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.add(node.variable)
            todo += [parent for parent, _ in node.next_functions]
    return leaves
