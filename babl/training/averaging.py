"""An average of the weights over the steps, which lives where the optimizer's state does.

So it is sharded, saved and gone on with as the rest of the state is, on every backend.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from babl.distributed.base import Backend

KEY = "average"


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> torch.optim.Optimizer:
    """Returns the optimizer, which from now on averages the weights it steps, exponentially.

    The average is that of the first step's weights at first, then `decay * average + (1 - decay) * weights`.

    Args:
        optimizer: As the optimizer function makes it, before `backend.setup` is done with it.
        decay: Share of the average that a step leaves as it is; 0.999 remembers about a thousand steps.

    Ref: Polyak and Juditsky 1992; Tarvainen and Valpola 2017.
    """

    @torch.no_grad()
    def average(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for group in stepped.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue  # an optimizer takes its first state for its own
                state = stepped.state[parameter]
                if KEY in state:
                    state[KEY].lerp_(parameter, 1 - decay)
                else:
                    state[KEY] = parameter.detach().clone()

    optimizer.register_step_post_hook(average)
    return optimizer


@contextmanager
def averaged_weights(backend: Backend) -> Iterator[None]:
    """Puts the averaged weights into the model while the context lasts, to validate or save; every rank enters it.

    Raises:
        UserError: There is no average yet, or the optimizer keeps none.
    """
    backend.exchange(KEY)
    try:
        yield
    finally:
        backend.exchange(KEY)
