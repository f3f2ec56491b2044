"""Each of many ways to break the loop is seen by `babl verify`, in the row that it belongs to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from babl.models.cache import Cache
from babl.scripts.verify.edit import LOOP
from babl.scripts.verify.program import Request, prove
from babl.scripts.verify.runs import Case

ROOT = Path(__file__).parent.parent.parent.parent
T5 = Case("t5", "ddp", 1, 4)
LLAMA = Case("llama", "ddp", 1, 1)
TWO_RANKS = Case("t5", "ddp", 2, 4)


def wrong(rows):
    return [row.check for row in rows if row.verdict == "WRONG"]


MUTANTS = {
    "mean of means": (
        "scripts/train.py",
        "cfg.optim.label_smoothing) / targets",
        "cfg.optim.label_smoothing) / max(1, batch.targets) / len(batches)",
        "gradient",
        T5,
    ),
    "learning rate of the step before": (
        "scripts/train.py",
        "learning_rate(cfg.optim.schedule, cfg.optim.lr, step,",
        "learning_rate(cfg.optim.schedule, cfg.optim.lr, step - 1,",
        "AdamW",
        T5,
    ),
    "dropout the same at every step": (
        "scripts/train.py",
        "dropout_keys(cfg.run.seed, step, indices)",
        "dropout_keys(cfg.run.seed, 0, indices)",
        "gradient",
        T5,
    ),
    "no dropout": (
        "scripts/train.py",
        "            me.seed(cfg.run.seed, step)\n",
        "            me.seed(cfg.run.seed, step)\n            model.eval()\n",
        "gradient",
        T5,
    ),
    "label smoothing forgotten": ("scripts/train.py", "batch, cfg.optim.label_smoothing)", "batch)", "metrics", LLAMA),
    "clipped per micro-batch": (
        "scripts/train.py",
        "backend.backward(loss)\n",
        "backend.backward(loss); torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.max_grad_norm)\n",
        "gradient",
        T5,
    ),
    "a micro-batch dropped": (
        "scripts/train.py",
        "for batch in batches:\n",
        "for batch in batches[:-1]:\n",
        "gradient",
        T5,
    ),
    "loader from the start on resume": (
        "scripts/train.py",
        'loader.restore(start.state["loader"])',
        "pass",
        "resume",
        LLAMA,
    ),
    "optimizer anew on resume": (
        "scripts/train.py",
        "config, backend.load)",
        "config, lambda weights, optimizer: backend.load(weights, {}))",
        "resume",
        LLAMA,
    ),
    "from the start on resume": (
        "scripts/train.py",
        "    if start.checkpoint:\n        load_checkpoint(",
        "    if False:\n        load_checkpoint(",
        "resume",
        LLAMA,
    ),
    "shifted twice": (
        "babl/data/collate.py",
        "[IGNORE] * (len(f.source) - 1) + f.target for f",
        "[IGNORE] * (len(f.source) - 2) + f.target + [IGNORE] for f",
        "gradient",
        LLAMA,
    ),
    "the prompt a target": (
        "babl/data/collate.py",
        "[IGNORE] * (len(f.source) - 1) + f.target for f",
        "f.source[1:] + f.target for f",
        "gradient",
        LLAMA,
    ),
    "no EOS": (
        "babl/text/prompts.py",
        "return [[*ids, tokenizer.eos_id] for ids in encoded]",
        "return list(encoded)",
        "gradient",
        T5,
    ),
    "a tied head counted twice": (
        "babl/distributed/ddp.py",
        "clip_grad_norm_(self.module.parameters(),",
        "clip_grad_norm_([p for m in self.module.modules() for p in m.parameters(recurse=False)],",
        "gradient",
        T5,
    ),
    "position biases decay": ("babl/training/optimizer.py", ' or "relative_bias" in key', "", "AdamW", T5),
    "gradients not forgotten": (
        "babl/distributed/ddp.py",
        "        self.optimizer.zero_grad(set_to_none=True)\n",
        "        if not math.isfinite(norm):\n            self.optimizer.zero_grad(set_to_none=True)\n",
        "gradient",
        T5,
    ),
    "ranks meet on the first micro-batch": (
        "scripts/train.py",
        "last=batch is batches[-1]",
        "last=batch is batches[0]",
        "gradient",
        TWO_RANKS,
    ),
    "ranks averaged": (
        "babl/distributed/ddp.py",
        "(loss * self.world.size).backward()",
        "loss.backward()",
        "gradient",
        TWO_RANKS,
    ),
    "clipped per rank": (
        "babl/distributed/fsdp.py",
        "total = torch.nn.utils.clip_grad_norm_(self.parameters.values(), max_norm or math.inf)",
        "mine = [p.grad.to_local() for p in self.parameters.values()]\n"
        "        total = torch.nn.utils.get_total_norm(mine)\n"
        "        torch._foreach_mul_(mine, min(1.0, (max_norm or math.inf) / total.item()))",
        "gradient",
        Case("llama", "fsdp", 2, 1),
    ),
}


IN_DEFAULT = {"mean of means"}


def unless_slow(names, fast):
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in names]


def mutated(file, old, new, folder, monkeypatch):
    """Returns the script to run, of which one place is another."""
    source = (ROOT / file).read_text(encoding="utf-8")
    assert source.count(old) == 1, "the mutant is no longer one"
    broken = folder / file
    if file == "scripts/train.py":
        broken.parent.mkdir()
    else:
        shutil.copytree(ROOT / "babl", folder / "babl")
        monkeypatch.setenv("PYTHONPATH", str(folder))
    broken.write_text(source.replace(old, new), encoding="utf-8")
    return broken if file == "scripts/train.py" else LOOP


@pytest.mark.parametrize("name", unless_slow(MUTANTS, IN_DEFAULT))
def test_a_seeded_mistake_is_found(name, tmp_path, monkeypatch):
    file, old, new, check, case = MUTANTS[name]
    script = mutated(file, old, new, tmp_path, monkeypatch)
    rows = prove(Request(script, [case], [(case, 2)] if check == "resume" else []))
    assert check in wrong(rows), rows
    assert check != "resume" or wrong(rows) == ["resume"]


ITSELF = {  # what is wrong of a split shows without knowing what is right
    "mean of means": "metrics",
    "a micro-batch dropped": "metrics",
    "ranks averaged": "metrics",
    "ranks meet on the first micro-batch": "weights",
    "clipped per micro-batch": "weights",
    "optimizer anew on resume": "resume",
    "loader from the start on resume": "resume",
}


@pytest.mark.parametrize("name", unless_slow(ITSELF, {"mean of means"}))
def test_a_seeded_mistake_is_found_against_the_script_itself(name, tmp_path, monkeypatch):
    file, old, new, _, case = MUTANTS[name]
    script = mutated(file, old, new, tmp_path, monkeypatch)
    rows = prove(Request(script, [case], [(case, 2)] if ITSELF[name] == "resume" else [], itself=True))
    assert ITSELF[name] in wrong(rows), rows


PRELUDE = """
import torch
from babl import ops, rng
from babl.data import loader
from babl.models import layers
drop, keys = ops.dropout, rng.dropout_keys
"""
ORDER = "loader.Loader._plan = lambda self: loader.plan_epoch(self.lengths, self.cfg.tokens, self.seed, {epoch})\n"
ONCE = """
import random
next_step = loader.Loader.next_step
def drawn(self):
    dice = random.Random(f"{self.epoch} {self.batch}")
    return [[dice.randrange(len(self.lengths)) for _ in part] for part in next_step(self)]
loader.Loader.next_step = drawn
"""
RANDOM = {  # what a script does before it begins, and the rows that must see it
    "a lane never dropped": (
        """
def lane(x, p, key, site):
    out = drop(x, p, key, site)
    out[..., 3::4] = x[..., 3::4] / (1 - p)
    return out
ops.dropout = lane
""",
        {"dropout rate", "dropout defined", "gradient"},
    ),
    "scale without drop": (
        "ops.dropout = lambda x, p, key, site: x / (1 - p)\n",
        {"dropout rate", "dropout defined", "gradient"},
    ),
    "drop without scale": (
        "ops.dropout = lambda x, p, key, site: drop(x, p, key, site) * (1 - p)\n",
        {"dropout scale", "gradient"},
    ),
    "no dropout at all": ("ops.dropped = lambda x, drop: x\n", {"dropout", "gradient"}),
    "keys with a period": (
        "rng.dropout_keys = loader.dropout_keys = lambda seed, step, indices: keys(seed, step % 5, indices)\n",
        {"dropout steps", "dropout defined"},
    ),
    "seeds with a period": (
        "rng.dropout_keys = loader.dropout_keys = lambda seed, step, indices: keys(seed % 3, step, indices)\n",
        {"dropout seeds", "dropout defined", "gradient"},
    ),
    "the same key for all examples": (
        "rng.dropout_keys = loader.dropout_keys = lambda seed, step, indices: keys(seed, step, [0] * len(indices))\n",
        {"dropout examples", "dropout defined", "gradient"},
    ),
    "the same mask for all sites": (
        "ops.dropout = lambda x, p, key, site: drop(x, p, key, 0)\n",
        {"dropout sites", "dropout defined", "gradient"},
    ),
    "sites not numbered": (
        "layers.number_sites.__code__ = (lambda model: None).__code__\n",
        {"dropout sites", "gradient"},
    ),
    "the same mask for all rows": (
        """
def rows(x, p, key, site):
    one = drop(torch.ones_like(x), p, key, site)
    return x * one[..., :1, :]
ops.dropout = rows
""",
        {"dropout places", "dropout defined", "gradient"},
    ),
    "order replayed each epoch": (ORDER.format(epoch=0), {"order"}),
    "two orders in turn": (ORDER.format(epoch="self.epoch % 2"), {"order"}),
    "examples drawn, not dealt": (ONCE, {"order"}),
}


@pytest.mark.parametrize("name", unless_slow(RANDOM, {"a lane never dropped"}))
def test_randomness_that_is_not_is_found(name, tmp_path):
    patch, checks = RANDOM[name]
    script = tmp_path / "train.py"
    docstring, rest = LOOP.read_text(encoding="utf-8").split('"""\n', 1)
    script.write_text(f'{docstring}"""\n{PRELUDE}{patch}{rest}', encoding="utf-8")
    found = wrong(prove(Request(script, [Case("t5", "ddp", 1, 1)], watch=True)))
    assert checks <= set(found), found


LOOP_MUTANTS = {
    "dropout in validation": ("    backend.model.eval()\n", "", {"dropout on", "metrics"}),
    "no dropout after validation": (
        "    backend.model.train()\n    total, targets",
        "    total, targets",
        {"dropout on", "gradient"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOP_MUTANTS)
def test_dropout_at_the_wrong_time_is_found(name, tmp_path, monkeypatch):
    old, new, checks = LOOP_MUTANTS[name]
    script = mutated("scripts/train.py", old, new, tmp_path, monkeypatch)
    found = wrong(prove(Request(script, [Case("t5", "ddp", 1, 1)], watch=True)))
    assert checks <= set(found), found


WORLDS = {  # where babl itself is broken, for the script and for verify alike
    "an arithmetic shift in the generator": ("babl/rng.py", ".bitwise_and_(2**34 - 1)", "", {"gradient"}),
    "the rate doubled": (
        "babl/rng.py",
        "[..., :width] >= threshold(p)",
        "[..., :width] >= threshold(2 * p)",
        {"gradient", "dropout rate"},
    ),
    "another wording": (
        "babl/text/prompts.py",
        'f"question: {question} context: {context}"',
        'f"{context} {question}"',
        {"gradient"},
    ),
    "order replayed": (
        "babl/data/loader.py",
        'random.Random(f"{seed}/{epoch}")',
        'random.Random(f"{seed}")',
        {"order"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_what_is_wrong_in_babl_itself_is_found(name, tmp_path):
    file, old, new, checks = WORLDS[name]
    shutil.copytree(ROOT / "babl", tmp_path / "babl")
    source = (tmp_path / file).read_text(encoding="utf-8")
    assert source.count(old) == 1, "the mutant is no longer one"
    (tmp_path / file).write_text(source.replace(old, new), encoding="utf-8")
    command = [sys.executable, "-m", "babl.cli", "verify", "--quick", "--json"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 1, ended.stderr
    assert checks <= {row["check"] for row in json.loads(ended.stdout) if row["verdict"] == "WRONG"}


@pytest.mark.slow
def test_a_cache_that_answers_otherwise_is_found(monkeypatch):
    write = Cache.write

    def faint(self, layer, k, v, positions):
        return write(self, layer, k * 0.9, v, positions)

    monkeypatch.setattr(Cache, "write", faint)
    assert wrong(prove(Request(LOOP, [LLAMA]))) == ["decode"]
