"""The processes that torchrun has started: this one's rank and device, and what all of them do together."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from babl.rng import step_seeds

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process and its peers.

    Attributes:
        rank: 0 .. size - 1.
        size: Number of processes.
        device: Where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Returns each number's sum over all processes."""
        if self.size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Returns every rank's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def seed(self, seed: int, step: int) -> None:
        """Seeds Python's, numpy's and torch's generators, alike on all ranks, so that none of them needs saving."""
        python, numpy, of_torch = step_seeds(seed, step)
        random.seed(python)
        np.random.seed([numpy % 2**32, numpy >> 32])
        torch.manual_seed(of_torch)  # a CPU's generator reads the lower 32 bits

    def barrier(self) -> None:
        """Blocks until every rank arrives."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(timeout_seconds: float = 600) -> Iterator[World]:
    """Yields the world as torchrun describes it, one process without torchrun; the process group ends with it.

    Args:
        timeout_seconds: How long a collective waits for the other ranks before it raises, on gloo, or ends the
            process, on NCCL. It bounds how long a run outlives a machine, or a network, that has gone silent.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if size > 1:
        timeout = timedelta(seconds=timeout_seconds)
        # Groups made later, of checkpoints and by DeepSpeed, wait as long as torch's default says.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
        dist.init_process_group(_transport(device), timeout=timeout)
    left_well = size == 1
    try:
        yield World(rank, size, device)
        left_well = True
    finally:
        # After an error it stays open until the process ends: this rank must first say what happened to it.
        if left_well and dist.is_initialized():
            dist.destroy_process_group()


def start_group(world: World) -> None:
    """Starts a process group where there is none, even of one process; it ends with `world`."""
    if not dist.is_initialized():
        dist.init_process_group(_transport(world.device), store=dist.HashStore(), rank=0, world_size=1)


def _transport(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
