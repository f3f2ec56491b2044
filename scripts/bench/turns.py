"""What every job shares: runs in turn, their ratios, and the machine they ran on."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def timed(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each run, repeated in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratios(seconds: dict[str, list[float]], ours: str) -> Iterable[dict[str, Any]]:
    """Yields a row for each run: its median, and the median over the turns of how much longer than `ours` it took."""
    for name, times in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds[ours], times, strict=True))
        yield {"by": name, "seconds": statistics.median(times), "ratio": ratio, "all_seconds": times}


def memory_mib(key: str, process: int | str = "self") -> float:
    """Returns a size of a process, VmRSS or VmHWM, in MiB."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def machine() -> dict[str, Any]:
    """Returns what figures were taken on: processors, devices, versions."""
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    packages = ("torch", "triton", "transformers", "deepspeed", "tokenizers", "safetensors", "Django", "uvicorn")
    versions = {name: installed[name] for name in packages if name in installed}
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    facts = {"cpu": cpu.split(":")[1].strip(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return (
        facts
        | {"isa": torch.backends.cpu.get_cpu_capability(), "gpu": gpu, "python": platform.python_version()}
        | versions
    )
