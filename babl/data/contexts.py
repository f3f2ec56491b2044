"""What the model may see beside the question: the arms of the experiment."""

from typing import Literal, get_args

from babl.data.squad import Example

Arm = Literal["none", "gold"]
ARMS: tuple[Arm, ...] = get_args(Arm)


def context_for(example: Example, arm: Arm) -> str | None:
    """Returns the context of this arm, or None where the model sees the question alone."""
    return example.context if arm == "gold" else None
