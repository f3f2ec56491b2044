"""Whether an optimizer computes the same on pieces of a parameter as on the whole: found by trying it on a tiny one."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from babl.errors import UserError

STEPS = 3


def check_flat(optimizer: torch.optim.Optimizer, backend: str) -> None:
    """Checks that the optimizer steps a matrix as it steps the same numbers in two flat, separate pieces.

    Raises:
        UserError: It does not: it looks at more than one number at a time.
    """

    def in_pieces(group: dict, start: Tensor, gradients: list[Tensor]) -> Tensor:
        cut = start.numel() // 2 + 1
        pieces = [start.flatten()[:cut], start.flatten()[cut:]]
        parts = [[g.flatten()[:cut] for g in gradients], [g.flatten()[cut:] for g in gradients]]
        return torch.cat([_stepped(optimizer, group, p, g) for p, g in zip(pieces, parts, strict=True)]).view_as(start)

    _compare(optimizer, in_pieces, backend, 4)


def check_sharded(optimizer: torch.optim.Optimizer, mesh: DeviceMesh, backend: str) -> None:
    """Checks that the optimizer steps a matrix as it steps one whose rows are sharded over the mesh; all ranks call.

    Raises:
        UserError: It does not: it takes a shard for the whole.
    """

    def sharded(group: dict, start: Tensor, gradients: list[Tensor]) -> Tensor:
        shards: list[Tensor] = [distribute_tensor(gradient, mesh, [Shard(0)]) for gradient in gradients]
        whole = _stepped(optimizer, group, distribute_tensor(start, mesh, [Shard(0)]), shards)
        assert isinstance(whole, DTensor)
        return whole.full_tensor()

    _compare(optimizer, sharded, backend, 2 * mesh.size() + 1)


def _compare(
    optimizer: torch.optim.Optimizer,
    in_parts: Callable[[dict, Tensor, list[Tensor]], Tensor],
    backend: str,
    rows: int,
) -> None:
    device = optimizer.param_groups[0]["params"][0].device
    numbers = torch.arange(rows * 3 * (STEPS + 1), dtype=torch.float32, device=device).mul(1.7).sin()
    start, *gradients = numbers.view(STEPS + 1, rows, 3)
    for group in optimizer.param_groups:
        try:
            whole = _stepped(optimizer, group, start, gradients)
            found = in_parts(group, start, gradients)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            reason = f" ({' '.join(str(error).split())[:120]})"
        else:
            moved = (whole - start).abs().max()
            if moved > 0 and (whole - found).abs().max() <= 1e-4 * moved:
                continue
            reason = "" if moved > 0 else " (it leaves alone what its param_groups hold, so that it cannot be tried)"
        raise UserError(
            f"{type(optimizer).__name__} does not compute the same on the pieces into which {backend} cuts parameters"
            f"{reason}; take one that treats each number by itself (AdamW, Lion, SGD), or distributed.backend=ddp"
        )


def _stepped(optimizer: torch.optim.Optimizer, group: dict, start: Tensor, gradients: list[Tensor]) -> Tensor:
    """Returns a parameter after a few steps of an optimizer like this one, without state, with the group's settings."""
    trial = object.__new__(type(optimizer))
    trial.__dict__ |= {name: value for name, value in vars(optimizer).items() if name != "step"}  # not a bound one
    parameter = nn.Parameter(start.clone())
    trial.state = defaultdict(dict)
    trial.param_groups = [group | {"params": [parameter], "lr": 0.1}]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        trial.step()
    return parameter.detach()
