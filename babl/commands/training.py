"""The verbs that train, `demo`, `train`, `experiment` and `verify`; `runs` and `plot`, which look at runs."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from babl.commands.options import Verbs, add_kernels, add_verb


def add_demo(verbs: Verbs) -> None:
    """Adds `babl demo`."""
    sub = add_verb(verbs, "demo", demo, "embedded data: a model with and one without the context, compared in a report")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default runs/demo")
    sub.add_argument("--family", choices=("t5", "llama", "bloom"), default="t5")
    sub.add_argument("--minutes", type=float, default=15.0, help="the most it may take, about (default 15)")
    sub.add_argument("--seed", type=int, default=0)


def demo(args: argparse.Namespace) -> int:
    """Runs scripts/demo.py."""
    from babl.scripts.demo import run

    return run(args.out, args.family, args.minutes, args.seed)


def add_train(verbs: Verbs) -> None:
    """Adds `babl train`."""
    sub = add_verb(verbs, "train", train, "train as the configuration says")
    sub.add_argument("config", metavar="CONFIG.toml")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_kernels(sub)


def train(args: argparse.Namespace) -> int:
    """Runs scripts/train.py."""
    from babl.scripts.train import main as train_main

    return train_main([args.config, *args.overrides])


def add_experiment(verbs: Verbs) -> None:
    """Adds `babl experiment`."""
    sub = add_verb(
        verbs, "experiment", experiment, "a frozen grid of models, trained, tested and compared: does the context help?"
    )
    sub.add_argument("action", choices=("run", "report", "verify"), help="verify: is everything what was computed?")
    sub.add_argument("config", metavar="CONFIG.toml")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    sub.add_argument("--dry-run", action="store_true", help="print cells, work, time, disk and power; train nothing")
    sub.add_argument("--only", metavar="CELL", help="one cell, by id or number, and no report")
    sub.add_argument("--jobs", type=int, metavar="N", help="cells at once (default one a CPU, or one with a GPU)")
    sub.add_argument(
        "--limit-minutes", type=float, metavar="M", help="then leave with exit code 75; run it again to go on"
    )


def experiment(args: argparse.Namespace) -> int:
    """Runs scripts/experiment.py."""
    from babl.scripts import experiment as program

    if args.action == "report":
        return program.report(args.config, args.overrides)
    if args.action == "verify":
        return program.verify(args.config, args.overrides)
    if args.dry_run:
        return program.dry_run(args.config, args.overrides)
    return program.run(program.Request(args.config, args.overrides, args.only, args.jobs, args.limit_minutes))


def add_verify(verbs: Verbs) -> None:
    """Adds `babl verify`."""
    sub = add_verb(verbs, "verify", verify, "prove that a training script, edited or not, still does what it should")
    sub.add_argument("script", nargs="?", type=Path, metavar="SCRIPT", help="default Babl's own loop")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="given to the script")
    sub.add_argument("--self", action="store_true", dest="itself", help="against itself: any loss, any optimizer")
    sub.add_argument("--fixed", action="append", default=[], metavar="PATTERN", help="these parameters do not move")
    sub.add_argument(
        "--rate",
        action="append",
        default=[],
        metavar="PATTERN=FACTOR",
        help="their share of the learning rate",
    )
    sub.add_argument("--base", type=Path, metavar="SCRIPT", help="the loop without the rates of --rate (with --self)")
    sub.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="a logged number that depends on splits"
    )
    sub.add_argument("--family", choices=("t5", "llama", "bloom"), help="run the script with this one alone")
    sub.add_argument("--quick", action="store_true", help="plain DDP alone, on one rank and on two")
    sub.add_argument("--json", action="store_true")


def verify(args: argparse.Namespace) -> int:
    """Runs scripts/verify."""
    from babl.scripts.verify.edit import summary
    from babl.scripts.verify.program import LOOP, Request, chosen_cases, prove
    from babl.scripts.verify.statements import parse
    from babl.scripts.verify.table import show

    script, said = args.script or LOOP, parse(args.fixed, args.rate)
    cases, after = chosen_cases(args.quick, args.family)
    request = Request(
        script, cases, after, watch=True, itself=args.itself, said=said, base=args.base or LOOP,
        ignored=args.ignore, overrides=args.overrides,
    )  # fmt: skip
    rows = prove(request)
    return show(str(script), rows, args.json, summary(rows))


def add_runs(verbs: Verbs) -> None:
    """Adds `babl runs`."""
    sub = add_verb(verbs, "runs", runs, "the runs here: state, step, losses, time left")
    sub.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="default runs")
    sub.add_argument("--json", action="store_true")


def runs(args: argparse.Namespace) -> None:
    """Prints a line for each run."""
    from babl.training.runs import find_runs

    found = find_runs(args.folder)
    if args.json:
        print(json.dumps([asdict(row) for row in found], indent=2))
        return
    width = max((len(row.name) for row in found), default=0)
    for row in found:
        told = f"{row.name:<{width}}  {row.state:<8} step {row.step:,} of {row.steps:,}"
        told += "" if row.loss is None else f", loss {row.loss:.4f}"
        if row.best_validation_loss is not None:
            told += f", best validation loss {row.best_validation_loss:.4f} at step {row.best_step:,}"
        if row.state == "running" and row.seconds_left is not None:
            told += f", about {row.seconds_left / 60:.0f} minutes left"
        print(told)
    if not found:
        print(f"no run in {args.folder}; `babl train CONFIG.toml` begins one", file=sys.stderr)


def add_plot(verbs: Verbs) -> None:
    """Adds `babl plot`."""
    sub = add_verb(verbs, "plot", plot, "the curves of runs, side by side in one HTML file")
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    sub.add_argument("--out", type=Path, default=Path("plot.html"), metavar="FILE.html", help="default plot.html")


def plot(args: argparse.Namespace) -> None:
    """Writes the file and prints its name."""
    from babl.training.runs import plot_runs

    plot_runs(args.runs, args.out)
    print(args.out)
