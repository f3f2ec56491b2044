"""Dropout that belongs to the example beside torch's own."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from babl import ops
from babl.scripts.bench.turns import ratios, timed


def add(jobs: Any) -> None:
    """Adds the job."""
    job = jobs.add_parser("dropout", help="dropout that belongs to the example beside torch's")
    job.add_argument("--repeats", type=int, default=50, metavar="N")
    job.set_defaults(run=lambda a: dropout(a.repeats))


def dropout(repeats: int) -> list[dict[str, Any]]:
    """Returns a row for each shape: milliseconds of dropout that belongs to the example, beside torch's own."""
    rows = []
    for shape in ((8, 200, 512), (8, 200, 2048), (8, 8, 200, 200)):  # T5-small's states, feed-forward, attention
        x, keys = torch.randn(shape), torch.arange(8)
        runs = {"babl": partial(ops.dropout, x, 0.1, keys, 3), "torch": partial(F.dropout, x, 0.1)}
        for row in ratios(timed(runs, repeats), "babl"):
            rows.append({"shape": " x ".join(map(str, shape))} | row)
    return rows
