"""Which examples make which step: a function of (seed, epoch) alone.

A step's batch is planned for the whole machine, then dealt to ranks and micro-batches, so the world's size changes who
computes an example, never which examples a step has.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from babl.errors import UserError

POOL = 100  # batches' worth of examples sorted by length together: more pads less and mixes lengths less
_STEP, _EXAMPLE, _WORD = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 2**64


@dataclass
class BatchConfig:
    """Tokens of a step on all ranks, padding included, and the parts each rank computes its share in."""

    tokens: int = 8192
    accumulation: int = 1


Lengths = Sequence[tuple[int, int]]  # of each example: tokens of its source and of its target


def plan_epoch(lengths: Lengths, budget: int, seed: int, epoch: int) -> list[list[int]]:
    """Returns the epoch's batches, each a list of example indices of about equal lengths.

    Args:
        lengths: Of the examples.
        budget: Most tokens of a batch, padding included.
        seed: With `epoch`, decides the order.
        epoch: Counts from 0.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
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

    def __init__(self, lengths: Lengths, budget: int, seed: int, rank: int, world: int, accumulation: int):
        if not lengths:
            raise UserError("data.train has no example to train on")
        longest = max(map(sum, lengths))
        if longest > budget:
            raise UserError(f"batch.tokens is {budget}, but the longest example has {longest} tokens")
        self.lengths, self.budget, self.seed = lengths, budget, seed
        self.first, self.slots, self.accumulation = rank * accumulation, world * accumulation, accumulation
        self.epoch = self.batch = 0
        self.plan = plan_epoch(lengths, budget, seed, 0)

    def next_step(self) -> list[list[int]]:
        """Returns the example indices of each of this rank's micro-batches of the next step."""
        if self.batch == len(self.plan):
            self.epoch, self.batch = self.epoch + 1, 0
            self.plan = plan_epoch(self.lengths, self.budget, self.seed, self.epoch)
        batch = self.plan[self.batch]
        self.batch += 1
        return [batch[self.first + slot :: self.slots] for slot in range(self.accumulation)]

    def longest(self) -> list[int]:
        """Returns a micro-batch as large as any: this machine's share of the longest examples that make a batch."""
        order = sorted(range(len(self.lengths)), key=lambda i: sum(self.lengths[i]), reverse=True)
        return _cut(order, self.lengths, self.budget)[0][:: self.slots]

    def state(self) -> dict[str, int]:
        """Returns where the loader stands, and what the order of its examples follows from."""
        order = {"seed": self.seed, "tokens": self.budget, "examples": len(self.lengths)}
        return order | {"epoch": self.epoch, "batch": self.batch}

    def restore(self, state: dict[str, int]) -> None:
        """The next step is the one after `state`.

        Raises:
            UserError: The order of examples is another one now, in which the place means nothing.
        """
        now = self.state()
        for key, name in (("seed", "run.seed"), ("tokens", "batch.tokens"), ("examples", "examples of data.train")):
            if state[key] != now[key]:
                raise UserError(
                    f"run.resume: {name} is {now[key]}, but was {state[key]} when the checkpoint was saved; begin a "
                    "run of another run.name from it with model.path"
                )
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.plan = plan_epoch(self.lengths, self.budget, self.seed, self.epoch)


def dropout_keys(seed: int, step: int, indices: Sequence[int]) -> list[int]:
    """Returns an int64 per example, a function of (seed, step, example)."""
    keys = [(seed * _WORD // 3 + step * _STEP + (index + 1) * _EXAMPLE) % _WORD for index in indices]
    return [key - _WORD if key >= _WORD // 2 else key for key in keys]
