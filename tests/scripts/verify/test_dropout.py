"""verify's own statement of dropout against published numbers of splitmix64, and against theory."""

import numpy as np
import pytest
import torch

from babl import ops
from babl.scripts.verify import dropout


def test_the_generator_is_splitmix64():
    # Vigna's splitmix64.c from the seed 1234567: the vector that many implementations are tested with.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [dropout.splitmix(1234567, number) for number in range(4)] == published
    seeds, numbers = np.array([1234567], np.uint64), np.arange(4, dtype=np.uint64)
    assert dropout.splitmix(seeds, numbers).tolist() == published


def test_an_element_is_decided_by_the_path_to_it():
    key, site, shape, p = -(2**63) + 5, 7, (3, 6), 0.3
    masks = dropout.multipliers(shape, p, key, site)
    for i in range(3):
        for n in range(6):
            state = dropout.splitmix(dropout.splitmix(dropout.splitmix(key % 2**64, site), i), n // 4)
            draw = state.to_bytes(8, "little")[2 * (n % 4) : 2 * (n % 4) + 2]
            kept = int.from_bytes(draw, "little", signed=True) >= round(p * 65536) - 32768
            assert (masks[i, n] > 0) == kept
    assert masks.max() == pytest.approx(1 / (1 - p), rel=1e-4)


def test_a_share_is_dropped_and_the_mean_stays():
    masks = dropout.multipliers((1000, 1000), 0.1, 123, 0)
    assert abs((masks == 0).mean() - 0.1) < 5 * 0.0003 and abs(masks.mean() - 1) < 5 * 0.0003 / 0.9


def test_it_stands_in_for_babls_while_it_is_installed():
    before = ops.dropout
    x, key = torch.ones(2, 3, 5, dtype=torch.float64), torch.tensor([4, 5])
    with dropout.installed() as sites:
        out = ops.dropped(x, ops.Drop(0.5, key, 2))
    assert sites == [2] and ops.dropout is before
    assert out[1].tolist() == dropout.multipliers((3, 5), 0.5, 5, 2).tolist()
