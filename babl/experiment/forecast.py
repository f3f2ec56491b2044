"""What an experiment will take, and what it can find: work, time, disk and power, before anything is frozen."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from babl.data.collate import make_features
from babl.data.contexts import TestArm, TrainArm, build_views
from babl.errors import UserError
from babl.evaluation.predictions import CHUNK, PromptLimits, predict
from babl.evaluation.statistics import expected_standard_error, minimal_detectable_effect, too_few, widest_scope
from babl.experiment.figures import SHORT
from babl.experiment.plan import Cell, Plan
from babl.experiment.run import multiplying_weights, training_flops
from babl.generation import Engine

TRIAL_STEPS, WARM_UP_STEPS = 20, 5
SAMPLE = 2000  # training questions whose lengths stand for all
SEED_SD = 0.34  # EM points between seeds, as published for T5 (Raffel et al. 2020, table 1)
DISCORDANT, ICC = (0.05, 0.5), (0.01, 0.05)


@dataclass(frozen=True)
class Trial:
    """What a few steps of a model have shown.

    Attributes:
        tokens_per_second: Of training.
        questions_per_second: Of answering, under the gold context where it is tested.
        weights: Of `multiplying_weights`.
        disk: Bytes of a checkpoint.
        engine: Of the trial's model.
    """

    tokens_per_second: float
    questions_per_second: float
    weights: tuple[int, int]
    disk: int
    engine: Engine


def cell_seconds(plan: Plan, model: str, arm: TrainArm, threads: int) -> float:
    """Returns the seconds that training one of the plan's cells takes on so many threads, if nothing else runs."""
    trial = try_model(plan, model, threads)
    tokens, _ = _lengths(plan, trial.engine, arm)
    examples = plan.tree["run"]["train"]["steps"] * plan.tree["run"]["batch"]["examples"]
    return tokens * examples / trial.tokens_per_second


def forecast(plan: Plan) -> Iterator[str]:
    """Yields lines that tell what the plan's cells will take here, one after another, and what they can find.

    Each model is trained for a few steps, and asked a few questions, to learn how fast it is here.
    """
    examples = plan.tree["run"]["train"]["steps"] * plan.tree["run"]["batch"]["examples"]
    kept = plan.tree["run"]["train"]["keep_last"] + 1
    questions, conditions = plan.tree["data"]["questions"]["test"], len(plan.tree["tests"])
    per_arm = Counter((cell.model, cell.arm) for cell in (*plan.trials, *plan.cells))
    seconds, disk, flops = 0.0, 0, 0
    yield f"\n{'model':<12} {'arm':<18} {'cells':>5} {'tokens/example':>15} {'FLOPs/cell':>11} {'minutes/cell':>13}"
    for model in plan.tree["models"]:
        trial = try_model(plan, model)
        for arm in plan.tree["arms"]:
            cells = per_arm[model, arm]
            tokens, targets = _lengths(plan, trial.engine, arm)
            work = training_flops(trial.weights, int(tokens * examples), int(targets * examples))
            took = tokens * examples / trial.tokens_per_second + questions * conditions / trial.questions_per_second
            yield f"{model:<12} {arm:<18} {cells:>5} {tokens:>15.1f} {work:>11.2e} {took / 60:>13.1f}"
            seconds, disk, flops = seconds + cells * took, disk + cells * kept * trial.disk, flops + cells * work
    yield f"\n{len(plan.cells)} cells and {len(plan.trials)} trials of the grid: {flops:.2e} FLOPs"
    yield f"about {seconds / 60:.0f} minutes one after another on this machine, and at most {disk / 2**20:.0f} MiB"
    yield f"{plan.tree['data']['questions']} questions of {plan.tree['data']['articles']} articles"
    for part, reasons in plan.tree["excluded"].items():
        for reason, number in reasons.items():
            yield f"  dropped from every arm, {part}: {number} ({reason})"
    yield from _power(plan)


def try_model(plan: Plan, model: str, threads: int | None = None) -> Trial:
    """Returns how fast a model trains and answers here.

    Args:
        plan: Whose settings it has.
        model: One of the plan's.
        threads: That train it; None for as many as torch takes.

    Raises:
        UserError: It does not train.
    """
    arm, _, _ = plan.tree["primary"]["contrast"][0].partition("@")
    run = plan.run_of(Cell("trial", model, arm, 0), {})
    run["train"] |= {"steps": TRIAL_STEPS, "validate_every": 0, "save_every": 0}
    with tempfile.TemporaryDirectory() as aside:
        run["run"] = {"name": "run", "dir": aside, "seed": 0}
        config = Path(aside) / "trial.toml"
        config.write_bytes(tomli_w.dumps(run).encode())
        command = [sys.executable, "-m", "babl.scripts.train", str(config)]
        environment = os.environ if threads is None else os.environ | {"OMP_NUM_THREADS": str(threads)}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode:
            raise UserError(f"model {model} does not train: {result.stderr.strip().splitlines()[-1]}")
        folder = Path(aside) / "run" / "checkpoints" / "latest"
        log = (Path(aside) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        speeds = [line["tokens_per_second"] for line in map(json.loads, log) if "loss" in line]
        engine = Engine.load(folder)
        condition: TestArm = arm if arm in plan.tree["tests"] else "gold"
        views = build_views(plan.data("test"), condition, plan.tree["data"]["context_seed"])[0][:CHUNK]
        begun = time.perf_counter()
        predict(engine, views, PromptLimits(**plan.tree["decoding"]), progress=False)
        return Trial(
            statistics.median(speeds[WARM_UP_STEPS:]),
            len(views) / (time.perf_counter() - begun),
            multiplying_weights(folder),
            sum(path.stat().st_size for path in folder.iterdir()),
            engine,
        )


def _lengths(plan: Plan, engine: Engine, arm: TrainArm) -> tuple[float, float]:
    """Returns the mean tokens of an example, source and target together, and of its target."""
    examples = plan.data("train")[:SAMPLE]
    views, _ = build_views(examples, arm, plan.tree["data"]["context_seed"])
    data = plan.tree["decoding"]
    features, _ = make_features(views, engine.tokenizer, data["max_source_tokens"], data["stride"], engine.style)
    return (
        sum(len(f.source) + len(f.target) for f in features) / len(features),
        sum(len(f.target) for f in features) / len(features),
    )


def _power(plan: Plan) -> Iterator[str]:
    """Yields the smallest differences that this many seeds, articles and questions find."""
    sizes = list(Counter(example.title for example in plan.data("test")).values())
    seeds, metric = len(plan.tree["seeds"]), plan.tree["primary"]["metric"]
    unit = f"{SHORT[metric]} points"
    if reason := too_few(sizes):
        yield f"\nno difference in {unit} can be told: {reason}"
        return
    scope = widest_scope(seeds, len(sizes))
    about = "new seeds and new articles" if scope == "seeds and articles" else "new articles alone, for these models"
    yield f"\nsmallest difference in {unit} that {seeds} seed{'s' if seeds > 1 else ''} and {len(sizes)} articles find"
    given = f"(power .8, level .05, over {about})"
    if scope == "seeds and articles":
        given += f",\nif seeds differ by an SD of {SEED_SD} {unit} in each arm, as published for EM"
    if metric == "f1":
        given += ",\ntaking each difference in F1 as all or nothing, so at most"
    yield f"{given}:"
    for discordant in DISCORDANT:
        for icc in ICC:
            total = discordant * 100**2  # the variance of a difference that is -100, 0 or 100
            parts = {"seed": 2 * SEED_SD**2, "article": icc * total, "question": total * (1 - icc) / 2}
            error, df = expected_standard_error(parts | {"residual": total * (1 - icc) / 2}, seeds, sizes)
            least = minimal_detectable_effect(error, df=df)
            yield (
                f"  arms that disagree on {discordant:.0%} of the questions, ICC of articles {icc}: {least:.1f} {unit}"
            )
