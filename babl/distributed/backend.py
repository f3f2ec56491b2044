"""Chooses the backend that a run asks for."""

from babl.distributed.base import Backend, DistributedConfig
from babl.distributed.env import World
from babl.errors import UserError


def make_backend(cfg: DistributedConfig, world: World, bf16: bool) -> Backend:
    """Returns the backend of that name.

    Args:
        cfg: Which, and what it offloads.
        world: The processes.
        bf16: Whether matrices are multiplied in bf16; weights, the sum of gradients and the optimizer stay fp32.

    Raises:
        UserError: The backend has no such offload, or DeepSpeed's settings are given to another.
    """
    able = {"ddp": (), "fsdp": ("all",), "zero3": ("optimizer", "all")}.get(cfg.backend, ("optimizer",))
    if cfg.offload not in ("none", *able):
        choices = ", ".join(f'"{choice}"' for choice in ("none", *able))
        raise UserError(f'distributed.offload is "{cfg.offload}", but {cfg.backend} has {choices}')
    if cfg.deepspeed and not cfg.backend.startswith("zero"):
        raise UserError(f'distributed.deepspeed is "{cfg.deepspeed}", but backend "{cfg.backend}" is not DeepSpeed\'s')
    match cfg.backend:
        case "ddp":
            from babl.distributed.ddp import DDP

            return DDP(world, bf16)
        case "fsdp":
            from babl.distributed.fsdp import FSDP

            return FSDP(world, bf16, cfg.offload == "all")
        case _:
            from babl.distributed.zero import Zero

            return Zero(world, bf16, cfg)
