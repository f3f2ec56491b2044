"""Learning rate schedules: pure functions of the step."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "rsqrt", "trapezoid"]


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int, warmup: int) -> float:
    """Returns the rate of a step, in [0, peak]: a linear rise to the peak, then the schedule's shape.

    `linear` and `cosine` fall to 0 at the end; `rsqrt` falls with the root of the step from the end of the warm-up (or
    step 1); `trapezoid` stays at the peak and falls linearly over the last 40 % of the run.

    Args:
        schedule: The shape.
        peak: The highest rate.
        step: Counted from 1; the rate after `steps` is the one that the shape ends with.
        steps: Of the whole run.
        warmup: Steps of the rise; where it takes longer than the run, the peak is not reached.

    Ref: Vaswani et al. 2017 (rsqrt); Loshchilov and Hutter 2017 (cosine); Haegele et al. 2024 (trapezoid).
    """
    if step <= warmup:
        return peak * (step / warmup)
    progress = min(1.0, (step - 1 - warmup) / max(1, steps - warmup))
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        case "rsqrt":
            return peak * math.sqrt(max(1, warmup) / step)
        case "trapezoid":
            return peak * min(1.0, (1 - progress) / 0.4)
