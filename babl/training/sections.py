"""Sections [run] and [train] of a configuration."""

import math
from dataclasses import dataclass, field
from typing import Literal

from babl.config import NonEmptyStr, NonNegativeInt, PositiveInt, Seed
from babl.training.recompute import Recompute


@dataclass
class RunConfig:
    """Section [run]: where a run lives.

    Attributes:
        name: Of its folder.
        dir: The folder of all runs.
        seed: Of everything random.
        resume: Goes on from the newest whole checkpoint, where there is one.
        allow: Keys of the configuration that may differ from those of the checkpoint, such as "optim.lr".
    """

    name: NonEmptyStr = "run"
    dir: str = "runs"
    seed: Seed = 0
    resume: bool = False
    allow: list[str] = field(default_factory=list)


@dataclass
class LoopConfig:
    """Section [train]: how long, how exact, how often; a period of 0 means only at the end.

    Attributes:
        steps: Updates of the weights.
        precision: Of the matrix products; weights, summed gradients and optimizer stay in fp32. fp16 is refused.
        activation_checkpointing: What the backward computes again in place of keeping it: `none`, `selective` (all but
            the matrix products), `all`.
        validate_every: Steps between validations.
        save_every: Steps between checkpoints.
        keep_last: Newest checkpoints that stay; 0 for all.
        keep_every: Checkpoints of every so many steps stay for good; 0 for none.
        async_save: Writes checkpoints while training goes on.
        preflight: Tries the longest batch, a save and a load before the first step.
        tensorboard: Writes the log for TensorBoard, too.
    """

    steps: PositiveInt = 1000
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: Recompute = "none"
    validate_every: NonNegativeInt = 0
    save_every: NonNegativeInt = 0
    keep_last: NonNegativeInt = 2
    keep_every: NonNegativeInt = 0
    async_save: bool = False
    preflight: bool = True
    tensorboard: bool = False

    @property
    def checkpoints_at_once(self) -> int:
        """Most checkpoints there at a time, the one being written included."""
        every = self.save_every or self.steps
        saves = math.ceil(self.steps / every)
        for_good = self.steps // math.lcm(every, self.keep_every) if self.keep_every else 0
        return min(saves, self.keep_last + 1 + for_good) if self.keep_last else saves
