"""The frozen plan of an experiment: what is asked, of which data, with which models, before anything is trained.

The folder of an experiment:

    plan.json              everything that decides the outcome, with hashes, under a hash of its own
    data/                  train.json, validation.json, test.json: the questions in use, the same ones in every arm;
                           contexts-*.jsonl: a hash of what each arm shows of each question; overlap.json, classes.json
    tokenizer/             where none is given, the one that all cells use
    cells/ID/              one model trained in one arm with one seed; see `babl.experiment.run`
"""

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from babl.config import at_least
from babl.data.articles import disjoint, split_by_article
from babl.data.contexts import Arm, TestArm, TrainArm, View, build_views
from babl.data.fictional import chance_exact, fictional_corpus
from babl.data.formats import data_hash
from babl.data.overlap import find_overlap
from babl.data.sets import FICTIONAL
from babl.data.squad import Example, Reading, load_squad, parse_squad, to_squad
from babl.errors import UserError
from babl.evaluation.predictions import code_hash
from babl.experiment.strata import STRATA
from babl.files import file_hash
from babl.models.weights import FAMILIES, read_config
from babl.text import load_tokenizer, train_tokenizer
from babl.text.prompts import Style, prompt_ids, qa_prompt

Tree = dict[str, Any]  # of JSON or TOML

# What decides a result: another version of any of it makes another experiment.
DECIDING_CODE = (
    "config.py", "data", "distributed", "evaluation/squad.py", "evaluation/predictions.py", "generation", "models",
    "ops.py", "kernel_choice.py", "rng.py", "files.py", "text", "training",
)  # fmt: skip
DECIDING_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "scikit-learn", "scipy")


@dataclass
class Design:
    """Section [experiment].

    Attributes:
        test: The test set, a file of `load_squad` or "fictional".
        arms: What models are trained on.
        tests: The conditions that every model is tested under.
        seeds: Of order, dropout and new weights; the same ones in every arm, so that arms are compared in pairs.
        models: Name -> overrides of the run as on the command line, `"section.key" = value`; none is one model.
        grid: `"section.key" = [values]`, tried with the first seed in every arm and chosen by the validation set.
        hypotheses: In words.
        primary: The one contrast that decides, its better arm first; `arm@condition` is an arm under another condition
            than its own, `mixture@gold` and `mixture@none` among them, which has none of its own.
        metric: What decides.
        secondary: Further contrasts, corrected for their number.
        equivalence: Pairs that should not differ by more than `margin`.
        margin: In points of the metric.
        failure_loss: A run whose last training losses are above this on average has failed; 0 for no such rule.
        validation_share: Of the training questions, by article, held out for the grid and the learning curves.
        max_new_tokens: Most tokens of an answer.
        bootstrap_samples: Resamples for each interval.
        processes: That train a cell together, on this machine.
        train_articles: Of the embedded corpus, where that is the data.
        test_articles: Likewise.
    """

    test: str = FICTIONAL
    arms: list[TrainArm] = field(default_factory=lambda: ["none", "gold"])
    tests: list[TestArm] = field(default_factory=lambda: ["none", "gold"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    models: dict[str, Tree] = field(default_factory=dict)
    grid: dict[str, list] = field(default_factory=dict)
    hypotheses: list[str] = field(default_factory=list)
    primary: list[str] = field(default_factory=lambda: ["gold", "none"])
    metric: Literal["exact", "f1"] = "exact"
    secondary: list[list[str]] = field(default_factory=list)
    equivalence: list[list[str]] = field(default_factory=list)
    margin: float = 1.0
    failure_loss: float = 0.0
    validation_share: float = 0.05
    max_new_tokens: int = 32
    bootstrap_samples: int = 10_000
    processes: int = 1
    train_articles: int = 1000
    test_articles: int = 32

    def __post_init__(self) -> None:
        for name in ("arms", "tests", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"experiment.{name} is {values}, expected at least one, each once")
        own = [arm for arm in self.arms if arm not in self.tests and arm != "mixture"]
        if own:
            raise UserError(f"experiment.tests lacks {own[0]}, which is one of experiment.arms")
        sides = {arm for arm in self.arms if arm != "mixture"} | {f"{a}@{t}" for a in self.arms for t in self.tests}
        named = {"primary": [self.primary], "secondary": self.secondary, "equivalence": self.equivalence}
        for key, pairs in named.items():
            for pair in pairs:
                if len(pair) != 2 or not set(pair) <= sides:
                    raise UserError(f"experiment.{key}: {pair} is no pair of arms, or of arm@condition, of this design")
        at_least(1, experiment__max_new_tokens=self.max_new_tokens, experiment__processes=self.processes)
        at_least(2, experiment__train_articles=self.train_articles, experiment__test_articles=self.test_articles)
        if not 0 < self.validation_share < 1:
            raise UserError(f"experiment.validation_share is {self.validation_share}, expected between 0 and 1")


@dataclass(frozen=True)
class Cell:
    """One model to train: which, in which arm, with which seed, and the settings of a trial of the grid."""

    id: str
    model: str
    arm: TrainArm
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A frozen plan and the folder it lies in."""

    folder: Path
    tree: Tree

    @property
    def cells(self) -> list[Cell]:
        """The cells of the report."""
        return [Cell(**cell) for cell in self.tree["cells"]]

    @property
    def trials(self) -> list[Cell]:
        """What the grid tries before them."""
        return [Cell(**cell) for cell in self.tree["trials"]]

    def data(self, name: str) -> list[Example]:
        """Returns the questions in use of train, validation or test."""
        return load_squad(self.folder / "data" / f"{name}.json")

    def run_of(self, cell: Cell, settings: Tree) -> Tree:
        """Returns the cell's training configuration, with the chosen settings of the grid."""
        tree = with_settings(self.tree["run"], self.tree["settings"][cell.model] | settings)
        folder = self.folder.absolute()
        tree["run"] = {"name": "run", "dir": str(folder / "cells" / cell.id), "seed": cell.seed}
        tree["data"] |= {"context": cell.arm} | {n: str(folder / "data" / f"{n}.json") for n in ("train", "validation")}
        if not tree["model"]["path"] and not tree["model"]["tokenizer"]:
            tree["model"]["tokenizer"] = str(folder / "tokenizer" / cell.model)
        return tree


def with_settings(tree: Tree, settings: Tree) -> Tree:
    """Returns a copy of the sections with every `section.key` replaced."""
    copy = {section: dict(values) for section, values in tree.items()}
    for key, value in settings.items():
        section, dot, name = key.partition(".")
        if not dot or section not in copy:
            raise UserError(f"experiment: '{key}' is not a section.key of a run")
        copy[section][name] = value
    return copy


def freeze(folder: Path, design: Design, run: Tree) -> Plan:
    """Returns the plan that the folder now holds; one that is there stays, and must be of the same configuration.

    Args:
        folder: Of the experiment.
        design: What is asked.
        run: The training configuration by section, that of every cell but for arm, seed and settings.

    Raises:
        UserError: The folder holds another plan, or the data is not what the design needs.
    """
    if (folder / "plan.json").exists():
        plan = load_plan(folder)
        _check_same(plan, design, run)
        return plan
    aside = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        (aside / "data").mkdir(parents=True)
        tree = _make(aside, folder.name, design, run)
        (aside / "plan.json").write_text(
            json.dumps(tree | {"hash": tree_hash(tree)}, indent=1) + "\n", encoding="utf-8"
        )
        if (folder / "plan.json").exists():  # another machine was faster
            return freeze(folder, design, run)
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"run.dir: {folder} cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return load_plan(folder)


def load_plan(folder: Path) -> Plan:
    """Returns the plan of an experiment's folder.

    Raises:
        UserError: There is none, or it is not what was frozen.
    """
    path = folder / "plan.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no experiment is there; `babl experiment run` makes one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if tree.pop("hash", None) != (found := tree_hash(tree)):
        raise UserError(f"{path}: not what was frozen, its hash is {found[:12]} now")
    return Plan(folder, tree | {"hash": found})


def tree_hash(tree: Any) -> str:
    """Returns the sha256, in hex, of a JSON value."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def environment() -> Tree:
    """Returns the code and packages that decide a result."""
    return {
        "code": code_hash(DECIDING_CODE),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in DECIDING_PACKAGES},
    }


def view_hash(view: View) -> str:
    """Returns a short hash of what is shown and what is right."""
    return hashlib.sha256(repr(view).encode()).hexdigest()[:16]


def manifest(examples: Sequence[Example], arms: Iterable[Arm], seed: int) -> list[Tree]:
    """Returns for each question, by id, the hash of what each arm shows of it."""
    rows: dict[str, Tree] = {example.id: {"id": example.id} for example in examples}
    for arm in arms:
        for view in build_views(examples, arm, seed)[0]:
            rows[view.id][arm] = view_hash(view)
    return list(rows.values())


def _check_same(plan: Plan, design: Design, run: Tree) -> None:
    """The plan was made from this configuration, these files and this code."""
    then = plan.tree
    for key, now in _plain(_declared(plan.folder.name, design) | {"run": _template(run)}).items():
        for name, old, new in _differences(key, then[key], now):
            raise UserError(
                f"{plan.folder}: the plan is frozen with {name} {_brief(old)}, not {_brief(new)}; an experiment under "
                "another run.name can have it"
            )
    for name, sources in plan.tree["data"]["sources"].items():
        if sources["file"] != FICTIONAL and data_hash(sources["file"]) != sources["sha256"]:
            raise UserError(f"{plan.folder}: the plan is frozen with another {name} file than {sources['file']} is now")
    for name, old, new in _differences("environment", then["environment"], environment()):
        raise UserError(
            f"{plan.folder}: the plan is frozen with {name} {_brief(old)}, not {_brief(new)}; run that, or begin an "
            "experiment under another run.name"
        )


def _differences(name: str, then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields each key, with its path, whose value is another one now."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from _differences(f"{name}.{key}", then.get(key), now.get(key))
    elif then != now:
        yield name, then, now


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    """Returns the value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _template(run: Tree) -> Tree:
    """Returns the run without what each cell has of its own, or where it lies."""
    tree = with_settings(run, {})
    del tree["run"]
    return tree


def _make(folder: Path, name: str, design: Design, run: Tree) -> Tree:
    """Returns the plan; the folder holds data and tokenizers."""
    sets, sources = _load(design, run)
    tree: Tree = _declared(name, design) | {"run": _template(run)}
    runs = {name: with_settings(run, settings) for name, settings in tree["settings"].items()}
    limits = {name: _Limit(_tokenizer(folder, name, run, sets["train"]), run) for name, run in runs.items()}
    seed = run["data"]["context_seed"]
    excluded: Tree = {}
    for part, examples in sets.items():
        arms: Sequence[Arm] = design.tests if part == "test" else design.arms
        sets[part], excluded[part] = keep_buildable(examples, arms, seed, limits.values())
        _write(folder / "data" / f"{part}.json", [json.dumps(to_squad(sets[part]), ensure_ascii=False, indent=1)])
        _write(folder / "data" / f"contexts-{part}.jsonl", map(json.dumps, manifest(sets[part], arms, seed)))
    overlap = find_overlap([*sets["train"], *sets["validation"]], sets["test"])
    _write(folder / "data" / "overlap.json", [json.dumps(overlap.summary, indent=1)])
    classes = {"strict": overlap.classes, "loose": overlap.loose_classes}
    _write(folder / "data" / "classes.json", [json.dumps(classes, indent=1)])
    tree |= {
        "decoding": {key: run["data"][key] for key in ("max_source_tokens", "stride")}
        | {"max_new_tokens": design.max_new_tokens},
        "data": {
            "sources": sources,
            "sha256": {path.name: file_hash(path) for path in sorted((folder / "data").iterdir())},
            "questions": {part: len(examples) for part, examples in sets.items()},
            "articles": {part: len({e.title for e in examples}) for part, examples in sets.items()},
            "context_seed": seed,
        },
        "excluded": excluded,
        "chance_exact": chance_exact(e.answers[0].text for e in sets["test"]) if design.test == FICTIONAL else None,
        "strata": list(STRATA),
        "starts": {name: _start(runs[name], limits[name].folder) for name in runs},
        "environment": environment(),
    }
    tries = [dict(zip(design.grid, values, strict=True)) for values in itertools.product(*design.grid.values())]
    grid = itertools.product(runs, design.arms, [design.seeds[0]], tries if design.grid else [])
    tree["trials"] = [_cell(tree, "try", *cell) for cell in grid]
    tree["cells"] = [_cell(tree, "", *cell, {}) for cell in itertools.product(runs, design.arms, design.seeds)]
    return _plain(tree)


def _declared(name: str, design: Design) -> Tree:
    """Returns the design as the plan tells it."""
    tree = asdict(design)
    settings = tree.pop("models") or {"model": {}}
    contrast = {"contrast": tree.pop("primary"), "metric": tree.pop("metric")}
    return {"name": name, **tree, "primary": contrast, "models": list(settings), "settings": settings}


def _cell(tree: Tree, prefix: str, model: str, arm: str, seed: int, settings: Tree) -> Tree:
    """Returns a cell under an id that names all that decides it."""
    cell = {"model": model, "arm": arm, "seed": seed, "settings": settings}
    decide = ("run", "data", "environment", "grid", "tests", "decoding", "processes", "failure_loss")
    content = {key: tree[key] for key in decide} | {"cell": cell}
    content |= {key: tree[key][model] for key in ("settings", "starts")}
    name = "-".join(filter(None, (prefix, model, arm.replace("+", "-"), f"s{seed}", tree_hash(_plain(content))[:8])))
    return {"id": name} | cell


def _tokenizer(folder: Path, name: str, run: Tree, train: list[Example]) -> Path:
    """Returns the folder of the model's tokenizer, made from the training set where the run names none."""
    given = run["model"]["tokenizer"] or run["model"]["path"]
    if given:
        return Path(given)
    texts = (qa_prompt(e.question, e.context, _style(run)) for e in train)
    train_tokenizer(texts, run["model"]["tokenizer_size"], folder / "tokenizer" / name)
    return folder / "tokenizer" / name


def _start(run: Tree, tokenizer: Path) -> Tree:
    """Returns what a model starts from."""
    path = run["model"]["path"]
    weights = sorted(Path(path).glob("*.safetensors")) if path else []
    files = sorted(p for p in tokenizer.iterdir() if p.name in ("tokenizer.json", "tokenizer.model", "spiece.model"))
    return {
        "weights": {p.name: file_hash(p) for p in weights} or "new",
        "tokenizer": {p.name: file_hash(p) for p in files},
    }


def _style(run: Tree) -> Style:
    path = run["model"]["path"]
    family = read_config(Path(path))["model_type"] if path else run["model"]["family"]
    return "t5" if FAMILIES[family].model.is_encoder_decoder else "decoder"


def _load(design: Design, run: Tree) -> tuple[dict[str, list[Example]], Tree]:
    """Returns training, validation and test set, and where they come from."""
    if run["data"]["validation"]:
        raise UserError(
            "data.validation: an experiment makes its own of data.train; experiment.validation_share says how"
        )
    files = {"train": run["data"]["train"], "test": design.test}
    if (files["train"] == FICTIONAL) != (files["test"] == FICTIONAL):
        raise UserError(
            f"experiment.test is {files['test']!r} and data.train {files['train']!r}, expected both embedded"
        )
    if files["test"] == FICTIONAL:
        corpora = fictional_corpus(design.train_articles, design.test_articles, run["run"]["seed"])
        train, test = (parse_squad(tree, FICTIONAL) for tree in corpora)
        sources: Tree = {name: {"file": FICTIONAL} for name in files}
    else:
        reading = Reading(**{f.name: run["data"][f.name] for f in fields(Reading)})
        train, test = (load_squad(file, reading, partial(print, file=sys.stderr)) for file in files.values())
        sources = {name: {"file": file, "sha256": data_hash(file)} for name, file in files.items()}
    line = disjoint(train, test, "experiment.test", (files["train"], design.test))
    if line and design.test != FICTIONAL:  # the embedded questions are worded alike
        print(line, file=sys.stderr)
    # Contexts are drawn from other articles of the same set, so each set needs two.
    kept, held = split_by_article(train, design.validation_share, seed=0, at_least=2)
    return {"train": kept, "validation": held, "test": test}, sources


class _Limit:
    """The longest prompt a model is given."""

    def __init__(self, tokenizer: Path, run: Tree):
        self.folder, self.style, self.tokens = tokenizer, _style(run), run["data"]["max_source_tokens"]
        self.tokenizer = load_tokenizer(tokenizer)

    def exceeded(self, views: Sequence[View]) -> list[str]:
        """Returns the ids of the views whose prompts are longer."""
        prompts = [qa_prompt(view.question, view.context, self.style) for view in views]
        ids = prompt_ids(prompts, self.tokenizer, self.style)
        return [view.id for view, prompt in zip(views, ids, strict=True) if len(prompt) > self.tokens]


def keep_buildable(
    examples: list[Example], arms: Sequence[Arm], seed: int, limits: Iterable[_Limit]
) -> tuple[list[Example], dict[str, int]]:
    """Returns the questions that every arm can be built for, whole, and how many were dropped for which reason.

    Contexts are drawn from the set itself, so it is looked through again until nothing is dropped any more.
    """
    dropped: Counter[str] = Counter()
    while True:
        lost: dict[str, str] = {}
        for arm in arms:
            views, missing = build_views(examples, arm, seed, spans=True)
            for qid, reason in missing.items():
                lost.setdefault(qid, f"{arm}: {reason}")
            for limit in limits:
                for qid in limit.exceeded(views):
                    lost.setdefault(qid, f"{arm}: longer than {limit.tokens} tokens")
        if not lost:
            return examples, dict(sorted(dropped.items()))
        dropped.update(lost.values())
        examples = [example for example in examples if example.id not in lost]
        if not examples:
            raise UserError(f"no question is left that every arm can be built for: {dropped.most_common(1)[0][0]}")


def _write(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
