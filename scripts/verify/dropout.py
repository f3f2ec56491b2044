"""Dropout stated a second time, in Python's integers and numpy: which elements of which example are dropped.

Written from the definition at the top of babl/rng.py, and sharing no function with it. `installed` puts it in the place
of `babl.ops.dropout` in this process, so that the gradients computed here have these masks, whatever `babl` does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from babl import ops

WORD = 2**64
WEYL, MULTIPLY, AGAIN = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's


def splitmix(state: Any, number: Any) -> Any:
    """Returns output `number`, from 0, of splitmix64 seeded with `state`: Python's integers, or arrays of uint64."""
    if isinstance(state, int) and isinstance(number, int):
        z = (state + (number + 1) * WEYL) % WORD
        z = (z ^ (z >> 30)) * MULTIPLY % WORD
        z = (z ^ (z >> 27)) * AGAIN % WORD
        return z ^ (z >> 31)
    state, number = (np.atleast_1d(np.asarray(each, np.uint64)) for each in (state, number))
    z = state + (number + np.uint64(1)) * np.uint64(WEYL)  # arrays of uint64 wrap
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MULTIPLY)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(AGAIN)
    return z ^ (z >> np.uint64(31))


def key(seed: int, step: int, example: int) -> int:
    """Returns the key of an example's dropout in a step, as an int64."""
    state = 0
    for index in (0, seed, step, example):
        state = splitmix(state, index)
    return state - WORD if state >= WORD // 2 else state


def multipliers(shape: Sequence[int], p: float, key: int, site: int) -> np.ndarray:
    """Returns by what each element of one example's tensor, of this shape, is multiplied: 0, or what keeps the mean."""
    state = np.array(splitmix(key % WORD, site), np.uint64)
    for size in (*shape[:-1], -(-shape[-1] // 4)):
        state = splitmix(state[..., None], np.arange(size, dtype=np.uint64))
    state = state.reshape(*shape[:-1], -1)
    shifts = np.arange(4, dtype=np.uint64) * np.uint64(16)
    draws = (state[..., None] >> shifts & np.uint64(0xFFFF)).astype(np.int64)  # (..., N / 4, 4)
    draws = np.where(draws < 2**15, draws, draws - 2**16).reshape(*shape[:-1], -1)[..., : shape[-1]]
    dropped = min(round(p * 2**16), 2**16 - 1)
    return (draws >= dropped - 2**15) * (2**16 / (2**16 - dropped))


@contextmanager
def installed() -> Iterator[list[int]]:
    """Within it `babl.ops.dropout` is the one stated here; yields the sites it was asked for, in order."""
    sites: list[int] = []

    def dropout(x: Tensor, p: float, key: Tensor, site: int) -> Tensor:
        sites.append(site)
        masks = [multipliers(x.shape[1:], p, each, site) for each in key.tolist()]
        return x * torch.from_numpy(np.stack(masks)).to(x.dtype)

    before = ops.dropout
    ops.dropout = dropout
    try:
        yield sites
    finally:
        ops.dropout = before


def number_sites(model: nn.Module) -> nn.Module:
    """Returns the model, each of whose dropouts has its place among them as its site."""
    for site, module in enumerate(m for m in model.modules() if type(m).__name__ == "Dropout"):
        module.site = site  # type: ignore[assignment]
    return model
