"""Adafactor, T5's own optimizer, on whole matrices and on matrices whose rows FSDP2 has sharded."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


class Adafactor(torch.optim.Optimizer):
    """Steps in proportion to a parameter's size, and keeps of a matrix's squared gradients only rows and columns.

    Computes what torch's does with `eps=(None, 1e-3), d=1.0`: a step is the rate times the parameter's root mean square
    (at least 1e-3), updates are clipped at a root mean square of 1.0, second moments decay as step**-0.8. torch's own
    changes sums over shards in place, which sharded tensors do not allow.

    Ref: Shazeer and Stern 2018, algorithms 4 and 5; the class matched is `torch.optim.Adafactor`.
    """

    def __init__(self, parameters: Iterable[Any], lr: float = 1.0, weight_decay: float = 0.0):
        """Makes an optimizer whose rate the loop sets before each step.

        Args:
            parameters: Or groups of them.
            lr: Relative step size.
            weight_decay: Decoupled, relative to the rate.
        """
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loss to return
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _step(parameter, parameter.grad, self.state[parameter], group["lr"], group["weight_decay"])


def _step(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], rate: float, weight_decay: float) -> None:
    tiny = torch.finfo(parameter.dtype).eps
    step = state["step"] = state.get("step", torch.zeros(())) + 1
    fresh = step.item() ** -0.8  # share of the new squares in the moments
    size = _root_mean_square(parameter).clamp(min=1e-3)
    parameter.mul_(1 - rate * weight_decay)
    squares = gradient.square()
    if gradient.ndim > 1:
        rows = _mixed(state, "row_var", squares.mean(-1, keepdim=True), fresh)  # (N, 1)
        columns = _mixed(state, "col_var", _on_all(squares.sum(-2, keepdim=True)) / squares.shape[-2], fresh)  # (1, M)
        moments = rows * columns / (_on_all(rows.sum(-2, keepdim=True)) / rows.shape[-2]).clamp(min=tiny)
    else:
        moments = _mixed(state, "variance", squares, fresh)
    update = gradient * moments.clamp(min=tiny * tiny).rsqrt()
    clip = _root_mean_square(update).clamp(min=1.0)
    if isinstance(parameter, DTensor) and isinstance(update, DTensor):  # of a single row, all ranks have the update
        update = update.redistribute(placements=parameter.placements)
    parameter.sub_(update * (size * min(rate, step.item() ** -0.5) / clip))


def _mixed(state: dict[str, Tensor], key: str, new: Tensor, fresh: float) -> Tensor:
    """Returns the moving average under this key, with a new value in it."""
    old = state.get(key)
    state[key] = new * fresh if old is None else old * (1 - fresh) + new * fresh
    return state[key]


def _on_all(total: Tensor) -> Tensor:
    """Returns a sum over shards as every rank's."""
    return total.redistribute(placements=[Replicate()]) if isinstance(total, DTensor) else total


def _root_mean_square(x: Tensor) -> Tensor:
    return (_on_all(x.square().sum()) / x.numel()).sqrt()
