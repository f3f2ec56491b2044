"""The central experiment, from a frozen plan to a report: `babl experiment run|report|verify CONFIG.toml`.

A configuration is that of a training run (scripts/train.py) with a section [experiment] (babl/experiment/plan.py) on
top. `run` freezes the plan, trains every model of the grid in a process of its own, tests each under every condition,
and writes the report. Killed at any point, it goes on where it was; so does the same command on another machine that
sees the folder, beside this one.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from babl.config import build_config, load_config
from babl.distributed.failure import EXIT_PREEMPTED
from babl.errors import UserError, did_you_mean
from babl.experiment.forecast import forecast
from babl.experiment.plan import Cell, Design, Plan, freeze, load_plan, with_settings
from babl.experiment.report import write_report
from babl.experiment.run import Busy, CellError, Left, is_done, last_step, run_cell
from babl.experiment.verify import mismatches
from babl.scripts.train import TrainConfig
from babl.training.preemption import asked_to_leave

WAIT_SECONDS = 1.0


@dataclass
class ExperimentConfig(TrainConfig):
    """A training run, and what is asked of many of them."""

    experiment: Design = field(default_factory=Design)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batch.examples:
            raise UserError(
                "batch.examples is 0, expected a number: arms must see the same questions in the same steps"
            )


@dataclass(frozen=True)
class Request:
    """What the command line asks of `run`.

    Attributes:
        config: A TOML file.
        overrides: `section.key=value`.
        only: One cell, by its id or its number in the plan; no report is written.
        jobs: Cells at once on this machine; None for one a CPU, no more than there are, or one where there is a GPU,
            which a cell fills.
        limit_minutes: After which no further work is begun, and trainings save and leave.
    """

    config: str
    overrides: Sequence[str] = ()
    only: str | None = None
    jobs: int | None = None
    limit_minutes: float | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"--jobs is {self.jobs}, expected at least 1")
        if self.limit_minutes is not None and not self.limit_minutes > 0:
            raise UserError(f"--limit-minutes is {self.limit_minutes:g}, expected more than 0")


def run(request: Request) -> int:
    """Returns 0 once every cell is done and the report is written, 75 where work is left, 1 where a cell broke."""
    deadline = None if request.limit_minutes is None else time.monotonic() + 60 * request.limit_minutes
    plan = freeze(*read(request.config, request.overrides))
    crowded = torch.cuda.is_available() or plan.tree["processes"] > 1
    jobs = request.jobs or (1 if crowded else min(os.cpu_count() or 1, len(plan.cells)))
    with asked_to_leave() as asked:

        def leave() -> bool:
            return asked() or (deadline is not None and time.monotonic() > deadline)

        if request.only is not None:
            return one_by_one(plan, with_trials(plan, find_cell(plan, request.only)), leave)
        for cells in (plan.trials, plan.cells):  # what the grid chooses must be known before the cells
            code = side_by_side(request, jobs, plan, cells, leave) if jobs > 1 else one_by_one(plan, cells, leave)
            if code:
                return code
    return report(request.config, request.overrides)


def report(config: str, overrides: Sequence[str]) -> int:
    """Returns 0 once the report of what is done so far is written."""
    folder, _, _ = read(config, overrides)
    load_plan(folder)
    write_report(folder)
    print(folder / "report" / "report.html")
    return 0


def verify(config: str, overrides: Sequence[str]) -> int:
    """Returns 0 where every hash and score of the experiment is what it was, else 1; a line tells each mismatch."""
    folder, _, _ = read(config, overrides)
    plan = load_plan(folder)
    found = mismatches(plan)
    for line in found:
        print(line)
    done = sum(is_done(plan, cell) for cell in plan.cells)
    print(f"{done} of {len(plan.cells)} cells done, {len(found)} mismatches", file=sys.stderr)
    return 1 if found else 0


def dry_run(config: str, overrides: Sequence[str]) -> int:
    """Prints the cells, and what they will take; freezes nothing."""
    folder, design, template = read(config, overrides)
    with tempfile.TemporaryDirectory() as aside:
        plan = freeze(Path(aside) / folder.name, design, template)
        for number, cell in enumerate(plan.cells):
            print(f"{number:>4}  {cell.id}")
        for line in forecast(plan):
            print(line)
    return 0


def read(config: str, overrides: Sequence[str]) -> tuple[Path, Design, dict[str, Any]]:
    """Returns the experiment's folder, its design, and the training configuration of its cells."""
    cfg = load_config(ExperimentConfig, config, overrides)
    template = asdict(cfg)
    del template["experiment"]
    design = cfg.experiment
    tried = [(f"grid.{key}", {key: value}) for key, values in design.grid.items() for value in values]
    for name, settings in [*((f"models.{name}", settings) for name, settings in design.models.items()), *tried]:
        build_config(TrainConfig, with_settings(template, settings), f"{config}: experiment.{name}")
    return Path(cfg.run.dir) / cfg.run.name, design, template


def find_cell(plan: Plan, only: str) -> Cell:
    """Returns the cell of this id or number."""
    cells = {cell.id: cell for cell in (*plan.cells, *plan.trials)}
    if only.isdecimal() and int(only) < len(plan.cells):
        return plan.cells[int(only)]
    if only not in cells:
        raise UserError(
            f"--only is {only!r}, expected a cell's id or its number from 0 to {len(plan.cells) - 1}"
            f"{did_you_mean(only, cells)}"
        )
    return cells[only]


def with_trials(plan: Plan, cell: Cell) -> list[Cell]:
    """Returns the cell, after the trials that its settings are chosen from."""
    trials = [t for t in plan.trials if (t.model, t.arm) == (cell.model, cell.arm)] if not cell.settings else []
    return [*trials, cell]


def one_by_one(plan: Plan, cells: Sequence[Cell], leave: Callable[[], bool]) -> int:
    """Returns the exit code once all cells are done, by this process or by another one that has them."""
    left, code = list(cells), 0
    while left := [cell for cell in left if not is_done(plan, cell)]:
        for cell in list(left):
            if leave():
                return EXIT_PREEMPTED
            try:
                run_cell(plan, cell, leave, say)
            except Busy:
                continue
            except Left:
                return EXIT_PREEMPTED
            except CellError as error:
                say(f"experiment: {error}")
                left.remove(cell)
                code = 1
        time.sleep(WAIT_SECONDS if any(not is_done(plan, cell) for cell in left) else 0)
    return code


def side_by_side(request: Request, jobs: int, plan: Plan, cells: Sequence[Cell], leave: Callable[[], bool]) -> int:
    """Returns the exit code once all cells are done, each by a process of its own, `jobs` at a time."""
    waiting = [cell for cell in cells if not is_done(plan, cell)]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "babl.cli", "experiment", "run", request.config, *request.overrides, "--only"]
    running: list[subprocess.Popen] = []
    codes = {0}
    steps = sum(plan.run_of(cell, {})["train"]["steps"] for cell in cells)
    bar = tqdm(total=steps, desc="training", unit="step", mininterval=1.0)
    try:
        while waiting or running:
            while waiting and len(running) < jobs and not leave():
                running.append(subprocess.Popen([*command, waiting.pop(0).id], env=environment))
            time.sleep(0.1)
            if leave():
                waiting = []
                codes.add(EXIT_PREEMPTED)
                for process in running:
                    process.terminate()
            codes |= {process.returncode for process in running if process.poll() is not None}
            running = [process for process in running if process.returncode is None]
            _show_progress(bar, plan, cells)
    finally:
        bar.close()
        for process in running:
            process.terminate()
            process.wait()
    return EXIT_PREEMPTED if codes == {0, EXIT_PREEMPTED} else int(codes != {0})


def _show_progress(bar: tqdm, plan: Plan, cells: Sequence[Cell]) -> None:
    """Shows how many steps of all cells are done, and the last loss of those that are being trained."""
    logged = [(cell, *last_step(plan, cell)) for cell in cells]
    training = [(cell, loss) for cell, step, loss in logged if step and not is_done(plan, cell)]
    bar.set_postfix({f"{cell.arm} loss": f"{loss:.2f}" for cell, loss in training}, refresh=False)
    bar.update(sum(step for _, step, _ in logged) - bar.n)


def say(line: str) -> None:
    """Prints a line to stderr."""
    print(line, file=sys.stderr, flush=True)
