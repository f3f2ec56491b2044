"""A whole model on every process, gradients averaged: DistributedDataParallel. One process is world size 1."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from babl.distributed.backend import OptimizerFn, WeightsFn, set_learning_rate
from babl.distributed.env import World

OPTIMIZER = "optimizer.safetensors"


class DDP:
    """See `babl.distributed.backend.Backend`."""

    def __init__(self, world: World, autocast: torch.dtype | None):
        self.world, self.autocast = world, autocast

    def setup(self, model: nn.Module, optimizer_fn: OptimizerFn) -> None:
        """Model and optimizer are ready to train."""
        self.module = model.to(self.world.device)
        self.optimizer = optimizer_fn(self.module)
        self.model: nn.Module = DistributedDataParallel(self.module) if self.world.size > 1 else self.module

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Within it a forward and a backward run; gradients meet only on the step's last micro-batch."""
        alone = last or not isinstance(self.model, DistributedDataParallel)
        with (
            nullcontext() if alone else cast(DistributedDataParallel, self.model).no_sync(),
            torch.autocast(self.world.device.type, self.autocast, enabled=self.autocast is not None),
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

    def save(self, folder: Path, write_weights: WeightsFn) -> None:
        """The folder holds weights and optimizer state; rank 0 has all of it."""
        if not self.world.is_main:
            return
        write_weights(self.module, folder)
        state = {
            f"{name}/{key}": torch.as_tensor(value).contiguous()
            for name, parameter in self.module.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        save_file(state, folder / OPTIMIZER)

    def load(self, folder: Path, read_weights: WeightsFn) -> None:
        """Weights and optimizer state are those of the folder."""
        read_weights(self.module, folder)
        parameters = dict(self.module.named_parameters())
        with safe_open(folder / OPTIMIZER, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name, _, part = key.partition("/")
                self.optimizer.state[parameters[name]][part] = file.get_tensor(key).to(self.world.device)
