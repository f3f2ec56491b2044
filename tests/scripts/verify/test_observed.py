"""What is watched is judged rightly: numpy's coins and decks pass, and each way to load them is found."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from babl.scripts.verify.observed import observed_rows
from babl.scripts.verify.watch import PROBE_RATE, PROBE_SHAPE, PROBED

SITES, SHAPE, P, EPOCHS = 4, (9, 12), 0.2, 6
SUBJECT = SimpleNamespace(train=[([10 + i, 20 + i, 3], [1]) for i in range(10)])


class Coins:
    """Fair ones; each method is what a fault changes."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.seed = seed

    def order(self, epoch):
        return self.rng.permutation(10)

    def kept(self, step, example, site):
        return self.rng.random(SHAPE) >= P

    def probe(self, seed, step, example):
        return self.rng.random(PROBE_SHAPE) >= PROBE_RATE

    def scale(self):
        return 1 / (1 - P)

    def learns(self, step):
        return True

    def write(self, path):
        events, arrays = [], {}

        def add(kind, array=None, **values):
            events.append({"kind": kind, **values})
            if array is not None:
                events[-1]["array"] = f"a{len(arrays)}"
                arrays[f"a{len(arrays)}"] = np.asarray(array)

        step = 0
        for epoch in range(EPOCHS):
            for rows in np.array(self.order(epoch)).reshape(5, 2):
                step += 1
                add("ids", [[*SUBJECT.train[i][0], 0] for i in rows])
                for site in range(SITES):
                    masks = np.stack([self.kept(step, i, site) for i in rows]) * np.float32(self.scale())
                    seen = {"key": [0, 0], "applied": True, "learns": self.learns(step)}
                    add("dropout", masks, p=P, site=site, **seen)
                add("step")
        for seed in PROBED["seeds"]:
            for at in PROBED["steps"]:
                masks = [self.probe(seed, at, example) for example in PROBED["examples"]]
                add("probe", masks, seed=seed, step=at, key=[0] * len(masks))
        np.savez(path, events=np.frombuffer(json.dumps(events).encode(), np.uint8), **arrays)


def judged(coins, folder):
    coins.write(folder / "record.npz")
    rows = observed_rows(folder / "record.npz", SUBJECT, "coins", stock=False)
    return {row.check for row in rows if row.verdict == "WRONG"}


@pytest.mark.parametrize("seed", range(3))
def test_fair_coins_pass(seed, tmp_path):
    assert judged(Coins(seed), tmp_path) == set()


class Lane(Coins):
    def kept(self, step, example, site):
        kept = super().kept(step, example, site)
        kept[:, 3::4] = True
        return kept


class ThreeQuarters(Coins):  # 7.5 % where 10 % was asked, evenly
    def kept(self, step, example, site):
        return self.rng.random(SHAPE) >= 0.75 * P


class Undropped(Coins):
    def kept(self, step, example, site):
        return np.ones(SHAPE, bool)


class Unscaled(Coins):
    def scale(self):
        return 1.0


class Columns(Coins):  # neighbours share a draw
    def kept(self, step, example, site):
        return np.repeat(super().kept(step, example, site)[:, ::2], 2, axis=1)


class Rows(Coins):
    def kept(self, step, example, site):
        return np.tile(super().kept(step, example, site)[:1], (SHAPE[0], 1))


class Tied(Coins):
    """Masks that do not depend on all they should depend on."""

    def kept(self, step, example, site):
        return np.random.default_rng((self.seed, *self.tie(step, example, site))).random(SHAPE) >= P

    def tie(self, step, example, site):
        return step, example, site

    def probe(self, seed, step, example):
        return np.random.default_rng((9, *self.probed(seed, step, example))).random(PROBE_SHAPE) >= PROBE_RATE

    def probed(self, seed, step, example):
        return seed, step, example


class OneSite(Tied):
    def tie(self, step, example, site):
        return step, example


class Period(Tied):
    def tie(self, step, example, site):
        return step % 4, example, site


class LongPeriod(Tied):
    def probed(self, seed, step, example):
        return seed, step % 1000, example


class ThreeSeeds(Tied):
    def probed(self, seed, step, example):
        return seed % 3, step, example


class OneExample(Tied):
    def probed(self, seed, step, example):
        return seed, step


class Replayed(Coins):
    def order(self, epoch):
        return [3, 1, 4, 0, 5, 2, 9, 7, 8, 6]


class Drawn(Coins):
    def order(self, epoch):
        return self.rng.integers(0, 10, 10)


class Sometimes(Coins):
    def learns(self, step):
        return step != 5


FAULTS = {
    Lane: "dropout rate",
    ThreeQuarters: "dropout rate",
    Undropped: "dropout rate",
    Unscaled: "dropout scale",
    Columns: "dropout places",
    Rows: "dropout places",
    OneSite: "dropout sites",
    Period: "dropout steps",
    LongPeriod: "dropout steps",
    ThreeSeeds: "dropout seeds",
    OneExample: "dropout examples",
    Replayed: "order",
    Drawn: "order",
    Sometimes: "dropout on",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_loaded_coin_is_found(fault, tmp_path):
    assert FAULTS[fault] in judged(fault(7), tmp_path)
