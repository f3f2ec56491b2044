"""AdamW and Adafactor over explicit parameter groups."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import nn

from babl.config import NonNegativeFloat, NonNegativeInt
from babl.training.adafactor import Adafactor
from babl.training.schedule import Schedule


@dataclass
class OptimConfig:
    """Section [optim] of a run.

    Attributes:
        name: adamw, or adafactor, T5's own.
        lr: The highest learning rate.
        weight_decay: Of matrices, decoupled and relative to the rate.
        schedule: Of the rate, after the warm-up: see `babl.training.schedule`.
        warmup_steps: In which the rate rises from 0.
        max_grad_norm: To which the whole gradient is clipped; 0 clips nothing.
        label_smoothing: Share of each target that is spread over the vocabulary.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    lr: NonNegativeFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    schedule: Schedule = "constant"
    warmup_steps: NonNegativeInt = 0
    max_grad_norm: NonNegativeFloat = 1.0
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """Returns an optimizer over every parameter that is not frozen; the loop sets the rate before each step.

    A group's own `lr` is a factor of that rate: 1.0 here. A copy of this function with more groups gives each its own.

    Matrices decay; norms' weights, biases and T5's tables of position biases do not. AdamW is torch's fused kernel.
    Adafactor follows the published T5 recipe (`babl.training.adafactor`); it factors the second moments of every
    matrix, the original only where both dimensions reach 128.

    Args:
        model: Whose parameters.
        cfg: Which, and its weight decay: decoupled, relative to the learning rate.

    Ref: Loshchilov and Hutter 2019; Shazeer and Stern 2018, algorithm 5.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or "relative_bias" in key
        (plain if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), fused=True)
    return Adafactor(groups)


def state_bytes(cfg: OptimConfig, weights: int) -> int:
    """Returns about how many bytes of optimizer state a checkpoint has beside this many of weights.

    AdamW keeps two moments of each weight; the rows and columns that Adafactor keeps are few.
    """
    return 2 * weights if cfg.name == "adamw" else 0
