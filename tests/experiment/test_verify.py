import json

import pytest

from babl.experiment import verify
from babl.experiment.plan import Plan


@pytest.fixture
def told(tmp_path, monkeypatch):
    """A function that gives each cell (model, arm, settings) an order of questions, and returns what verify tells."""
    for stage in ("_data", "_surroundings", "_scores"):
        monkeypatch.setattr(verify, stage, lambda *_: [])
    monkeypatch.setattr(verify, "weights_hash", lambda folder: "w")

    def run(orders):
        cells = []
        for i, ((model, arm, settings), order) in enumerate(orders.items()):
            cells.append({"id": f"c{i}", "model": model, "arm": arm, "seed": 0, "settings": {"train.steps": settings}})
            folder = tmp_path / "cells" / f"c{i}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "trained.json").write_text(json.dumps({"failed": None, "weights": "w", "order": order}))
        return verify.mismatches(Plan(tmp_path, {"cells": cells, "trials": []}))

    return run


def test_models_and_trials_of_other_lengths_have_other_orders(told):
    alike = {
        ("short", "none", 10): "a",
        ("short", "gold", 10): "a",
        ("long", "none", 10): "b",
        ("long", "gold", 10): "b",
    }
    assert told(alike) == []
    assert told(alike | {("short", "none", 20): "c", ("short", "gold", 20): "c"}) == []


def test_arms_of_one_model_and_seed_share_an_order(told):
    orders = {
        ("short", "none", 10): "a",
        ("short", "gold", 10): "a",
        ("long", "none", 10): "b",
        ("long", "gold", 10): "c",
    }
    assert told(orders) == ["long, seed 0: arms were trained in 2 different orders"]
