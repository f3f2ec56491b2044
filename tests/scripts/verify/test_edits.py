"""The worked edits of docs/edits under `babl verify`: what it says of each is true, and nothing is proven silently."""

import subprocess
from pathlib import Path

import pytest

from babl.scripts.verify.edit import LOOP, NOTHING, summary
from babl.scripts.verify.program import Request, prove
from babl.scripts.verify.runs import Case
from babl.scripts.verify.statements import parse

ROOT = Path(__file__).parent.parent.parent.parent
ALONE, RANKS = Case("t5", "ddp", 1, 4), Case("t5", "ddp", 2, 4)
SHARDS = [Case("t5", backend, 2, 4) for backend in ("fsdp", "zero2", "zero3")]
ITSELF = {  # edit -> what is said of it
    "z-loss": {},
    "r-drop": {},
    "lion": {},
    "averaged-weights": {},
    "early-stopping": {},
    "gradient-noise": {"ignored": ["noise"]},
    "auxiliary-head": {},
    "config-section": {"overrides": ["noise.std=0.01"]},
    "layer-wise-rates": {"said": parse([], ["encoder.blocks.*.?.weight=0.5"])},
    "frozen-layers": {"said": parse(["encoder.blocks.*"], [])},
}
REFUSED = {"gradient-noise": {"fsdp", "zero2", "zero3"}, "config-section": {"zero2", "zero3"}}
DIFFERS = {"config-section": {"fsdp"}}  # each rank draws the noise of its own shards there


def edited(name, folder):
    script = folder / f"{name}.py"
    script.write_bytes(LOOP.read_bytes())
    subprocess.run(["patch", "-s", str(script), str(ROOT / "docs" / "edits" / f"{name}.diff")], check=True)
    return script


def wrong(rows):
    return [(row.check, row.case, row.note) for row in rows if row.verdict == "WRONG"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ITSELF)
def test_a_worked_edit_agrees_with_itself(name, tmp_path):
    cases = [ALONE, RANKS, *SHARDS]
    rows = prove(Request(edited(name, tmp_path), cases, [(ALONE, 2), (SHARDS[0], 2)], itself=True, **ITSELF[name]))
    assert {case.split()[1] for _, case, _ in wrong(rows)} == DIFFERS.get(name, set())
    refused = {row.case.split()[1] for row in rows if row.verdict == "not run"}
    assert refused == REFUSED.get(name, set()) and all("refused" in row.note for row in rows if row.kind == "skipped")
    assert any(row.check == "edit" for row in rows)


@pytest.mark.slow
def test_a_statement_is_held_to_the_stock_loop_exactly(tmp_path):
    script = edited("frozen-layers", tmp_path)
    rows = prove(Request(script, [ALONE, RANKS], [(ALONE, 2)], said=parse(["encoder.blocks.*"], [])))
    assert wrong(rows) == []
    rows = prove(Request(script, [ALONE]))
    unsaid = [note for check, _, note in wrong(rows) if check == "state"]
    assert unsaid and "did not move" in unsaid[0] and "encoder.blocks.0" in unsaid[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said", "check", "note"),
    [
        ("layer-wise-rates", parse([], ["encoder.blocks.*.?.weight=0.1"]), "rate", "moves 0.5 times as far"),
        ("frozen-layers", parse(["decoder.blocks.*"], []), "fixed", "moved by step"),
    ],
)
def test_a_false_statement_is_found(name, said, check, note, tmp_path):
    rows = prove(Request(edited(name, tmp_path), [ALONE], itself=True, said=said))
    assert [check] == [found for found, _, _ in wrong(rows)] and note in wrong(rows)[0][2]


@pytest.mark.slow
def test_another_optimizer_is_named_and_not_called_a_wrong_gradient(tmp_path):
    rows = prove(Request(edited("lion", tmp_path), [ALONE]))
    assert {"state", "metrics"} >= {check for check, _, _ in wrong(rows)}
    assert any(row.check == "gradient" and "not AdamW" in row.note for row in rows)
    assert any(row.check == "decode" and row.verdict == "ok" for row in rows)
    assert any(row.check == "seen" and "exp_avg_sq" in row.note for row in rows)


def test_an_edit_without_effect_is_told(tmp_path, capsys):
    script = tmp_path / "train.py"
    source = LOOP.read_text(encoding="utf-8")
    line = "    kernel_choice.use_kernels()\n"
    assert source.count(line) == 1
    script.write_text(source.replace(line, f"{line}    forgotten = 0.1\n"), encoding="utf-8")
    rows = prove(Request(script, [Case("llama", "ddp", 1, 1)]))
    assert wrong(rows) == []
    assert [row.note for row in rows if row.check == "edit"] == ["+1 -0: forgotten = 0.1"]
    assert [row.note for row in rows if row.check == "seen"] == [NOTHING]
    assert summary(rows) == f"; differs from the stock loop in 1 places, but {NOTHING}"
