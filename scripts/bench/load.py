"""The memory that loading a model takes."""

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from babl.generation.packed import pack
from babl.models import from_pretrained, save_pretrained
from babl.models.llama import Llama, LlamaConfig
from babl.models.weights import describe
from babl.scripts.bench.turns import memory_mib


def add(jobs: Any) -> None:
    """Adds the job."""
    job = jobs.add_parser("load", help="memory taken by loading a model")
    job.add_argument("--mebibytes", type=int, default=1024, metavar="N", help="of weights in fp32 (default 1024)")
    job.set_defaults(run=lambda a: load(a.mebibytes))


def load(mebibytes: int) -> list[dict[str, Any]]:
    """Returns a row for each way to load a LLaMA of that size: memory taken above the interpreter with torch in it."""
    layers = max(1, round((mebibytes - 250) / 49))
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_hidden_layers=layers)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            path = Path(folder) / dtype
            save_pretrained(Llama(config).to(getattr(torch, dtype)), path)
            weights = 4 * describe(path)["parameters"] / 2**20
            for packed in (False, True):
                with multiprocessing.get_context("spawn").Pool(1) as fresh:
                    peak, seconds = fresh.apply(_load_once, (path, packed))
                row = {"folder": dtype, "packed": packed, "weights MiB": weights, "peak MiB": peak}
                rows.append(row | {"ratio": peak / weights, "seconds": seconds})
    return rows


def _load_once(folder: Path, packed: bool) -> tuple[float, float]:
    """Returns the most MiB held on top of what was held before, and seconds."""
    before, begun = memory_mib("VmRSS"), time.perf_counter()
    model = from_pretrained(folder)
    if packed:
        pack(model)
    seconds = time.perf_counter() - begun
    for parameter in model.parameters():
        parameter.sum()  # what is mapped counts once it is read
    return memory_mib("VmHWM") - before, seconds
