"""The experiment in two arms with one seed, on the embedded data: `babl demo`.

Trains one small model that sees the paragraph and one that does not, on a corpus about an invented world, tests both on
articles that neither has seen, and leaves the experiment's folder, two model folders, and report.json.
"""

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch

from babl.data.fictional import ENTITY_CANDIDATES, GRADES, chance_exact
from babl.errors import UserError
from babl.experiment.forecast import cell_seconds
from babl.experiment.plan import Plan, freeze, load_plan
from babl.models.weights import Family
from babl.scripts import experiment

CONFIG = str(Path(__file__).with_name("demo.toml"))
STEPS = 4500  # in which the model that reads has learned to tell two people apart
SIDE_BY_SIDE = 1.7  # how much longer a step takes while the other arm trains: two CPUs are often one core
RESERVE_SECONDS = 40  # for data, answers and the report
SHAPES: dict[Family, dict[str, Any]] = {
    "t5": {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_heads": 8,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "dropout_rate": 0.0,
        "scale_decoder_outputs": False,  # a small model's logits start too small with it
    },
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 8},
}


def run(out: Path, family: Family, minutes: float, seed: int) -> int:
    """Returns 0 once the report stands in `out`; what an earlier demo left there is replaced.

    Args:
        out: The folder, which becomes the experiment's.
        family: Of the models.
        minutes: The most that all of it may take, about; a slower machine trains in fewer steps, and says so.
        seed: Of data, weights and order.
    """
    started = time.perf_counter()
    if minutes < 1:
        raise UserError(f"--minutes is {minutes:g}, expected at least 1")
    _clear(out)
    overrides = [f"run.dir={out.parent}", f"run.name={out.name}", f"run.seed={seed}", f"experiment.seeds=[{seed}]"]
    overrides += [f"model.family={family}", f"model.shape={_inline(SHAPES[family])}"]
    steps, why = _affordable(overrides, minutes)
    if why:
        print(why, file=sys.stderr)
    overrides += [f"train.steps={steps}", f"train.validate_every={max(1, steps // 6)}"]
    overrides += [f"optim.warmup_steps={min(100, steps // 4)}"]
    if code := experiment.run(experiment.Request(CONFIG, overrides, jobs=2)):
        return code
    plan = load_plan(out)
    report = _report(plan, family, time.perf_counter() - started)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _print_table(report)
    if why:
        print(f"{why.partition(';')[0]}: what is above may be less than these models can learn.")
    example = next(e for e in plan.data("test") if e.grade == "type")
    print(f"""
{out / "report/report.html"} shows this with pictures. Now ask the model that reads:

  babl query {report["arms"]["gold"]["model"]} "{example.question}" \\
    --context "{example.context}"
  babl evaluate {report["arms"]["gold"]["model"]} {out / "data/test.json"} --context none
  babl serve --models {out}""")
    return 0


def _affordable(overrides: Sequence[str], minutes: float) -> tuple[int, str]:
    """Returns the steps to train, and in words why they are fewer than `STEPS`, where they are."""
    small = ["experiment.train_articles=100", "experiment.test_articles=4", "train.steps=1", "optim.warmup_steps=0"]
    _, design, template = experiment.read(CONFIG, [*overrides, *small])
    with tempfile.TemporaryDirectory() as aside:
        trial = freeze(Path(aside) / "trial", design, template)
        a_step = SIDE_BY_SIDE * cell_seconds(trial, "model", "gold", threads=max(1, (os.cpu_count() or 1) // 2))
    needed, left = RESERVE_SECONDS + STEPS * a_step, 60 * minutes
    if needed <= left:
        print(f"about {needed / 60:.0f} minutes on this machine, {STEPS:,} steps an arm", file=sys.stderr)
        return STEPS, ""
    steps = max(20, int((left - RESERVE_SECONDS) / a_step))
    return steps, (
        f"--minutes {minutes:g} allows {steps:,} steps on this machine, and learning to read takes {STEPS:,}; "
        f"--minutes {-(-needed // 60):.0f} would do"
    )


def _inline(shape: dict[str, Any]) -> str:
    """Returns a table of TOML in one line."""
    return "{" + ", ".join(tomli_w.dumps({key: value}).strip() for key, value in shape.items()) + "}"


def _report(plan: Plan, family: Family, seconds: float) -> dict[str, Any]:
    """Returns the figures of report.json, out of the experiment's; each arm's model is to be found by its name."""
    found = json.loads((plan.folder / "report" / "report.json").read_text(encoding="utf-8"))
    graded = {row["value"]: row for row in found["figures"]["strata"] if row["stratum"] == "grade"}
    arms: dict[str, Any] = {}
    for cell, side in zip(plan.cells, ("b", "a"), strict=True):  # of the primary contrast, gold minus none
        row = next(row for row in found["table"] if row["side"] == cell.arm)
        model = plan.folder / f"model-{cell.arm}"
        model.symlink_to(Path("cells") / cell.id / "run" / "checkpoints" / "latest")
        arms[cell.arm] = {
            "exact": row["exact"],
            "f1": row["f1"],
            "interval": None if row["exact_low"] is None else [row["exact_low"], row["exact_high"]],
            "grades": {grade: graded[grade][side] for grade in GRADES},
            "model": str(model),
        }
    golds = [(example.grade, example.answers[0].text) for example in plan.data("test")]
    return {
        "family": family,
        "arms": arms,
        "chance_exact": plan.tree["chance_exact"],
        "chance_grades": {grade: chance_exact(text for g, text in golds if g == grade) for grade in GRADES},
        "between_candidates": 100 / ENTITY_CANDIDATES,
        "difference": arms["gold"]["exact"] - arms["none"]["exact"],
        "train_questions": plan.tree["data"]["questions"]["train"],
        "dev_questions": plan.tree["data"]["questions"]["test"],
        "articles": plan.tree["data"]["articles"]["test"],
        "steps": plan.tree["run"]["train"]["steps"],
        "seed": plan.cells[0].seed,
        "seconds": round(seconds, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "torch": torch.__version__,
    }


def _print_table(report: dict[str, Any]) -> None:
    print(f"\n{'arm':<8}{'EM':>7}  {'EM, 95 % interval':^17}{'F1':>7}" + "".join(f"{f'EM {g}':>11}" for g in GRADES))
    for name, arm in report["arms"].items():
        interval = "{:.1f} to {:.1f}".format(*arm["interval"]) if arm["interval"] else "–"  # – where there is none
        grades = "".join(f"{arm['grades'][grade]:>11.1f}" for grade in GRADES)
        print(f"{name:<8}{arm['exact']:>7.1f}  {interval:^17}{arm['f1']:>7.1f}{grades}")
    chance = "".join(f"{report['chance_grades'][grade]:>11.1f}" for grade in GRADES)
    print(f"{'chance':<8}{report['chance_exact']:>7.1f}  {'':^17}{'':>7}{chance}")
    questions = f"{report['dev_questions']} questions of {report['articles']} unseen articles"
    print(f"{questions}; {report['steps']:,} steps an arm, {report['seconds']:.0f} seconds")


def _clear(out: Path) -> None:
    """Removes an earlier demo, and nothing else."""
    if out.exists() and not (out / "data" / "train.json").exists() and any(out.iterdir()):
        raise UserError(f"--out: {out} holds something that is not a demo; choose an empty or a new folder")
    try:
        if out.exists():
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror})") from None
