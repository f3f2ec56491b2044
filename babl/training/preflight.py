"""What would break late is tried before the first step: the longest batch, a save, a load, the room on the disk."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from babl.data.collate import Batch
from babl.distributed.base import Backend
from babl.distributed.env import World
from babl.errors import UserError
from babl.models.weights import stored_weights
from babl.training.checkpoint import Checkpoints, load_checkpoint
from babl.training.loss import token_loss
from babl.training.memory import memory_advice
from babl.training.metrics import peak_memory
from babl.training.optimizer import OptimConfig, state_bytes

MIB = 2**20


def try_batch(backend: Backend, longest: Batch, validated: Batch, say: Callable[[str], None]) -> None:
    """Checks that the longest micro-batches of training and validation fit into memory; changes nothing.

    The loss is made no number: by their own contract, backends update nothing then, and forget the gradients.

    Args:
        backend: Ready to train.
        longest: Forward and backward run on it.
        validated: A forward runs on it, as in a validation.
        say: Prints.

    Raises:
        UserError: There is not enough memory.
    """
    shape = " x ".join(map(str, longest.inputs["input_ids"].shape))
    with memory_advice(f"the longest micro-batch ({shape} tokens)"):
        for last in (False, True):
            with backend.microbatch(last):
                backend.backward(token_loss(backend.model, longest) * math.nan)
        backend.step(0.0, 1.0)
    backend.model.eval()
    with memory_advice("validation's longest micro-batch"), torch.no_grad(), backend.microbatch(last=True):
        token_loss(backend.model, validated)
    backend.model.train()
    say(f"preflight: the longest batch ({shape}) fits; {peak_memory() / MIB:,.0f} MiB, less the optimizer's state")


def try_checkpoint(
    folder: Path,
    me: World,
    backend: Backend,
    config: Any,
    save: Callable[[Checkpoints], None],
    optim: OptimConfig,
    at_once: int,
    say: Callable[[str], None],
) -> None:
    """Checks that a checkpoint can be written and read and that the disk has room for all; changes nothing.

    Args:
        folder: Of the run; what is tried there is gone afterwards.
        me: This process; every one of them calls.
        backend: Whose weights are written.
        config: The model's.
        save: Writes one among the checkpoints it is given.
        optim: Of the run, whose state the first checkpoint does not have yet.
        at_once: Most checkpoints there at a time, the one being written included.
        say: Prints.

    Raises:
        UserError: The disk is too small, or what was written is not what is read.
    """
    aside = folder / ".preflight"
    try:
        if me.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        tried = Checkpoints(aside, me, keep_last=0, keep_every=0, background=False)
        save(tried)
        written, _ = tried.newest_whole()
        assert written
        check_written(written, me, backend, config)
        load_checkpoint(written, config, backend.load)
        me.barrier()
        if me.is_main:
            size = sum(path.stat().st_size for path in written.rglob("*"))
            size += state_bytes(optim, sum(path.stat().st_size for path in written.glob("model*.safetensors")))
            free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in written.rglob("*"))
            room = f"{at_once} x {size / MIB:,.0f} MiB for checkpoints, {free / MIB:,.0f} MiB free"
            if at_once * size > free:
                raise UserError(f"run.dir: {folder} needs {room}; train.keep_last, which counts one less, can lower it")
            say(f"preflight: a checkpoint was written and read; {room}")
    finally:
        if me.is_main:
            shutil.rmtree(aside, ignore_errors=True)
    me.barrier()


def check_written(checkpoint: Path, me: World, backend: Backend, config: Any) -> None:
    """Checks that each weight of a checkpoint is, bit by bit, the one that a forward uses; all ranks call.

    Raises:
        UserError: One is not.
    """
    wrong: list[str] = []
    with stored_weights(config, checkpoint, extra=True) as stored:
        for name, value in backend.weights():
            if me.is_main and not torch.equal(stored[name][...].to(value.device, value.dtype), value):
                wrong.append(name)
    (wrong,) = me.gather(wrong)[:1]
    if wrong:
        raise UserError(
            f"{len(wrong)} tensors of a checkpoint are not those of the model, first {wrong[0]}: a setting of "
            "distributed.deepspeed lays weights out in an order that is not known here, or the model was changed after "
            "backend.setup"
        )
