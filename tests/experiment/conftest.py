"""A small experiment whose truth is known, as its folder would stand after the run: written, not trained."""

import copy
import hashlib
import json
import random
import shutil

import pytest

from babl.data.contexts import build_views
from babl.data.fictional import chance_exact, fictional_corpus
from babl.data.overlap import find_overlap
from babl.data.squad import load_squad, parse_squad, to_squad
from babl.evaluation.squad import score
from babl.experiment.plan import tree_hash
from babl.experiment.report import write_report
from babl.experiment.strata import STRATA
from babl.files import file_hash

MODEL = "tiny-t5"
ARMS = ("none", "random", "gold")
TESTS = ("none", "random", "gold", "counterfactual")
SEEDS = (0, 1, 2)
READS = 0.9  # share of the questions that the gold arm answers from the context


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def buildable(examples):
    """The questions for which every condition can be built, and how many are left out, by reason."""
    excluded: dict[str, int] = {}
    while True:
        missing = {}
        for condition in TESTS:
            missing |= build_views(examples, condition, 0)[1]
        if not missing:
            return examples, excluded
        for reason in missing.values():
            excluded[reason] = excluded.get(reason, 0) + 1
        examples = [e for e in examples if e.id not in missing]


def answer(arm, condition, example, view, others, rng):
    """What a model of that arm says: the context's answer, where it reads one, else a guess at its chance level."""
    if arm == "gold" and condition in ("gold", "counterfactual"):
        right, level = view.golds[0], READS
    else:
        right, level = example.answers[0].text, chance_exact([example.answers[0].text]) / 100
    return right if rng.random() < level else rng.choice([text for text in others if text not in (right, *view.golds)])


class Experiment:
    """Writes the folder, piece by piece.

    `says(arm, example, view, rng)` may be set, and is what the models answer then.
    """

    def __init__(self, folder, dev_articles=15, seeds=SEEDS, metric="exact"):
        self.folder, self.says = folder, None
        train, dev = fictional_corpus(8, dev_articles, seed=3)
        self.test, excluded = buildable(parse_squad(dev, "dev")[::3])
        write(folder / "data" / "train.json", train)
        write(folder / "data" / "test.json", to_squad(self.test))
        overlap = find_overlap(parse_squad(train, "train"), self.test)
        write(folder / "data" / "overlap.json", overlap.summary)
        write(folder / "data" / "classes.json", {"strict": overlap.classes, "loose": overlap.loose_classes})
        self.cells = [
            {"id": f"{arm}-{seed}", "model": MODEL, "arm": arm, "seed": seed, "settings": {}}
            for arm in ARMS
            for seed in seeds
        ]
        self.plan = {
            "name": "known truth",
            "hypotheses": ["The context helps.", "Another article's text does not."],
            "primary": {"contrast": ["gold", "none"], "metric": metric},
            "secondary": [["gold", "random"]],
            "equivalence": [["random", "none"]],
            "margin": 1.0,
            "models": [MODEL],
            "arms": list(ARMS),
            "tests": list(TESTS),
            "seeds": list(seeds),
            "grid": {},
            "trials": [],
            "strata": list(STRATA),
            "failure_loss": None,
            "bootstrap_samples": 200,
            "decoding": {"max_new_tokens": 16},
            "data": {
                "sha256": {path.name: file_hash(path) for path in sorted((folder / "data").iterdir())},
                "context_seed": 0,
            },
            "excluded": {"train": {}, "test": excluded},
            "chance_exact": chance_exact(e.answers[0].text for e in self.test),
            "cells": self.cells,
        }
        self.freeze()

    def freeze(self):
        write(self.folder / "plan.json", self.plan | {"hash": tree_hash(self.plan)})

    def cell(self, cell):
        return self.folder / "cells" / cell["id"]

    def train(self, cell, failed=None):
        seed = cell["seed"]
        points = [
            {
                "step": s,
                "examples": 32 * s,
                "tokens": 900 * s,
                "flops": 10**9 * s,
                "validation_loss": 3 / (1 + s) + seed / 20,
            }
            for s in range(0, 50, 10)
        ]
        trained = {"failed": failed, "weights": hashlib.sha256(cell["id"].encode()).hexdigest(), "parameters": 12345}
        trained |= points[-1] | {"steps": 40, "final_loss": 0.25, "order": f"order of seed {seed}"}
        trained |= {"curve": points, "chosen": {"optim.lr": 0.001}}
        write(self.cell(cell) / "trained.json", trained)
        write(self.cell(cell) / "seconds.json", {"train": 12.5, "predict": 3.25})

    def predict(self, cell, condition):
        path = self.cell(cell) / "predictions" / f"{condition}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = random.Random(f"{cell['id']}/{condition}")
        answers = sorted({e.answers[0].text for e in load_squad(self.folder / "data" / "train.json")})
        lines = [{"key": f"{cell['id']}/{condition}"}]
        golds = {}
        for example, view in zip(self.test, build_views(self.test, condition, 0)[0], strict=True):
            text = (
                self.says(cell["arm"], example, view, rng)
                if self.says
                else answer(cell["arm"], condition, example, view, answers, rng)
            )
            sure = -0.1 if text == view.golds[0] else -1.5
            lines.append({"id": view.id, "prediction": text, "log_prob": sure - rng.random()})
            lines[-1] |= {
                "tokens": len(text.split()) + 1,
                "complete": rng.random() < 0.98,
                "windows": 1,
                "no_answer": None,
            }
            golds[view.id] = view.golds
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        qas = [{"id": qid, "answers": [{"text": gold} for gold in of]} for qid, of in golds.items()]
        dataset = {"data": [{"title": "", "paragraphs": [{"qas": qas}]}]}
        found = score(dataset, {line["id"]: line["prediction"] for line in lines[1:]})
        return {
            "exact": found["exact_match"],
            "f1": found["f1"],
            "total": found["total"],
            "predictions": file_hash(path),
        }

    def finish(self, cell):
        self.train(cell)
        write(self.cell(cell) / "scored.json", {condition: self.predict(cell, condition) for condition in TESTS})

    def report(self):
        """Finishes every cell and returns the report's figures and its texts by the name of the file."""
        for cell in self.cells:
            self.finish(cell)
        write_report(self.folder)
        texts = {path.name: path.read_text() for path in (self.folder / "report").iterdir()}
        return json.loads(texts["report.json"]), texts


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """A function that freezes an experiment of the options of `Experiment`, no cell done."""
    return lambda **options: Experiment(tmp_path_factory.mktemp("experiment"), **options)


@pytest.fixture
def experiment(make):
    """An experiment's folder with a frozen plan and no cell done."""
    return make()


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """An experiment with all cells done and its report written; not to be changed."""
    these = Experiment(tmp_path_factory.mktemp("reported"))
    for cell in these.cells:
        these.finish(cell)
    write_report(these.folder)
    return these


@pytest.fixture
def finished(reported, tmp_path):
    """A copy with all cells done, without a report."""
    these = copy.deepcopy(reported)
    these.folder = tmp_path / "experiment"
    shutil.copytree(reported.folder, these.folder, ignore=shutil.ignore_patterns("report"))
    return these
