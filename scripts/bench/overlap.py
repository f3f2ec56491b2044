"""Time and memory of `babl overlap` on made-up sets."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from babl.data.squad import Answer, Example, to_squad
from babl.scripts.bench.turns import memory_mib


def add(jobs: Any) -> None:
    """Adds the job."""
    job = jobs.add_parser("overlap", help="time and memory of looking for overlap, on made-up sets")
    job.add_argument("--train", type=int, default=100_000, metavar="N", help="questions (default 100000)")
    job.add_argument("--test", type=int, default=10_000, metavar="N", help="questions (default 10000)")
    job.add_argument("--documents", type=int, default=20_000, metavar="N", help="of the corpus (default 20000)")
    job.set_defaults(run=lambda a: overlap(a.train, a.test, a.documents))


def overlap(train: int, test: int, documents: int) -> list[dict[str, Any]]:
    """Returns a row for each made-up set: seconds and memory of `babl overlap`, a process of its own.

    In a "plain" set each question has words of its own; of "forms", 12 wordings serve for all, and half a context is
    one of 12 texts. One question of test in 20 and one context in 20 stand in train.
    """
    rows = []
    for kind in ("plain", "forms"):
        for shards in (0, documents):
            with tempfile.TemporaryDirectory() as folder:
                names = ("train.json", "dev.json", "corpus.txt")
                paths = [str(Path(folder) / name) for name in names]
                _made_up(kind, train, test, shards, *map(Path, paths))
                corpus = ["--corpus", paths[2]] if shards else []
                command = [sys.executable, "-m", "babl.cli", "overlap", *paths[:2], *corpus, "--json"]
                seconds, peak = _watched(command)
            row = {"set": kind, "train": train, "test": test, "corpus documents": shards}
            rows.append(row | {"seconds": seconds, "peak MiB": peak})
    return rows


def _made_up(kind: str, train: int, test: int, documents: int, *paths: Path) -> None:
    """The paths hold a training set, a test set and a corpus, of Zipf's words."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu"))
    vocabulary = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, 60_000)]
    vocabulary = [word.capitalize() if i > 2000 else word for i, word in enumerate(vocabulary)]  # rare ones are names
    weights = np.cumsum(1 / np.arange(3, len(vocabulary) + 3))

    def draw(count: int) -> list[str]:
        return [vocabulary[i] for i in np.searchsorted(weights, weights[-1] * rng.random(count))]

    def one(rows: Sequence[Any]) -> Any:
        return rows[int(rng.integers(len(rows)))]

    wordings, texts = [draw(8) for _ in range(12)], [draw(60) for _ in range(12)]

    def context() -> str:
        return " ".join(one(texts) + draw(60) if kind == "forms" else draw(120))

    def question() -> str:
        return " ".join(one(wordings) + draw(2) if kind == "forms" else draw(10)) + "?"

    def examples(name: str, count: int, seen: Sequence[Example]) -> Iterator[Example]:
        for i in range(count):
            if i % 5 == 0:
                said = one(seen).context if seen and rng.random() < 0.05 else context()
            asked = one(seen).question if seen and rng.random() < 0.05 else question()
            start = said.index(" ", int(rng.integers(len(said) // 2))) + 1
            end = said.index(" ", start)
            yield Example(f"{name}{i}", f"{name}{i // 100}", asked, said, (Answer(said[start:end], start),))

    known = list(examples("train", train, ()))
    for path, part in ((paths[0], known), (paths[1], list(examples("test", test, known)))):
        path.write_text(json.dumps(to_squad(part)), encoding="utf-8")
    with paths[2].open("w", encoding="utf-8") as file:
        file.writelines(context() + "\n" for _ in range(documents))


def _watched(command: Sequence[str]) -> tuple[float, float]:
    """Returns the seconds a command takes, and the most MiB it holds."""
    begun, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(StopIteration, OSError):  # it has just ended
            peak = max(peak, memory_mib("VmHWM", process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - begun, peak
