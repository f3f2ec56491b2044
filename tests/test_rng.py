"""Randomness beside a splitmix64 in plain integers, and beside what theory says of independent draws.

Nothing here takes its expectation from babl: masks and keys are made anew from the published generator.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from babl import ops, rng
from babl.data import contexts, fictional, loader
from babl.distributed.env import World
from babl.errors import UserError
from babl.models.build import ModelConfig, build_model
from babl.models.t5 import T5
from babl.text import train_tokenizer

CHANCE = 1e-4  # a test of chance fails where it sees what independent draws show once in so many times
PUBLISHED = {  # seed: the first numbers of splitmix64, as printed by implementations in C, Java and Rust
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821],
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B],
}
ONE_ROUNDING = {
    torch.float64: 4.5e-16,
    torch.float32: 2.4e-7,
    torch.bfloat16: 0.0,
    torch.float16: 0.0,
}  # and of the scale
SIZES = st.integers(0, 2**32) | st.sampled_from([0, 1, 10**8, 2**32 - 1, 2**32])


def signed(x):
    return x - 2**64 if x >= 2**63 else x


def test_the_reference_reproduces_published_numbers(splitmix64):
    for seed, numbers in PUBLISHED.items():
        assert [splitmix64(seed, i) for i in range(5)] == numbers


def test_draws_are_published_numbers():
    for seed, numbers in PUBLISHED.items():
        assert rng.draw(torch.tensor(seed), torch.arange(5)).tolist() == [signed(x) for x in numbers]


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 2))
def test_draws_equal_plain_integers(splitmix64, state, index):
    expected = signed(splitmix64(state, index))
    assert rng.draw(torch.tensor(signed(state)), index).item() == expected
    assert rng.draw(torch.tensor([signed(state)]), torch.tensor([index])).tolist() == [expected]


def test_a_number_and_its_complement_are_stirred_apart():
    state = torch.tensor([signed(x % 2**64) for x in (0, 1, 123456789123, 2**62 + 17, 2**63, 2**64 - 1)])
    gamma = signed(0x9E3779B97F4A7C15)
    stirred, other = rng.draw(state - gamma, 0), rng.draw(~state - gamma, 0)  # the state itself goes in
    assert not (stirred == other).any()


def test_a_draw_leaves_what_it_is_given_alone():
    state, index = torch.arange(3), torch.arange(3)
    rng.draw(state, index)
    assert state.tolist() == index.tolist() == [0, 1, 2]


@settings(deadline=None)
@given(SIZES, SIZES, st.lists(SIZES, max_size=4))
def test_keys_equal_plain_integers(splitmix64, seed, step, examples):
    state = splitmix64(splitmix64(splitmix64(0, 0), seed), step)
    assert rng.dropout_keys(seed, step, examples) == [signed(splitmix64(state, i)) for i in examples]
    assert loader.dropout_keys is rng.dropout_keys
    state = splitmix64(splitmix64(splitmix64(0, 1), seed), step)
    assert rng.step_seeds(seed, step) == [splitmix64(state, i) for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 1), (3, 7), (2, 5, 64), (2, 3, 5, 9), (1, 2, 1, 3, 6), (2, 3, 0), (0, 4)])
def test_a_mask_equals_one_written_out_by_hand(mask_by_hand, shape, dtype):
    keys = [7, -(2**63), 2**63 - 1][: shape[0]]
    for p, dropping, site in ((0.1, 6554, 0), (0.5, 32768, 3), (0.9, 58982, 1000)):
        keep = torch.tensor([mask_by_hand(key, site, shape[1:], dropping) for key in keys]).reshape(shape)
        x = torch.randn(shape, dtype=dtype)
        expected = torch.where(keep == 1, (x.double() * 65536 / (65536 - dropping)).to(dtype), 0.0)
        got = ops.dropout(x, p, torch.tensor(keys, dtype=torch.int64), site)
        assert got.dtype == dtype and got.shape == shape
        torch.testing.assert_close(got, expected, rtol=ONE_ROUNDING[dtype], atol=0.0)


def test_the_gradient_goes_where_the_value_went():
    x = torch.ones(2, 3, 50, requires_grad=True)
    out = ops.dropout(x, 0.3, torch.tensor([1, 2]), 0)
    out.sum().backward()
    assert torch.equal(x.grad, out)


def test_shares_are_rounded_and_bounded():
    x, key = torch.ones(4, 8, 1000), torch.arange(4)
    assert torch.equal(ops.dropout(x, 0.0, key, 0), x)
    assert torch.equal(ops.dropout(x, 2**-18, key, 0), x), "nothing is dropped, and nothing is scaled"
    assert ops.dropout(x, 2**-16, key, 0).max().item() == pytest.approx(65536 / 65535)
    nearly_all = ops.dropout(x, 1 - 2**-20, key, 0)
    assert set(nearly_all.unique().tolist()) <= {0.0, 65536.0}
    for p in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=f"a dropout rate is {p}, expected at least 0 and below 1"):
            ops.dropout(x, p, key, 0)


# What independent draws look like


def by_path(shape, key=12345, site=3):
    """Returns the draws of a tensor, as uint64."""
    state = rng.draw(torch.tensor(key), site)
    for size in shape:
        state = rng.draw(state.unsqueeze(-1), torch.arange(size))
    return state.numpy().view(np.uint64)


@pytest.mark.parametrize("path", ["one row", "many rows", "many keys"])
def test_a_million_draws_are_uniform(path):
    if path == "many keys":
        keys = [rng.dropout_keys(5, step, range(1000)) for step in range(1000)]
        draws = np.array(keys).view(np.uint64).ravel()
    else:
        draws = by_path((10**6,) if path == "one row" else (100, 100, 100)).ravel()
    assert stats.kstest(draws / 2.0**64, "uniform").pvalue > CHANCE
    lanes = draws.view(np.uint16).reshape(-1, 4)
    for lane in lanes.T:
        assert stats.chisquare(np.bincount(lane >> 4, minlength=4096)).pvalue > CHANCE
        assert stats.chisquare(np.bincount(lane & 4095, minlength=4096)).pvalue > CHANCE
    for one, other in itertools.combinations(lanes.T, 2):
        table = np.bincount((one >> 11).astype(int) * 32 + (other >> 11), minlength=1024)
        assert stats.chisquare(table).pvalue > CHANCE
    bits = np.unpackbits(draws.view(np.uint8)).reshape(-1, 64).sum(0)
    assert stats.chi2.sf(((bits - len(draws) / 2) ** 2 / (len(draws) / 4)).sum(), 64) > CHANCE


SHARES = (0.01, 0.1, 0.5, 0.9)


def dropped(p, keys, site=3, rows=16, width=1021, dtype=torch.float32):
    """Returns which elements of ones (keys, rows, width) are dropped, as 0 and 1, and the values."""
    out = ops.dropout(torch.ones(len(keys), rows, width, dtype=dtype), p, torch.tensor(keys), site)
    return (out == 0).double().numpy(), out.double().numpy()


def surprise(*pairs, p):
    """Returns how often independent masks agree as these pairs do, by the sum of their squared correlations."""
    squares = 0.0
    for one, other in pairs:
        products = (one - p) * (other - p)
        squares += (products.sum() / (np.sqrt(products.size) * p * (1 - p))) ** 2  # of one normal number
    return stats.chi2.sf(squares, len(pairs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", SHARES)
def test_every_place_is_dropped_as_often_as_asked_and_the_mean_is_kept(p, dtype):
    keys = rng.dropout_keys(0, 7, range(40))
    for width in (1, 3, 64, 1021, 1024):
        gone, values = dropped(p, keys, rows=-(-20_000 // width), width=width, dtype=dtype)
        share = round(p * 65536) / 65536
        for period in (4, 64):  # neighbours that share a draw; a row of a cache line, a warp, a tile
            for place in range(min(period, width)):
                count = gone[..., place::period]
                assert stats.binomtest(int(count.sum()), count.size, share).pvalue > CHANCE / 64
        error = np.sqrt(share / (1 - share) / values.size)
        rounding = 2**-9 if dtype == torch.bfloat16 else 1e-7  # of 1 / (1 - p), once
        assert abs(values.mean() - 1) < 4.5 * error + rounding


@pytest.mark.parametrize("p", SHARES)
def test_neighbours_rows_sites_examples_steps_and_seeds_are_independent(p):
    share = round(p * 65536) / 65536
    keys = rng.dropout_keys(0, 7, range(24))
    gone, _ = dropped(p, keys)
    assert surprise(*((gone[..., lag:], gone[..., :-lag]) for lag in range(1, 65)), p=share) > CHANCE
    assert surprise(*((gone[:, lag:], gone[:, :-lag]) for lag in range(1, 16)), p=share) > CHANCE
    skewed = [(gone[:, 1:, lag:], gone[:, :-1, :-lag]) for lag in (1, 2, 3, 4, 8)]
    assert surprise(*skewed, p=share) > CHANCE, "a row is the one before, moved"
    assert surprise(*((gone[lag:], gone[:-lag]) for lag in range(1, 24)), p=share) > CHANCE
    assert surprise(*((dropped(p, keys, site)[0], gone) for site in (0, 1, 2, 4, 5, 19, 67)), p=share) > CHANCE
    steps = [rng.dropout_keys(0, step, range(24)) for step in (0, 1, 6, 8, 1007, 1_000_010)]
    seeds = [rng.dropout_keys(seed, 7, range(24)) for seed in (1, 2, 3, 4, 6, 1000, 2**32)]
    assert surprise(*((dropped(p, other)[0], gone) for other in (*steps, *seeds)), p=share) > CHANCE


def test_no_two_masks_of_small_keys_and_sites_are_equal_or_shifted():
    """Whoever numbers keys 0, 1, 2 must not find the mask of (key 1, site 2) in (key 2, site 1), or a row moved."""
    gone = np.stack([dropped(0.5, list(range(24)), site, rows=6, width=512)[0] for site in range(24)])
    rows = np.packbits(gone.astype(bool).reshape(-1, 512), axis=1)  # 24 · 24 · 6 rows of 64 bytes
    windows = np.lib.stride_tricks.sliding_window_view(np.unpackbits(rows, axis=1), 64, axis=1)[:, ::4]
    words = np.packbits(windows, axis=-1).reshape(-1, 8).copy().view(np.uint64).ravel()
    assert len(words) == 24 * 24 * 6 * 113
    assert len(np.unique(words)) == len(words), "of 64 bits, by chance once in five hundred million times"


def pairs(numbers):
    """Returns how many pairs of these are equal."""
    _, counts = np.unique(numbers, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


@pytest.mark.parametrize(
    ("seeds", "steps"),
    [(range(20), range(500)), pytest.param(range(200), range(1000), marks=pytest.mark.slow)],
)
def test_keys_collide_as_often_as_chance_has_it(seeds, steps):
    keys = np.array([rng.dropout_keys(seed, step, range(64)) for seed in seeds for step in steps]).ravel()
    expected = len(keys) ** 2 / 2 / 2**64  # 4.4e-6 of 12.8 million: none
    assert expected < CHANCE and pairs(keys) == 0
    # The halves of keys are as often equal as numbers of 32 bits are: a structure would show there first.
    for half in (keys & 0xFFFFFFFF, keys >> 32):
        assert abs(pairs(half) - len(keys) ** 2 / 2 / 2**32) < 4.5 * (len(keys) ** 2 / 2 / 2**32) ** 0.5


def test_keys_far_apart_are_keys_of_their_own():
    ends = (0, 1, 3, 10**6 + 3, 2 * (10**6 + 3), 10**8 - 1, 10**8, 2**32 - 1)
    keys = [key for seed in ends for step in ends for key in rng.dropout_keys(seed, step, ends)]
    assert pairs(np.array(keys)) == 0


# Streams


def words(generator, number=5_000):
    """Returns what a generator writes next, in words of 32 bits."""
    if isinstance(generator, random.Random):
        return np.array([generator.getrandbits(32) for _ in range(number)], dtype=np.uint32)
    if isinstance(generator, np.random.RandomState):
        return generator.randint(0, 2**32, number, dtype=np.uint32)
    return torch.empty(number, dtype=torch.int64).random_(0, 2**32, generator=generator).numpy().astype(np.uint32)


@pytest.fixture
def streams(monkeypatch, tmp_path):
    """What each part of a run of seed 0 or 1 draws from, by name: as the part itself has begun it."""
    drawn, begun = {}, []

    class Recorded(random.Random):
        def __init__(self, seed=None):
            super().__init__(seed)
            begun.append(random.Random.__new__(random.Random))
            begun[-1].setstate(self.getstate())

    world = World(0, 1, torch.device("cpu"))
    train_tokenizer(["who is it"], 300, tmp_path)
    monkeypatch.setattr(T5, "init_weights", lambda self, generator: begun.append(generator))
    monkeypatch.setattr(random, "Random", Recorded)

    def record(name, run, most=4):
        begun.clear()
        run()
        assert begun, name
        drawn.update({f"{name} {i}": words(generator) for i, generator in enumerate(begun[:most])})

    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    examples, _ = fictional.fictional_examples(0)
    for seed in (0, 1):
        record(f"seed {seed}, corpus", lambda: fictional.fictional_corpus(1, 1, seed))  # noqa: B023
        record(f"seed {seed}, weights", lambda: build_model(ModelConfig(shape=shape), tmp_path, seed))  # noqa: B023
        for arm in ("gold", "random", "mixture", "shuffled"):
            record(f"seed {seed}, {arm}", lambda: contexts.build_views(examples[:40], arm, seed))  # noqa: B023
        for epoch in (0, 1):
            record(f"seed {seed}, order {epoch}", lambda: loader.plan_epoch([(9, 3)] * 9, 40, seed, epoch))  # noqa: B023
        for step in (0, 1, 2, 1_000_003):
            world.seed(seed, step)
            name = f"seed {seed}, step {step}"
            python = random.Random.__new__(random.Random)
            python.setstate(random.getstate())
            drawn[f"{name}, python"] = words(python)
            drawn[f"{name}, numpy"] = words(np.random.mtrand._rand)
            drawn[f"{name}, torch"] = words(torch.default_generator)
        keys = torch.tensor(rng.dropout_keys(seed, 1, range(2)))
        for key, masks in enumerate(rng.draw(keys[:, None], torch.arange(2_500)).numpy()):
            drawn[f"seed {seed}, dropout {key}"] = masks.view(np.uint32)
    return drawn


def test_no_part_of_a_run_draws_what_another_draws(streams):
    """The same stream in two places, moved or not, shows in words they share; another relation, in a correlation."""
    assert len(streams) > 60
    seen = {}
    for name, numbers in streams.items():
        seen[name] = np.unique(numbers)
    centred = {name: numbers / 2.0**32 - 0.5 for name, numbers in streams.items()}
    z = []
    for one, other in itertools.combinations(streams, 2):
        assert len(np.intersect1d(seen[one], seen[other], assume_unique=True)) < 3, (one, other)  # by chance, 0.006
        z.append((centred[one] * centred[other]).sum() * 12 / len(centred[one]) ** 0.5)
    assert stats.kstest(z, "norm").pvalue > CHANCE and np.abs(z).max() < 5.5


def test_steps_and_seeds_begin_generators_of_their_own():
    seeds = np.array([rng.step_seeds(seed, step) for seed in range(20) for step in range(100)], dtype=np.uint64)
    assert pairs(seeds) == 0
    assert rng.step_seeds(0, 1_000_003) != rng.step_seeds(1, 0)
