"""A training step of each backend beside DDP."""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from tqdm import tqdm

from babl.data.collate import Feature, collate
from babl.data.loader import dropout_keys
from babl.distributed.backend import DistributedConfig, make_backend
from babl.distributed.env import world
from babl.models.t5 import T5, T5Config
from babl.training.loss import token_loss
from babl.training.optimizer import OptimConfig, make_optimizer

RANKS, ACCUMULATION = 2, 2
RANK_EXAMPLES, SOURCE, TARGET = 4, 128, 16  # of a rank's micro-batch: how many, and tokens of each
WARM_UP = 2  # steps: the first makes the optimizer's state
BACKENDS: tuple[str, ...] = get_args(get_type_hints(DistributedConfig)["backend"])


def add(jobs: Any) -> None:
    """Adds the job."""
    job = jobs.add_parser("backends", help="a training step of each backend beside DDP, on two ranks of CPUs")
    job.add_argument("--repeats", type=int, default=3, metavar="N")
    job.add_argument("--steps", type=int, default=6, metavar="N", help="timed ones of a turn")
    job.set_defaults(run=lambda a: backends(a.repeats, a.steps))
    job = jobs.add_parser("rank-of")  # what `backends` starts
    job.add_argument("backend", choices=BACKENDS)
    job.add_argument("--steps", type=int)
    job.set_defaults(run=lambda a: _rank(a.backend, a.steps, a.out))


def backends(repeats: int, steps: int) -> list[dict[str, Any]]:
    """Returns a row for each backend: milliseconds a step, beside plain DDP, peak memory of a rank, time to start."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in BACKENDS}
    order = [name for _ in range(repeats) for name in BACKENDS]
    for name in tqdm(order, desc="turns", leave=False):
        turns[name].append(_turn(name, steps))
    rows = []
    for name, found in turns.items():
        ratios = [turn["ms"] / ddp["ms"] for turn, ddp in zip(found, turns["ddp"], strict=True)]
        row = {"backend": name, "ms per step": statistics.median(turn["ms"] for turn in found)}
        row |= {"beside ddp": statistics.median(ratios), "peak MiB": statistics.median(t["MiB"] for t in found)}
        rows.append(row | {"start s": statistics.median(turn["start"] for turn in found), "turns": found})
    return rows


def _turn(name: str, steps: int) -> dict[str, Any]:
    """Returns what rank 0 of a fresh world has measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "turn.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
        command = [*torchrun, "-m", "babl.scripts.bench", "rank-of", name, "--steps", str(steps), "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(out.read_text(encoding="utf-8"))


def _rank(name: str, steps: int, out: Path) -> None:
    """One rank of a world trains; rank 0 writes the median of its steps."""
    torch.set_flush_denormal(True)
    with world() as me:
        begun = time.perf_counter()
        model = T5(T5Config())
        model.init_weights(torch.Generator().manual_seed(0))
        backend = make_backend(DistributedConfig(backend=name), me, bf16=False)  # type: ignore[arg-type]
        backend.setup(model.train(), partial(make_optimizer, cfg=OptimConfig()))
        me.barrier()
        start = time.perf_counter() - begun
        generator = torch.Generator().manual_seed(me.rank)
        draw = partial(torch.randint, 3, model.config.vocab_size, generator=generator)
        features = [Feature(str(i), draw((SOURCE,)).tolist(), draw((TARGET,)).tolist()) for i in range(RANK_EXAMPLES)]
        times = []
        for step in range(WARM_UP + steps):
            me.barrier()
            begun = time.perf_counter()
            for part in range(ACCUMULATION):
                batch = collate(features, 0, dropout_keys(0, step, range(RANK_EXAMPLES)))
                with backend.microbatch(last=part == ACCUMULATION - 1):
                    loss = token_loss(backend.model, batch) / (me.size * ACCUMULATION * batch.targets)
                    backend.backward(loss)
            backend.step(1e-4, 1.0)
            times.append(time.perf_counter() - begun)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if me.is_main:
            turn = {"ms": 1000 * statistics.median(times[WARM_UP:]), "MiB": peak, "start": start, "steps": times}
            out.write_text(json.dumps(turn), encoding="utf-8")
