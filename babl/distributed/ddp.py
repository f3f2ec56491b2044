"""A whole model on every process, gradients averaged: DistributedDataParallel. One process is world size 1."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from babl.distributed.base import OptimizerFn, Share, Tensors, deal, materialize, set_learning_rate
from babl.distributed.env import World


class DDP:
    """See `babl.distributed.base.Backend`."""

    whole = True

    def __init__(self, world: World, bf16: bool):
        self.world, self.bf16 = world, bf16

    def setup(self, model: nn.Module, optimizer_fn: OptimizerFn) -> None:
        """Model and optimizer are ready to train."""
        materialize(model)
        self.module = model.to(self.world.device)
        self.owners = deal(model, self.world.size)
        self.optimizer = optimizer_fn(self.module)
        self.model: nn.Module = DistributedDataParallel(self.module) if self.world.size > 1 else self.module

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Within it a forward and a backward run; gradients meet only on the step's last micro-batch."""
        alone = last or not isinstance(self.model, DistributedDataParallel)
        with (
            nullcontext() if alone else cast(DistributedDataParallel, self.model).no_sync(),
            torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            yield

    def backward(self, loss: Tensor) -> None:
        """Gradients add up; DDP averages over ranks, and the loss is a share of a sum, hence the factor."""
        (loss * self.world.size).backward()

    def step(self, learning_rate: float, max_norm: float) -> float:
        """Clips, updates and forgets the gradients; returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), max_norm or math.inf).item()
        if math.isfinite(norm):
            set_learning_rate(self.optimizer.param_groups, learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

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
    def load(self, weights: Tensors, optimizer: Tensors) -> None:
        """Weights and optimizer state are these."""
        parameters = dict(self.module.named_parameters())
        for name, parameter in parameters.items():
            parameter.copy_(weights[name][...])
        for key, stored in optimizer.items():
            name, _, part = key.partition("/")
            self.optimizer.state[parameters[name]][part] = stored[...].to(self.world.device, copy=True)
