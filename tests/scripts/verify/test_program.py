"""`babl verify` passes the loop as it is, and says why where there is nothing to compare."""

import importlib.util
import json
import os

import pytest

from babl.cli import main as babl
from babl.scripts.verify import runs
from babl.scripts.verify.edit import LOOP
from babl.scripts.verify.program import Request, prove
from babl.scripts.verify.runs import Case
from babl.scripts.verify.table import show

LLAMA = Case("llama", "ddp", 1, 1)


@pytest.mark.parametrize("how", [["--quick"], pytest.param([], marks=pytest.mark.slow)], ids=["quick", "full"])
def test_the_loop_as_it_is_passes(how, capsys):
    code = babl(["verify", *how, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row for row in rows if row["verdict"] != "ok"] == [] and code == 0
    checks = {row["check"] for row in rows}
    assert checks >= {"order", "gradient", "AdamW", "metrics", "decode", "resume", "dropout rate", "dropout defined"}
    assert "t5 ddp 1x4 after step 2" in [row["case"] for row in rows]
    if not how:
        ways = {tuple(row["case"].split()[1:]) for row in rows if row["check"] == "gradient"}
        ranks = [f"{ranks}x{parts}" for ranks in (1, 2) for parts in (1, 4)]
        assert ways == {(backend, way) for backend in ("ddp", "fsdp", "zero1", "zero2", "zero3") for way in ranks}


@pytest.mark.slow
def test_the_loop_as_it_is_passes_against_itself(capsys):
    code = babl(["verify", "--self", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row for row in rows if row["verdict"] != "ok"] == [] and code == 0
    assert {row["check"] for row in rows} >= {"metrics", "weights", "state", "resume", "order", "dropout rate"}


EMPTY_FOLDERS = """
import pathlib, sys, tomllib
folder = tomllib.loads(pathlib.Path(sys.argv[1]).read_text())["run"]["dir"]
for step in range(1, 5):
    pathlib.Path(folder, "run", "checkpoints", f"step_{step:06d}").mkdir(parents=True, exist_ok=True)
"""


def test_a_script_that_fails_or_hangs_is_wrong_and_says_why(tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    script.write_text("raise RuntimeError('no such luck')\n")
    assert show(str(script), prove(Request(script, [LLAMA])), as_json=False) == 1
    said = capsys.readouterr()
    assert "exit code 1: RuntimeError: no such luck" in said.out and "1 wrong" in said.err
    script.write_text("print('all done')\n")
    assert "no checkpoint was saved" in [row.note for row in prove(Request(script, [LLAMA]))]
    script.write_text(EMPTY_FOLDERS)
    rows = prove(Request(script, [LLAMA], [(LLAMA, 1)]))
    assert any("what the script left cannot be read" in row.note for row in rows)
    monkeypatch.setattr(runs, "LIMIT", 0.5)
    pid = tmp_path / "pid"
    script.write_text(f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    assert "not done in 0.5 s" in [row.note for row in prove(Request(script, [LLAMA]))]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_what_this_machine_cannot_run_is_listed_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert show("train.py", prove(Request(LOOP, [Case("t5", "zero2", 2, 4)])), as_json=False) == 0
    said = capsys.readouterr()
    assert "not run" in said.out and "deepspeed is not installed" in said.out and "1 not run" in said.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["absent.py"], "absent.py: no such script"),
        (["--quick", "--self", "--rate", "shared.*=0.1", "--base", "absent.py"], "absent.py: no such script"),
        (["--rate", "encoder.*"], "--rate encoder.*: expected PATTERN=FACTOR with a factor above 0, such as"),
        (["--rate", "encoder.*=-1"], "--rate encoder.*=-1: expected PATTERN=FACTOR with a factor above 0, such as"),
        (["--quick", "--fixed", "encodre.*"], "--fixed encodre.*: no parameter is called so; their names begin with"),
        (["--quick", str(LOOP), "optim.lr=1"], "optim.lr=1: verify sets optim.lr itself"),
    ],
)
def test_bad_input_is_one_line(arguments, line, capsys):
    assert babl(["verify", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.replace("\r", "").splitlines()[-1].strip().startswith(f"babl verify: {line}")
