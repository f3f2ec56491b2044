import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from babl.config import build_config
from babl.data.contexts import build_views
from babl.data.fictional import fictional_corpus
from babl.data.squad import load_squad
from babl.errors import UserError
from babl.experiment import plan as module
from babl.experiment.plan import Design, freeze, load_plan, with_settings
from babl.scripts.experiment import ExperimentConfig
from babl.scripts.train import TrainConfig

ARMS = ["none", "random", "answer-removed", "gold"]
DESIGN = Design(arms=ARMS, tests=[*ARMS, "counterfactual"], seeds=[0, 1], train_articles=6, test_articles=3)
SHAPE = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}


@pytest.fixture
def run():
    tree = {"model": {"shape": SHAPE, "tokenizer_size": 400}, "data": {"max_source_tokens": 128, "stride": 16}}
    return asdict(build_config(TrainConfig, tree | {"batch": {"examples": 8}}, "test"))


@pytest.fixture
def plan(tmp_path, run):
    return freeze(tmp_path / "tiny", DESIGN, run)


def test_every_arm_has_the_same_questions_and_a_hash_of_what_it_shows(plan):
    for part, arms in (("train", ARMS), ("validation", ARMS), ("test", DESIGN.tests)):
        rows = [json.loads(x) for x in (plan.folder / f"data/contexts-{part}.jsonl").read_text().splitlines()]
        examples = plan.data(part)
        assert [row["id"] for row in rows] == [example.id for example in examples]
        for arm in arms:
            views, missing = build_views(examples, arm, plan.tree["data"]["context_seed"])
            assert not missing and [row[arm] for row in rows] == [module.view_hash(view) for view in views]
    titles = [{example.title for example in plan.data(part)} for part in ("train", "validation", "test")]
    assert sum(map(len, titles)) == len(set.union(*titles)) == 9, "no article is in two parts"


def test_the_plan_names_every_cell_by_all_that_decides_it(tmp_path, plan, run):
    assert [(cell.arm, cell.seed) for cell in plan.cells] == [(arm, seed) for arm in ARMS for seed in (0, 1)]
    again = freeze(tmp_path / "elsewhere" / "tiny", DESIGN, run)
    assert again.cells == plan.cells and again.tree["hash"] == plan.tree["hash"], "wherever it lies"
    other = freeze(tmp_path / "other" / "tiny", DESIGN, with_settings(run, {"optim.lr": 0.5}))
    assert not {cell.id for cell in other.cells} & {cell.id for cell in plan.cells}


def test_a_frozen_plan_stays(plan, run):
    before = (plan.folder / "plan.json").read_bytes()
    assert freeze(plan.folder, DESIGN, run).tree == plan.tree
    assert (plan.folder / "plan.json").read_bytes() == before
    assert [p.name for p in plan.folder.parent.iterdir()] == ["tiny"], "nothing is left aside"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"seeds": [0, 1, 2]}, {}, r"frozen with seeds \[0, 1\], not \[0, 1, 2\]"),
        ({"primary": ["gold", "random"]}, {}, r"frozen with primary\.contrast"),
        ({}, {"optim.lr": 0.5}, r"frozen with run\.optim\.lr 0\.001, not 0\.5; an experiment under another run\.name"),
    ],
)
def test_another_question_is_another_experiment(plan, run, change, settings, message):
    with pytest.raises(UserError, match=message):
        freeze(plan.folder, replace(DESIGN, **change), with_settings(run, settings))


def test_other_code_and_other_data_are_another_experiment(tmp_path, run, monkeypatch):
    files = [tmp_path / "train.json", tmp_path / "test.json"]
    for path, tree in zip(files, fictional_corpus(6, 3), strict=True):
        path.write_text(json.dumps(tree))
    design, run = replace(DESIGN, test=str(files[1])), with_settings(run, {"data.train": str(files[0])})
    plan = freeze(tmp_path / "real", design, run)
    assert plan.tree["chance_exact"] is None
    monkeypatch.setattr(module, "code_hash", lambda rooms: "0" * 64)
    with pytest.raises(UserError, match=r"frozen with environment\.code .*, not"):
        freeze(plan.folder, design, run)
    files[1].write_text(files[1].read_text() + "\n")
    with pytest.raises(UserError, match=rf"frozen with another test file than {files[1]} is now"):
        freeze(plan.folder, design, run)
    with pytest.raises(UserError, match=r"train\.json shares 6 articles"):
        freeze(tmp_path / "same", replace(design, test=str(files[0])), run)
    with pytest.raises(UserError, match=r"experiment\.test is 'fictional'"):
        freeze(tmp_path / "mixed", replace(design, test="fictional"), run)


def test_all_that_training_imports_decides():
    """A file that the loop begins to use is part of the plan's hash, or named here as one that decides nothing."""
    program = "import sys, babl.scripts.train; print(*(m for m in sys.modules if m.startswith('babl.')))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "babl.training.loss" in loaded
    apart = {"babl.errors", "babl.kernels", "babl.scripts", "babl.scripts.train"}
    decide = {f"babl.{room.removesuffix('.py').replace('/', '.')}" for room in module.DECIDING_CODE}
    assert [m for m in loaded if not {m, ".".join(m.split(".")[:2])} & (decide | apart)] == []


def test_a_plan_changed_by_hand_is_refused(plan):
    path = plan.folder / "plan.json"
    path.write_text(path.read_text().replace('"margin": 1.0', '"margin": 9.0'))
    with pytest.raises(UserError, match=r"plan\.json: not what was frozen"):
        load_plan(plan.folder)
    with pytest.raises(UserError, match="no experiment is there"):
        load_plan(plan.folder.parent)


def test_what_an_arm_cannot_show_is_dropped_from_every_arm_and_counted(tmp_path, run):
    short = with_settings(run, {"data.max_source_tokens": 100})
    plan = freeze(tmp_path / "short", DESIGN, short)
    reasons = plan.tree["excluded"]["train"]
    assert any("longer than 100 tokens" in reason for reason in reasons)
    whole = sum(len(p["qas"]) for a in fictional_corpus(6, 3)[0]["data"] for p in a["paragraphs"])
    questions = plan.tree["data"]["questions"]
    dropped = sum(sum(plan.tree["excluded"][part].values()) for part in ("train", "validation"))
    assert questions["train"] + questions["validation"] + dropped == whole
    with pytest.raises(UserError, match="no question is left that every arm can be built for"):
        freeze(tmp_path / "none", DESIGN, with_settings(run, {"data.max_source_tokens": 5}))
    assert not list(tmp_path.glob(".*")), "nothing is left aside"


def test_the_grid_tries_the_same_settings_in_every_arm(tmp_path, run):
    design = replace(DESIGN, grid={"optim.lr": [0.1, 0.01], "optim.warmup_steps": [0, 2]})
    plan = freeze(tmp_path / "grid", design, run)
    assert len(plan.trials) == 4 * len(ARMS) and {trial.seed for trial in plan.trials} == {0}
    for arm in ARMS:
        settings = [trial.settings for trial in plan.trials if trial.arm == arm]
        assert settings[1] == {"optim.lr": 0.1, "optim.warmup_steps": 2}
        assert settings == [trial.settings for trial in plan.trials if trial.arm == "none"]


def test_models_differ_by_their_overrides(tmp_path, run):
    models = {"small": {}, "llama": {"model.family": "llama", "model.shape": {"hidden_size": 16}}}
    plan = freeze(tmp_path / "two", replace(DESIGN, models=models), run)
    assert plan.tree["models"] == ["small", "llama"] and len(plan.cells) == 2 * len(ARMS) * 2
    of = {cell.model: plan.run_of(cell, {"optim.lr": 0.5}) for cell in plan.cells}
    assert (of["small"]["model"]["family"], of["llama"]["model"]["family"]) == ("t5", "llama")
    assert of["llama"]["optim"]["lr"] == 0.5 and of["llama"]["model"]["tokenizer"].endswith("tokenizer/llama")
    assert len(load_squad(of["llama"]["data"]["train"])) == plan.tree["data"]["questions"]["train"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"arms": ["gold", "gold"]}, r"experiment\.arms is \['gold', 'gold'\], expected at least one, each once"),
        ({"arms": ["gold", "golf"]}, r'experiment\.arms\[1\] is "golf", expected one of .*did you mean'),
        ({"arms": ["counterfactual"]}, r'experiment\.arms\[0\] is "counterfactual", expected one of'),
        ({"arms": ["none", "gold", "blank"]}, r"experiment\.tests lacks blank"),
        (
            {"primary": ["gold", "random"]},
            r"experiment\.primary: \['gold', 'random'\] is no pair of arms, or of arm@condition",
        ),
        ({"arms": ["mixture"], "primary": ["mixture", "mixture@none"]}, r"\['mixture', 'mixture@none'\] is no pair"),
        ({"validation_share": 1.5}, r"experiment\.validation_share is 1\.5, expected between 0 and 1"),
        ({"max_new_tokens": 0}, r"experiment\.max_new_tokens is 0, expected at least 1"),
    ],
)
def test_a_mistake_in_the_design_is_named(section, message):
    with pytest.raises(UserError, match=message):
        build_config(ExperimentConfig, {"experiment": section, "batch": {"examples": 8}}, "c.toml")


def test_arms_of_different_steps_are_refused():
    with pytest.raises(UserError, match=r"batch\.examples is 0, expected a number"):
        build_config(ExperimentConfig, {}, "c.toml")
