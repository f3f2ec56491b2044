"""Random bits that belong to an example: a counter-based generator, and the keys it starts from.

Nothing here has a state that moves. A number is found at the end of a path of indices, and depends on that path alone:
not on the batch an example comes in, its padding, the rank that computes it, or what was drawn before.

One step of a path, in unsigned 64-bit arithmetic (everything modulo 2**64), is an output of splitmix64:

    draw(state, index):
        x = state + (index + 1) * 0x9E3779B97F4A7C15
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9          # >> is the logical shift: zeros come in
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        return x ^ (x >> 31)

`draw(state, 0), draw(state, 1), ...` is what splitmix64 seeded with `state` puts out, one after another. A path starts
from 0, and each of its indices takes the state to `draw(state, index)`:

    key of an example's dropout     0 -> DROPOUT = 0 -> seed -> step -> example
    seeds of a step's generators    0 -> STEP = 1 -> seed -> step -> 0, 1, 2 for Python's, numpy's and torch's
    64 bits of four elements        key -> site -> i -> j -> ... -> n // 4    of element [b, i, j, ..., n] of a tensor

The example's key stands for b. Element n has bits 16 * (n % 4) to 16 * (n % 4) + 15 of its 64, the lowest first, read
as a number in two's complement, -32768 to 32767; it is kept if that is at least `threshold(p) - 32768`.

`draw` is a bijection of the state for a fixed index, and of the index for a fixed state. So two keys of which only one
of seed, step and example differs are never equal; others are as often as two random numbers of 64 bits.

Ref: Steele, Lea and Flood 2014, figure 16, with the constants of Vigna's splitmix64.c (Stafford's mix 13); Salmon et
al. 2011 for generators without a state.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from babl.errors import UserError

DROPOUT, STEP = 0, 1  # where a path begins: the keys of dropout, the seeds of a step
GAMMA, FIRST, SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as int64


def draw(state: Tensor | int, index: Tensor | int) -> Tensor:
    """Returns splitmix64's output of number `index`, from 0, when seeded with `state`.

    Args:
        state: int64, whose bits are read as unsigned; any shape that broadcasts with `index`.
        index: int64.
    """
    x = state + (torch.as_tensor(index) + 1) * GAMMA
    # int64's >> brings in copies of the sign; the mask takes them off. There is no shift of uint64 in torch.
    x = x.bitwise_xor_((x >> 30).bitwise_and_(2**34 - 1)).mul_(FIRST)
    x = x.bitwise_xor_((x >> 27).bitwise_and_(2**37 - 1)).mul_(SECOND)
    return x.bitwise_xor_((x >> 31).bitwise_and_(2**33 - 1))


def threshold(p: float) -> int:
    """Returns how many of 65,536 draws drop an element: p rounded to a multiple of 2**-16, and less than all of them.

    Raises:
        UserError: p is not a share below 1.
    """
    if not 0.0 <= p < 1.0:
        raise UserError(f"a dropout rate is {p}, expected at least 0 and below 1")
    return min(round(p * 65536), 65535)


def kept(shape: Sequence[int], p: float, key: Tensor, site: int) -> Tensor:
    """Returns which elements of a tensor a dropout keeps, bool of this shape.

    Args:
        shape: (B, ..., N).
        p: Share to drop, as `threshold` takes it.
        key: (B,) int64, one per example and step.
        site: Which dropout of the model this is, from 0.
    """
    *rows, width = shape
    lanes = -(-width // 4)
    state = draw(key, site)  # (B,)
    for size in (*rows[1:], lanes):
        state = draw(state.unsqueeze(-1), torch.arange(size, device=key.device))  # one more axis
    bits = (
        state.flatten().view(torch.int16).view(*rows, 4 * lanes)
    )  # flat, as the last axis of no elements has no stride
    return bits[..., :width] >= threshold(p) - 32768


def dropout_keys(seed: int, step: int, indices: Sequence[int]) -> list[int]:
    """Returns an int64 per example, a function of (seed, step, example); all three from 0, below 2**63."""
    at_step = draw(draw(draw(0, DROPOUT), seed), step)
    return draw(at_step, torch.tensor(indices, dtype=torch.int64)).tolist()


def step_seeds(seed: int, step: int) -> list[int]:
    """Returns three numbers of 64 unsigned bits, functions of (seed, step), for generators begun anew at each step.

    One for each of Python's, numpy's and torch's: all three are Mersenne twisters, which write the same numbers where
    they are begun alike.
    """
    at_step = draw(draw(draw(0, STEP), seed), step)
    return [number % 2**64 for number in draw(at_step, torch.arange(3)).tolist()]
