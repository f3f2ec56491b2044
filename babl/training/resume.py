"""Where a run begins: at its newest whole checkpoint, at the weights of a model folder, or at new ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from babl.data.loader import Loader
from babl.distributed.base import Tensors
from babl.models.weights import stored_weights
from babl.training.checkpoint import Checkpoints


def begin(
    checkpoints: Checkpoints,
    start: str,
    config: Any,
    loader: Loader,
    load: Callable[[Path], dict[str, Any]],
    load_weights: Callable[[Tensors, Tensors], None],
    say: Callable[[str], None],
) -> int:
    """Returns how many steps are done; model, optimizer and loader stand behind the last of them.

    Args:
        checkpoints: Of the run.
        start: The model folder that a run without checkpoints starts from; empty where the model is new.
        config: The model's.
        loader: Is put where the checkpoint says.
        load: Gives the model a checkpoint, and returns its state.
        load_weights: The backend's.
        say: Told what the run goes on from, and what it passed over.
    """
    newest, passed_over = checkpoints.newest_whole()
    for line in passed_over:
        say(line)
    if newest:
        state = load(newest)
        loader.restore(state["loader"])
        say(f"resumed from {newest}")
        return state["step"]
    if start:
        with stored_weights(config, Path(start)) as weights:
            load_weights(weights, {})
    return 0
