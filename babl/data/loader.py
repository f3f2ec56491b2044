"""Which examples make which step: a function of (seed, epoch) alone.

A step's batch is planned for the whole machine, then dealt to ranks and micro-batches, so the world's size changes who
computes an example, never which examples a step has.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from babl.config import NonNegativeInt, PositiveInt
from babl.errors import UserError
from babl.rng import dropout_keys as dropout_keys  # beside the indices they are made for

POOL = 100  # batches' worth of examples sorted by length together: more pads less and mixes lengths less


@dataclass
class BatchConfig:
    """A step's batch on all ranks, and the parts each rank computes its share in.

    Attributes:
        tokens: Most tokens, padding included; examples of about equal lengths come together.
        examples: Above 0, as many examples a step instead, in an order that does not depend on what is shown of them:
            what arms of different lengths need to be trained on the same questions in the same steps.
        accumulation: Parts of each rank's share.
    """

    tokens: PositiveInt = 8192
    examples: NonNegativeInt = 0
    accumulation: PositiveInt = 1


Lengths = Sequence[tuple[int, int]]  # of each example: tokens of its source and of its target


def plan_epoch(lengths: Lengths, budget: int, seed: int, epoch: int) -> list[list[int]]:
    """Returns the epoch's batches by tokens, each a list of example indices of about equal lengths.

    Args:
        lengths: Of the examples.
        budget: Most tokens of a batch, padding included.
        seed: With `epoch`, decides the order.
        epoch: Counts from 0.
    """
    rng, order = _shuffled(len(lengths), seed, epoch)
    average = max(1, sum(map(sum, lengths)) // len(lengths))
    pool = max(1, POOL * budget // average)
    batches: list[list[int]] = []
    for at in range(0, len(order), pool):
        # Where sources are long, their length decides the padding; beside short ones the target's counts as much.
        by_sum = sorted(order[at : at + pool], key=lambda i: sum(lengths[i]))
        by_target = sorted(order[at : at + pool], key=lambda i: (lengths[i][1], lengths[i][0]))
        batches += min((_cut(by_sum, lengths, budget), _cut(by_target, lengths, budget)), key=partial(padded, lengths))
    rng.shuffle(batches)
    return batches


def plan_validation(lengths: Lengths, budget: int) -> list[list[int]]:
    """Returns micro-batches of at most `budget` tokens, padding included, that go through all once, largest first."""
    return sorted(plan_epoch(lengths, budget, seed=0, epoch=0), key=lambda batch: -padded(lengths, [batch]))


def deal_epoch(sizes: Sequence[int], examples: int, seed: int, epoch: int) -> list[list[int]]:
    """Returns the epoch's batches of so many examples each, one perhaps of fewer, those of like sizes together.

    Args:
        sizes: Of the examples, in any unit: what tells long ones from short ones, and is the same in every arm.
        examples: Of a batch.
        seed: With `epoch`, decides the order.
        epoch: Counts from 0.
    """
    rng, order = _shuffled(len(sizes), seed, epoch)
    pool = POOL * examples
    sized = [i for at in range(0, len(order), pool) for i in sorted(order[at : at + pool], key=lambda i: sizes[i])]
    batches = [sized[at : at + examples] for at in range(0, len(sized), examples)]
    rng.shuffle(batches)
    return batches


def _shuffled(number: int, seed: int, epoch: int) -> tuple[random.Random, list[int]]:
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(number))
    rng.shuffle(order)
    return rng, order


def _cut(order: list[int], lengths: Lengths, budget: int) -> list[list[int]]:
    """Returns the order in runs of at most `budget` tokens each, padding included."""
    batches: list[list[int]] = [[]]
    source = target = 0
    for index in order:
        source, target = max(source, lengths[index][0]), max(target, lengths[index][1])
        if batches[-1] and (len(batches[-1]) + 1) * (source + target) > budget:
            batches.append([])
            source, target = lengths[index]
        batches[-1].append(index)
    return batches


def padded(lengths: Lengths, batches: list[list[int]]) -> int:
    """Returns the tokens of the batches, padding included."""
    return sum(len(b) * (max(lengths[i][0] for i in b) + max(lengths[i][1] for i in b)) for b in batches)


class Loader:
    """Deals the batches of epoch after epoch to this rank's micro-batches; its place is two integers."""

    def __init__(self, lengths: Lengths, sizes: Sequence[int], cfg: BatchConfig, seed: int, rank: int, world: int):
        """The first step comes next.

        Args:
            lengths: Of the examples.
            sizes: Of the examples, for `deal_epoch`.
            cfg: What a step is.
            seed: Of the order.
            rank: Of this process.
            world: Number of processes.
        """
        if not lengths:
            raise UserError("data.train has no example to train on")
        longest = max(map(sum, lengths))
        if not cfg.examples and longest > cfg.tokens:
            raise UserError(f"batch.tokens is {cfg.tokens}, but the longest example has {longest} tokens")
        self.lengths, self.sizes, self.cfg, self.seed = lengths, sizes, cfg, seed
        self.first, self.slots = rank * cfg.accumulation, world * cfg.accumulation
        self.epoch = self.batch = 0
        self.plan = self._plan()
        self.order = hashlib.sha256(json.dumps(self.plan).encode()).hexdigest()

    def _plan(self) -> list[list[int]]:
        if self.cfg.examples:
            return deal_epoch(self.sizes, self.cfg.examples, self.seed, self.epoch)
        return plan_epoch(self.lengths, self.cfg.tokens, self.seed, self.epoch)

    def next_step(self) -> list[list[int]]:
        """Returns the example indices of each of this rank's micro-batches of the next step."""
        if self.batch == len(self.plan):
            self.epoch, self.batch = self.epoch + 1, 0
            self.plan = self._plan()
        batch = self.plan[self.batch]
        self.batch += 1
        return [batch[self.first + slot :: self.slots] for slot in range(self.cfg.accumulation)]

    def longest(self) -> list[int]:
        """Returns a micro-batch as large as any: this machine's share of the longest examples that make a batch."""
        order = sorted(range(len(self.lengths)), key=lambda i: sum(self.lengths[i]), reverse=True)
        batch = order[: self.cfg.examples] if self.cfg.examples else _cut(order, self.lengths, self.cfg.tokens)[0]
        return batch[:: self.slots]

    def state(self) -> dict[str, Any]:
        """Returns the place of the next step, and a fingerprint of the order in which it is one: the first epoch's."""
        return {"epoch": self.epoch, "batch": self.batch, "order": self.order}

    def restore(self, state: dict[str, Any]) -> None:
        """The next step is the one after `state`.

        Raises:
            UserError: The examples come in another order now, in which the place means nothing.
        """
        if state.get("order") != self.order:
            raise UserError(
                "run.resume: the examples come in another order than when the checkpoint was saved (other data, "
                "windows or batches), in which its place means nothing; begin a run of another run.name from it with "
                "model.path"
            )
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.plan = self._plan()
