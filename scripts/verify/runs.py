"""The script under test in processes of its own, and what it leaves behind."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import tomli_w
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from babl.models import from_pretrained
from babl.models.weights import Family
from babl.scripts.verify.subject import LONG, SEED, Subject

STEPS = 4  # two batches are an epoch, so the third step begins another
LR, WARMUP, DECAY, MAX_NORM, SMOOTHING = 0.01, 2, 0.1, 0.5, 0.1
VALIDATED = (2, STEPS)  # after these steps; a model that stays in evaluation mode trains on without dropout
BACKENDS = ("ddp", "fsdp", "zero1", "zero2", "zero3")
CLOCKS = {"tokens_per_second", "peak_memory_bytes"}  # of metrics.jsonl: what a second run may measure otherwise
WATCH = Path(__file__).parent / "watch.py"
LIMIT = 180  # seconds a run may take
REFUSED = 2  # the exit code of bad input
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Case(NamedTuple):
    """One way to run the script."""

    family: Family
    backend: str
    ranks: int
    accumulation: int

    def __str__(self) -> str:
        return f"{self.family} {self.backend} {self.ranks}x{self.accumulation}"


def every_case() -> tuple[list[Case], list[tuple[Case, int]]]:
    """Returns all combinations, each with one of the families, and which of them go on after which step."""
    families: list[Family] = ["t5", "llama", "bloom"]
    ways = [(backend, ranks, parts) for backend in BACKENDS for ranks in (1, 2) for parts in (4, 1)]
    cases = [Case(families[i % 3], *way) for i, way in enumerate(ways)]
    after = [(cases[0], step) for step in range(1, STEPS)]
    after += [(case, 1 + i % 3) for i, case in enumerate(cases[1:]) if case.accumulation == 4]
    return cases, after


def quick_cases() -> tuple[list[Case], list[tuple[Case, int]]]:
    """Returns one case of one rank, one of two, and one step after which to go on."""
    cases = [Case("t5", "ddp", 1, 4), Case("bloom", "ddp", 2, 4)]
    return cases, [(cases[0], 2)]


@dataclass
class Job:
    """One run of a script.

    Attributes:
        case: How.
        subject: On what.
        folder: Where; the run is called "run" there.
        script: What is run.
        changes: Sections and keys that differ from `config_of`.
        overrides: The user's own `section.key=value`, which the script is given.
        record: Where `watch.py` writes what it sees; None where nobody watches.
        failure: In a line, what went wrong with it.
        refused: Whether the script said that it cannot do this (exit code 2).
    """

    case: Case
    subject: Subject
    folder: Path
    script: Path
    changes: dict[str, dict[str, Any]]
    overrides: Sequence[str] = ()
    record: Path | None = None
    failure: str = ""
    refused: bool = False

    def checkpoint(self, step: int) -> Path:
        """Returns where the run is after a step; before the first one, where it starts from."""
        return self.folder / "run" / "checkpoints" / f"step_{step:06d}" if step else self.subject.folder

    def saved(self) -> list[int]:
        """Returns the steps of its checkpoints, in order."""
        names = [path.name for path in (self.folder / "run" / "checkpoints").glob("step_*")]
        return sorted(int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d+", name))

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl, without what a clock measures."""
        lines = (self.folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]

    def log(self) -> Path:
        """Returns the file of what it printed."""
        return self.folder / "log"


def missing(case: Case) -> str:
    """Returns what this machine lacks for the case, in words, or nothing."""
    if case.backend.startswith("zero"):
        if importlib.util.find_spec("deepspeed") is None:
            return "deepspeed is not installed"
        if not shutil.which("g++"):
            return "deepspeed needs g++"
        if not (shutil.which("ninja") or importlib.util.find_spec("ninja")):
            return "deepspeed needs ninja"
    return ""


def run_all(jobs: Sequence[Job], bar: tqdm) -> None:
    """All have run, as many at a time as there are processors for."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for ranks in sorted({job.case.ranks for job in jobs}):
        with ThreadPoolExecutor(max(1, processors // ranks)) as pool:
            for _ in pool.map(_run, [job for job in jobs if job.case.ranks == ranks]):
                bar.update()


def config_of(job: Job) -> dict[str, dict[str, Any]]:
    """Returns the configuration of a run that nothing is changed of."""
    case, subject = job.case, job.subject
    return {
        "run": {"name": "run", "dir": str(job.folder), "seed": SEED},
        "model": {"path": str(subject.folder)},
        "data": {name: str(subject.folder / f"{name}.jsonl") for name in ("train", "validation")},
        "batch": {"tokens": len(LONG) * subject.longest, "accumulation": case.accumulation},
        "optim": {"lr": LR, "weight_decay": DECAY, "schedule": "linear", "warmup_steps": WARMUP}
        | {"max_grad_norm": MAX_NORM, "label_smoothing": SMOOTHING},
        "train": {"steps": STEPS, "save_every": 1, "keep_last": 0, "validate_every": VALIDATED[0]},
        "distributed": {"backend": case.backend},
    }


def _run(job: Job) -> None:
    """The script has run to its end, or the job says why not."""
    job.folder.mkdir(exist_ok=True)
    config = config_of(job)
    for section, keys in job.changes.items():
        config[section] = config.get(section, {}) | keys
    path = job.folder / "config.toml"
    path.write_text(tomli_w.dumps(config), encoding="utf-8")
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={job.case.ranks}"]
    watch = [str(WATCH), str(job.record)] if job.record else []
    script = [*watch, str(job.script), str(path), *job.overrides]
    command = [sys.executable, *(ranks if job.case.ranks > 1 else []), *script]
    with job.log().open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | CPU_ONLY)
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            job.failure = f"not done in {LIMIT} s"
            return
        finally:
            _end(process)
    if code:
        lines = job.log().read_text(encoding="utf-8", errors="replace")
        job.failure = f"exit code {code}: {_reason(lines)}"
        job.refused = code == REFUSED or re.search(rf"exitcode +: {REFUSED} ", lines) is not None  # torchrun's own is 1
    elif not job.saved():
        job.failure = "no checkpoint was saved"


def _end(process: subprocess.Popen) -> None:
    """The process is gone, and those it has started."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):  # one that has just ended
                each.kill()
        process.wait()


def _reason(log: str) -> str:
    """Returns the line that names what failed: the first that looks like it, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("train: ") or "Error: " in line]
    return (named or lines or ["nothing was said"])[0 if named else -1][:200]


def cut(job: Job, step: int, folder: Path) -> Job:
    """Returns a run as a kill in the step after `step` leaves it, to go on: with a line too many, and half a save."""
    shutil.copytree(job.folder, folder, symlinks=True)
    gone_on = replace(job, folder=folder, changes=job.changes | {"run": {"resume": True}})
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(gone_on.checkpoint(later), ignore_errors=True)
    half = gone_on.checkpoint(step + 1).with_name(f".step_{step + 1:06d}.tmp")
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"cut short")
    latest = gone_on.checkpoint(step).with_name("latest")
    latest.unlink(missing_ok=True)
    latest.symlink_to(f"step_{step:06d}")
    return gone_on


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """Returns the model's parameters by name, in fp64, each once."""
    return {n: p.detach() for n, p in from_pretrained(checkpoint, torch.float64).named_parameters()}


def stored(checkpoint: Path, pattern: str) -> dict[str, Tensor]:
    """Returns the tensors of the safetensors files called so, in fp64; none where there is no such file."""
    files = [load_file(path) for path in sorted(checkpoint.glob(pattern))]
    return {name: value.double() for file in files for name, value in file.items()}
