"""`babl verify` passes the loop as it is, and sees each of many ways to break it."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

from babl.cli import main as babl
from babl.models.cache import Cache
from babl.scripts import verify
from babl.scripts.verify import LOOP, Case, prove, run

ROOT = Path(__file__).parent.parent.parent
T5 = Case("t5", "ddp", 1, 4)
LLAMA = Case("llama", "ddp", 1, 1)
TWO_RANKS = Case("t5", "ddp", 2, 4)


@pytest.mark.parametrize("how", [["--quick"], pytest.param([], marks=pytest.mark.slow)], ids=["quick", "full"])
def test_the_loop_as_it_is_passes(how, capsys):
    code = babl(["verify", *how, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row for row in rows if row["verdict"] != "ok"] == [] and code == 0
    assert {row["check"] for row in rows} >= {"gradient", "AdamW", "metrics", "decode", "resume"}
    assert "t5 ddp 1x4 after step 2" in [row["case"] for row in rows]
    if not how:
        ways = {tuple(row["case"].split()[1:]) for row in rows if row["check"] == "gradient"}
        ranks = [f"{ranks}x{parts}" for ranks in (1, 2) for parts in (1, 4)]
        assert ways == {(backend, way) for backend in ("ddp", "fsdp", "zero1", "zero2", "zero3") for way in ranks}


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
    "no dropout": ("scripts/train.py", "        model.train()\n        if", "        if", "gradient", T5),
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
        '            loader.restore(start.state["loader"])\n',
        "",
        "resume",
        LLAMA,
    ),
    "optimizer anew on resume": (
        "scripts/train.py",
        "load=backend.load)",
        "load=lambda weights, optimizer: backend.load(weights, {}))",
        "resume",
        LLAMA,
    ),
    "from the start on resume": (
        "scripts/train.py",
        "        if start.checkpoint:\n            load(",
        "        if False:\n            load(",
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


@pytest.mark.parametrize("name", MUTANTS)
def test_a_seeded_mistake_is_found(name, tmp_path, monkeypatch, capsys):
    file, old, new, check, case = MUTANTS[name]
    source = (ROOT / file).read_text(encoding="utf-8")
    assert source.count(old) == 1, "the mutant is no longer one"
    script, broken = LOOP, tmp_path / file
    if file == "scripts/train.py":
        script = broken
        broken.parent.mkdir()
    else:
        shutil.copytree(ROOT / "babl", tmp_path / "babl")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken.write_text(source.replace(old, new), encoding="utf-8")
    code = run(script, [case], [(case, 2)] if check == "resume" else [], as_json=True)
    rows = json.loads(capsys.readouterr().out)
    wrong = [row["check"] for row in rows if row["verdict"] == "WRONG"]
    assert code == 1 and check in wrong, rows
    assert check != "resume" or wrong == ["resume"]


def test_a_cache_that_answers_otherwise_is_found(monkeypatch):
    write = Cache.write

    def faint(self, layer, k, v, positions):
        return write(self, layer, k * 0.9, v, positions)

    monkeypatch.setattr(Cache, "write", faint)
    wrong = [row.check for row in prove(LOOP, [LLAMA], []) if row.verdict == "WRONG"]
    assert wrong == ["decode"]


def test_randomness_that_repeats_is_found(monkeypatch):
    monkeypatch.setattr(verify, "dropout_keys", lambda seed, step, indices: [seed + step + i for i in indices])
    monkeypatch.setattr(verify, "plan_epoch", lambda lengths, budget, seed, epoch: [list(range(len(lengths)))])
    assert [row.verdict for row in prove(LOOP, [], [])] == ["WRONG", "WRONG"]


EMPTY_FOLDERS = """
import pathlib, sys, tomllib
folder = tomllib.loads(pathlib.Path(sys.argv[1]).read_text())["run"]["dir"]
for step in range(1, 5):
    pathlib.Path(folder, "run", "checkpoints", f"step_{step:06d}").mkdir(parents=True, exist_ok=True)
"""


def test_a_script_that_fails_or_hangs_is_wrong_and_says_why(tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    script.write_text("raise RuntimeError('no such luck')\n")
    assert run(script, [LLAMA], [], as_json=False) == 1
    told = capsys.readouterr()
    assert "exit code 1: RuntimeError: no such luck" in told.out and "1 wrong" in told.err
    script.write_text("print('all done')\n")
    assert "no checkpoint step_000001" in [row.note for row in prove(script, [LLAMA], [])]
    script.write_text(EMPTY_FOLDERS)
    assert any("what it left cannot be read" in row.note for row in prove(script, [LLAMA], [(LLAMA, 1)]))
    monkeypatch.setattr(verify, "LIMIT", 0.5)
    pid = tmp_path / "pid"
    script.write_text(f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    assert "not done in 0.5 s" in [row.note for row in prove(script, [LLAMA], [])]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_what_this_machine_cannot_run_is_listed_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(LOOP, [Case("t5", "zero2", 2, 4)], [], as_json=False) == 0
    told = capsys.readouterr()
    assert "not run" in told.out and "deepspeed is not installed" in told.out and "1 not run" in told.err


def test_a_script_that_is_not_there_is_bad_input(capsys):
    assert babl(["verify", "absent.py"]) == 2
    assert capsys.readouterr().err == "babl verify: absent.py: no such script\n"
