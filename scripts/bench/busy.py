"""A training step alone and beside a busy process, by how its threads wait for each other."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from babl.data.collate import Feature, collate
from babl.data.loader import dropout_keys
from babl.models.t5 import T5, T5Config
from babl.scripts.demo import SHAPES
from babl.training.loss import token_loss
from babl.training.optimizer import OptimConfig, make_optimizer

WAITING = {"spinning, then asleep (libgomp's default)": "", "asleep": "PASSIVE"}  # OMP_WAIT_POLICY
EXAMPLES, SOURCE, TARGET, VOCABULARY = 24, 60, 3, 800
WARM_UP = 5


def add(jobs: Any) -> None:
    """Adds the job, and what it starts."""
    job = jobs.add_parser("busy", help="a training step of all cores alone and beside a busy process")
    job.add_argument("--repeats", type=int, default=5, metavar="N")
    job.add_argument("--steps", type=int, default=30, metavar="N", help="timed ones of a turn")
    job.set_defaults(run=lambda a: busy(a.repeats, a.steps))
    job = jobs.add_parser("steps-of")  # what `busy` starts
    job.add_argument("--steps", type=int)
    job.set_defaults(run=lambda a: print(json.dumps(_steps(a.steps))))


def busy(repeats: int, steps: int) -> list[dict[str, Any]]:
    """Returns a row for each way of waiting and company: the median of the turns' milliseconds a step."""
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for beside in ("nothing", "a busy process"):
            for name, policy in WAITING.items():
                with _company(beside != "nothing"):
                    found.setdefault((name, beside), []).append(1000 * statistics.median(_turn(policy, steps)))
    alone = statistics.median(found[next(iter(WAITING)), "nothing"])
    rows = []
    for (name, beside), turns in found.items():
        ms = statistics.median(turns)
        rows.append({"threads wait": name, "beside": beside, "ms per step": ms, "ratio": ms / alone, "turns": turns})
    return rows


@contextmanager
def _company(wanted: bool) -> Iterator[None]:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if other:
            other.kill()
            other.wait()


def _turn(policy: str, steps: int) -> list[float]:
    """Returns the seconds of each step of a fresh process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    command = [sys.executable, "-m", "babl.scripts.bench", "steps-of", "--steps", str(steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout)


def _steps(steps: int) -> list[float]:
    torch.set_flush_denormal(True)
    model = T5(T5Config(vocab_size=VOCABULARY, **SHAPES["t5"]))
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = make_optimizer(model.train(), OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    draw = partial(torch.randint, 3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    features = [Feature(str(i), draw((SOURCE,)).tolist(), draw((TARGET,)).tolist()) for i in range(EXAMPLES)]
    batch = collate(features, 0, dropout_keys(0, 1, range(EXAMPLES)))
    times = []
    for _ in range(WARM_UP + steps):
        begun = time.perf_counter()
        (token_loss(model, batch) / batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
    return times[WARM_UP:]
