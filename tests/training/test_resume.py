"""A run goes on only as what it was: every key of the configuration, one by one, on a real run that has ended."""

import dataclasses
import hashlib
import json
import re
import shutil
import typing
from pathlib import Path

import pytest

from babl.scripts.train import TrainConfig, main

ROOT = Path(__file__).parent.parent.parent
WORDS = ["Rudi", "Ada", "Leo", "Una", "Tom", "Eva", "Pia", "Kurt"]
OTHER = {  # a value that is not the run's, for each key
    "run.name": "other",
    "run.dir": "elsewhere",
    "run.seed": 5,
    "run.resume": True,
    "run.allow": ["optim.lr"],
    "model.path": "models/other",
    "model.family": "llama",
    "model.shape": {"d_model": 16},
    "model.tokenizer": "models/other",
    "model.tokenizer_size": 299,
    "data.train": "moved.jsonl",
    "data.validation": "moved_validation.jsonl",
    "data.context": "none",
    "data.max_source_tokens": 99,
    "data.stride": 9,
    "data.context_seed": 1,
    "data.overlong": "error",
    "data.strict": True,
    "data.faulty": "leave-out",
    "data.impossible": "unanswerable",
    "data.articles": "context",
    "batch.tokens": 999,
    "batch.examples": 3,
    "batch.accumulation": 2,
    "optim.name": "adafactor",
    "optim.lr": 0.5,
    "optim.weight_decay": 0.25,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 1,
    "optim.max_grad_norm": 0.5,
    "optim.label_smoothing": 0.1,
    "train.steps": 3,
    "train.precision": "bf16",
    "train.activation_checkpointing": "all",
    "train.validate_every": 1,
    "train.save_every": 2,
    "train.keep_last": 5,
    "train.keep_every": 1,
    "train.async_save": True,
    "train.preflight": False,
    "train.tensorboard": True,
    "distributed.backend": "fsdp",
    "distributed.offload": "all",
    "distributed.deepspeed": "ds.json",
    "distributed.timeout_seconds": 99,
}


def keys():
    """Every key of every section, from the dataclasses."""
    sections = typing.get_type_hints(TrainConfig)
    return [f"{name}.{field.name}" for name, section in sections.items() for field in dataclasses.fields(section)]


def documented():
    """What docs/resume.md says of each key."""
    rows = re.findall(r"^\| (`.*?) \| (may change|refused) \|", (ROOT / "docs/resume.md").read_text(), re.MULTILINE)
    return {key: verdict for names, verdict in rows for key in re.findall(r"`([\w.]+)`", names)}


def write_questions(path, extra=""):
    lines = [
        {"question": "Who bakes?", "context": f"{w} bakes bread{extra}.", "answer": w, "title": f"{path.stem}{i}"}
        for i, w in enumerate(WORDS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A folder with two data files, and a run of two steps on them."""
    folder = tmp_path_factory.mktemp("ended")
    write_questions(folder / "train.jsonl")
    write_questions(folder / "validation.jsonl", " in town")
    assert main(command(folder)) == 0
    return folder


@pytest.fixture
def run(ended, tmp_path):
    shutil.copytree(ended, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def command(folder, *overrides):
    shape = "{d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=1, num_decoder_layers=1, dropout_rate=0.1}"
    settings = [f"run.dir={folder}", f"data.train={folder}/train.jsonl", f"data.validation={folder}/validation.jsonl"]
    settings += [f"model.shape={shape}", "model.tokenizer_size=290", "train.steps=2", "train.save_every=1"]
    return [str(ROOT / "configs/debug_cpu.toml"), *settings, *overrides]


def resume(folder, *overrides):
    return main(command(folder, "run.resume=true", *overrides))


def contents(folder):
    """Target, or hash and time of change, of everything in a folder."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[path] = path.readlink()
        else:
            found[path] = path.is_file() and (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns)
    return found


def toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}={toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def complaint(capsys):
    """The one line that a program ended with."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    return line


def test_every_key_is_classed():
    sections = typing.get_type_hints(TrainConfig)
    assert OTHER.keys() == {*keys()}, "a new key: give it another value here, and a row in docs/resume.md"
    hashes = {"data.train.sha256", "data.validation.sha256"}
    assert documented().keys() - hashes == {*keys()}, "docs/resume.md has a row for every key"
    assert sections.keys() == {key.partition(".")[0] for key in keys()}


@pytest.mark.parametrize("key", [key for key, verdict in documented().items() if verdict == "refused"])
def test_a_key_that_changes_what_is_computed_is_refused_with_both_values(run, capsys, key):
    before = contents(run)
    assert resume(run, "train.steps=4", f"{key}={toml(OTHER[key])}") == 2
    line = complaint(capsys)
    name = "model.shape.d_model" if key == "model.shape" else key
    saved = run / "debug_cpu" / "checkpoints" / "step_000002"
    then = re.search(rf"{re.escape(name)} is (\S+), but was (\S+?)(;| when)", line)
    now = OTHER[key]["d_model"] if key == "model.shape" else OTHER[key]
    assert then and then[1] == json.dumps(now), line
    recorded = (saved / "run.toml").read_text()
    assert re.search(rf"^\s*{name.rpartition('.')[2]} = {re.escape(then[2])},?$", recorded, re.MULTILINE), line
    assert f"when {saved} was saved" in line and f'"{name}"' in line
    assert contents(run) == before


@pytest.mark.parametrize("key", [key for key, verdict in documented().items() if verdict == "may change"])
def test_a_key_that_does_not_is_gone_on_with(run, capsys, key, monkeypatch):
    monkeypatch.chdir(run)
    shutil.copy(run / "train.jsonl", run / "moved.jsonl")
    shutil.copy(run / "validation.jsonl", run / "moved_validation.jsonl")
    if key == "run.name":
        (run / "debug_cpu").rename(run / "other")
    if key == "run.dir":
        (run / "elsewhere").mkdir()
        (run / "debug_cpu").rename(run / "elsewhere" / "debug_cpu")
    needs = {"distributed.offload": ["distributed.backend=fsdp"]}
    code = resume(run, "train.steps=3", *needs.get(key, []), f"{key}={toml(OTHER[key])}")
    if key == "distributed.deepspeed":  # compiles for minutes where it is asked for with its backends
        assert "is not DeepSpeed's" in complaint(capsys)
        return
    assert code == 0
    (written,) = run.rglob("step_000003/trainer.json")
    assert json.loads(written.read_text())["step"] == 3


def test_other_questions_in_the_file_of_the_same_name_are_refused(run, capsys):
    for name, saved in (("train", "train"), ("validation", "validation")):
        original = (run / f"{name}.jsonl").read_bytes()
        write_questions(run / f"{name}.jsonl", " well")
        before = contents(run)
        assert resume(run, "train.steps=4") == 2
        assert re.search(rf'data\.{saved}\.sha256 is "[0-9a-f]{{64}}", but was "[0-9a-f]{{64}}"', complaint(capsys))
        assert contents(run) == before
        (run / f"{name}.jsonl").write_bytes(original)
    assert resume(run, "train.steps=4") == 0


def test_a_run_that_is_done_is_not_called_by_another_name(run, capsys):
    before = contents(run)
    assert resume(run, "data.context=none") == 2
    assert 'data.context is "none", but was "gold"' in complaint(capsys)
    assert contents(run) == before


def test_a_learning_rate_changes_where_it_is_allowed_and_stays_allowed_in_the_next_checkpoint(run, capsys):
    assert resume(run, "train.steps=3", "optim.lr=0.5") == 2
    capsys.readouterr()
    assert resume(run, "train.steps=3", "optim.lr=0.5", 'run.allow=["optim.lr"]') == 0
    assert "run.resume: optim.lr is 0.5, but was 0.002" in capsys.readouterr().err
    assert resume(run, "train.steps=4", "optim.lr=0.5") == 0
    assert resume(run, "train.steps=5") == 2, "now it is the old one that is another"


def test_what_is_allowed_is_a_key(run, capsys):
    assert resume(run, 'run.allow=["optim.lrr"]') == 2
    assert "run.allow names 'optim.lrr', which is no key of the configuration; did you mean 'optim.lr'?" in complaint(
        capsys
    )


def test_another_order_of_examples_cannot_be_allowed(run, capsys):
    before = contents(run)
    assert resume(run, "train.steps=4", "batch.tokens=100", 'run.allow=["batch.tokens"]') == 2
    assert "the examples come in another order" in complaint(capsys)
    assert contents(run) == before


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(b"\xff"), lambda path: path.write_text("=")]
)
def test_without_the_checkpoints_configuration_it_is_not_known_what_the_run_was(run, capsys, damage):
    checkpoint = run / "debug_cpu" / "checkpoints" / "step_000002"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest.pop("run.toml")  # as where an edited loop does not save it, or saves another
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    damage(checkpoint / "run.toml")
    before = contents(run)
    assert resume(run, "train.steps=4") == 2
    assert f"{checkpoint / 'run.toml'}: cannot be read (" in complaint(capsys)
    assert contents(run) == before


@dataclasses.dataclass
class Mine:
    strength: float = 0.5


@dataclasses.dataclass
class EditedConfig(TrainConfig):
    mine: Mine = dataclasses.field(default_factory=Mine)


def test_a_section_of_ones_own_is_compared(run, capsys, monkeypatch):
    monkeypatch.setattr("babl.scripts.train.TrainConfig", EditedConfig)
    assert resume(run, "train.steps=3") == 0, "its default is what a run without it did"
    assert resume(run, "train.steps=4", "mine.strength=1") == 2
    assert "mine.strength is 1.0, but was 0.5" in complaint(capsys)
    monkeypatch.undo()
    assert resume(run, "train.steps=4") == 2
    assert "mine.strength is unset, but was 0.5" in complaint(capsys)


def test_fewer_steps_than_are_done_end_at_once(run, capsys):
    before = contents(run)
    assert resume(run, "train.steps=1") == 0
    said = capsys.readouterr()
    assert re.search(r"train\.steps is 1, and \S+step_000002 has done 2", said.err)
    assert Path(said.out.strip()) == run / "debug_cpu" / "checkpoints" / "step_000002"
    assert contents(run) == before


def test_fewer_steps_than_were_meant_are_another_schedule(run, capsys):
    assert resume(run, "train.steps=5", "train.keep_last=0") == 0
    for step in (4, 5):
        shutil.rmtree(run / "debug_cpu" / "checkpoints" / f"step_00000{step}")
    before = contents(run)
    assert resume(run, "train.steps=4") == 2
    assert "train.steps is 4, but was 5" in complaint(capsys)
    assert contents(run) == before
    assert resume(run, "train.steps=3") == 0, "all of three are done"
