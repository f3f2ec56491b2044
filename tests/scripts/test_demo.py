import json
import subprocess
import sys
from pathlib import Path

import pytest

from babl.data.squad import load_squad
from babl.experiment.plan import load_plan
from babl.scripts import demo, experiment

SMALL = """
[experiment]
arms = ["none", "gold"]
tests = ["none", "gold"]
primary = ["gold", "none"]
max_new_tokens = 16
train_articles = 20
test_articles = 3
validation_share = 0.1
bootstrap_samples = 200
[model]
tokenizer_size = 500
[data]
max_source_tokens = 128
stride = 16
[batch]
examples = 8
[train]
preflight = false
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    (tmp_path / "small.toml").write_text(SMALL)
    monkeypatch.setattr(demo, "CONFIG", str(tmp_path / "small.toml"))
    monkeypatch.setattr(demo, "RESERVE_SECONDS", 0)


@pytest.mark.parametrize("family", demo.SHAPES)
def test_a_very_short_demo_leaves_all_it_promises(family, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "STEPS", 4)
    out = tmp_path / "demo"
    assert demo.run(out, family, minutes=15, seed=0) == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["arms"]) == ["none", "gold"] and report["steps"] == 4
    for arm in report["arms"].values():
        assert arm["grades"].keys() == {"type", "entity", "name"}
        assert arm["interval"] is None, "three articles are too few for one"
        assert (Path(arm["model"]) / "model.safetensors").exists()
    gold, none = report["arms"]["gold"]["exact"], report["arms"]["none"]["exact"]
    assert report["difference"] == pytest.approx(gold - none)
    assert report["dev_questions"] == len(load_squad(out / "data" / "test.json"))
    html = (out / "report" / "report.html").read_text()
    assert "<svg" in html and "<link" not in html and "@import" not in html, "nothing is fetched"
    printed = capsys.readouterr()
    assert "babl query" in printed.out and "EM, 95 % interval" in printed.out and "--minutes" not in printed.out
    assert "minutes on this machine, 4 steps an arm" in printed.err
    assert all(line.split()[2] == "–" for line in printed.out.splitlines() if line.startswith(("none ", "gold ")))
    command = [sys.executable, "-m", "babl.cli", "evaluate", str(out / "model-gold"), str(out / "data" / "test.json")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["exact_match"] == pytest.approx(gold), "the experiment's figure is evaluate's"


def test_it_is_an_experiment_and_a_second_demo_takes_the_place_of_the_first(small, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 2)
    out = tmp_path / "demo"
    for seed in (0, 1):
        assert demo.run(out, "t5", minutes=15, seed=seed) == 0
    plan = load_plan(out)
    assert [(cell.arm, cell.seed) for cell in plan.cells] == [("none", 1), ("gold", 1)]
    found = [line for line in experiment.mismatches(plan)]
    assert found == []


def test_a_machine_that_is_too_slow_trains_in_fewer_steps_and_says_so(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "cell_seconds", lambda plan, model, arm, threads: 2.0)  # a step
    monkeypatch.setattr(demo, "SIDE_BY_SIDE", 1.0)
    out = tmp_path / "demo"
    assert demo.run(out, "t5", minutes=1, seed=0) == 0
    printed = capsys.readouterr()
    said = f"--minutes 1 allows 30 steps on this machine, and learning to read takes {demo.STEPS:,}"
    assert f"{said}; --minutes {-(-2 * demo.STEPS // 60)} would do" in printed.err
    assert f"{said}: what is above may be less than these models can learn." in printed.out
    assert json.loads((out / "report.json").read_text())["steps"] == 30


def test_the_plan_of_the_demo_has_two_arms_and_one_seed():
    _, design, template = experiment.read(demo.CONFIG, ["experiment.seeds=[3]", "train.steps=4"])
    assert (design.arms, design.tests, design.seeds) == (["none", "gold"], ["none", "gold"], [3])
    assert design.primary == ["gold", "none"] and template["data"]["train"] == design.test == "fictional"
