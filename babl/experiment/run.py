"""The grid of cells: each is trained, asks its questions and is scored, and goes on where it was killed.

    cells/ID/lock             who works on it; its time is the heartbeat
             train.toml       the run; train.log, what it said
             run/             the run's folder, with its checkpoints
             trained.json     the run has ended: what it did, or why it failed
             predictions/     CONDITION.jsonl, an answer a line
             scored.json      official scores under every condition, and the hashes of the predictions
             seconds.json     wall-clock times, which differ between two runs of the same thing

A stage's file is written aside and renamed, so it is whole or not there. Several processes, on several machines that
see the folder, may run the same experiment: a cell is one's whose lock it is.
"""

import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import tomli_w
from filelock import FileLock
from safetensors import safe_open

from babl.data.contexts import TestArm, View, build_views
from babl.data.loader import deal_epoch
from babl.data.prepare import context_words
from babl.data.squad import Example
from babl.distributed.failure import EXIT_PREEMPTED
from babl.errors import UserError
from babl.evaluation.predictions import Prediction, PromptLimits, answer_key, predict_into
from babl.evaluation.runner import asked
from babl.evaluation.squad import score
from babl.experiment.plan import Cell, Plan, Tree
from babl.files import file_hash, write_whole
from babl.generation import Engine

HEARTBEAT_SECONDS, EXPIRED_SECONDS = 5.0, 60.0
FINAL_STEPS = 20  # over which the failure rule averages the loss
MARK = "BABL_CELL"  # in the environment of a cell's training: whose it is


class Busy(Exception):
    """Somebody else works on the cell."""


class Left(Exception):
    """The cell was left before it was done, because the caller asked to."""


class CellError(Exception):
    """The cell's training ended in a way that no plan foresees; its log says how."""


def is_done(plan: Plan, cell: Cell) -> bool:
    """Returns whether nothing is left to do: the cell is scored, or has failed by the plan's rule."""
    trained = read_json(_folder(plan, cell) / "trained.json")
    return trained is not None and (trained["failed"] is not None or (_folder(plan, cell) / "scored.json").exists())


def run_cell(plan: Plan, cell: Cell, leave: Callable[[], bool], say: Callable[[str], None]) -> None:
    """The cell is done.

    Args:
        plan: Its experiment.
        cell: Which.
        leave: Asked all along; once it says yes, the cell is left at the next safe place.
        say: Told of each stage.

    Raises:
        Busy: Another process works on it.
        Left: It was left.
        CellError: Its training broke.
    """
    folder = _folder(plan, cell)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        if not (folder / "trained.json").exists():
            _train(plan, cell, leave)
        trained = read_json(folder / "trained.json")
        assert trained is not None
        if trained["failed"]:
            say(f"{cell.id}: failed, {trained['failed']}")
        elif not (folder / "scored.json").exists():
            say(f"{cell.id}: trained, loss {trained['final_loss']:.4f}")
            _score(plan, cell, leave)
        scored = read_json(folder / "scored.json") or {}
        if scored:
            say(f"{cell.id}: " + ", ".join(f"{name} {scores['exact']:.1f}" for name, scores in scored.items()))


def chosen_settings(plan: Plan, cell: Cell) -> Tree:
    """Returns the settings whose trial in the cell's arm scored best on the validation set; the earlier one of two.

    Raises:
        UserError: All trials have failed.
    """
    trials = [trial for trial in plan.trials if (trial.model, trial.arm) == (cell.model, cell.arm)]
    if cell.settings or not trials:
        return cell.settings
    scores = []
    for trial in trials:
        scored = read_json(_folder(plan, trial) / "scored.json")
        if scored is not None:
            (only,) = scored.values()
            scores.append((only[plan.tree["primary"]["metric"]], trial.settings))
    if not scores:
        raise UserError(
            f"every trial of {cell.model} in arm {cell.arm} has failed; experiment.grid has nothing to choose"
        )
    return max(scores, key=lambda row: row[0])[1]


def conditions(plan: Plan, cell: Cell) -> list[tuple[str, TestArm]]:
    """Returns (data set, condition) pairs the cell is scored under: a trial's own arm on the validation set."""
    if cell.settings:
        return [("validation", "gold" if cell.arm == "mixture" else cell.arm)]
    return [("test", condition) for condition in plan.tree["tests"]]


def _folder(plan: Plan, cell: Cell) -> Path:
    return plan.folder / "cells" / cell.id


def _train(plan: Plan, cell: Cell, leave: Callable[[], bool]) -> None:
    """trained.json says what the run did, or why it has failed by the plan's rule."""
    folder = _folder(plan, cell)
    settings = chosen_settings(plan, cell)
    run = plan.run_of(cell, settings)
    (folder / "train.toml").write_bytes(tomli_w.dumps(run).encode())
    program = ["babl.scripts.train", str(folder / "train.toml"), "run.resume=true"]
    if plan.tree["processes"] > 1:
        launch = [f"--nproc_per_node={plan.tree['processes']}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
        program = ["babl.distributed.launch", *launch, "-m", *program]
    with (folder / "train.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *program], stdout=log, stderr=log, env=os.environ | {MARK: str(folder.absolute())}
        )
        told = False
        while process.poll() is None:
            if not told and leave():
                process.send_signal(signal.SIGTERM)  # it saves, and leaves within a step
                told = True
            time.sleep(0.1)
    # The signal may find it before it can listen, or, where SLURM has told it already, on its way out.
    if process.returncode == EXIT_PREEMPTED or (told and process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)):
        raise Left
    failed = _failure(folder, process.returncode)
    trained: Tree = {"failed": failed, "chosen": settings}
    if failed is None:
        trained |= _facts(plan, cell, run)
        limit = plan.tree["failure_loss"]
        if limit and not trained["final_loss"] <= limit:
            trained["failed"] = f"the loss at the end is {trained['final_loss']:.4f}, above {limit:g}"
    write_json(folder / "trained.json", trained)
    write_json(folder / "seconds.json", {"train": _train_seconds(folder)})


def _failure(folder: Path, code: int) -> str | None:
    """Returns why the run has failed: a loss that is no number. Whatever else ends a run is no result.

    Raises:
        CellError: It ended in another way.
    """
    if code == 0:
        return None
    said = (folder / "train.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = next((line for line in reversed(said) if line.startswith("train: ")), said[-1] if said else "nothing")
    if "is not finite" in last:
        return last.removeprefix("train: ").split(";")[0]
    raise CellError(f"{folder.name}: training ended with exit code {code} ({last}); see {folder / 'train.log'}")


def _facts(plan: Plan, cell: Cell, run: Tree) -> Tree:
    """Returns what a run has done: counts, work and learning curve."""
    folder = _folder(plan, cell)
    model = folder / "run" / "checkpoints" / "latest"
    weights = multiplying_weights(model)
    steps = examples = tokens = flops = 0
    curve, losses = [], []
    for line in _log(folder):
        if "loss" in line:
            steps, examples, tokens = line["step"], examples + line["examples"], tokens + line["tokens"]
            flops += training_flops(weights, line["tokens"], line["target_tokens"])
            losses.append(line["loss"])
        else:
            at = {"step": line["step"], "examples": examples, "tokens": tokens, "flops": flops}
            curve.append(at | {"validation_loss": line["validation_loss"]})
    last = losses[-FINAL_STEPS:]
    return {
        "weights": weights_hash(model),
        "parameters": sum(_sizes(model).values()),
        "steps": steps,
        "examples": examples,
        "tokens": tokens,
        "flops": flops,
        "final_loss": sum(last) / len(last),
        "order": order_hash(plan.data("train"), run["batch"]["examples"], cell.seed, steps),
        "curve": curve,
    }


def order_hash(examples: list[Example], examples_per_step: int, seed: int, steps: int) -> str:
    """Returns the sha256 of the question ids in the order trained on, which every arm of a seed must share."""
    order: list[str] = []
    words, epoch, left = context_words(examples), 0, steps
    while left > 0:
        batches = deal_epoch(words, examples_per_step, seed, epoch)[:left]
        order += [examples[i].id for batch in batches for i in batch]
        epoch, left = epoch + 1, left - len(batches)
    return hashlib.sha256("\n".join(order).encode()).hexdigest()


def weights_hash(model: Path) -> str:
    """Returns a sha256, in hex, of a model folder's weights."""
    return hashlib.sha256("".join(map(file_hash, sorted(model.glob("model*.safetensors")))).encode()).hexdigest()


def training_flops(weights: tuple[int, int], tokens: int, targets: int) -> int:
    """Returns the floating-point operations of training on so many tokens, the products of attention left out.

    Args:
        weights: Of `multiplying_weights`.
        tokens: Real ones, source and target.
        targets: Those of them that are answers; in an encoder-decoder, the decoder computes them alone.

    Ref: Kaplan et al. 2020, 2.1: six operations for each weight and token.
    """
    encoder, decoder = weights
    decoded = targets if encoder else tokens
    return 6 * (encoder * (tokens - decoded) + decoder * decoded)


def multiplying_weights(model: Path) -> tuple[int, int]:
    """Returns the weights that multiply in an encoder, and in a decoder with its head; tables looked up are none."""
    sizes = _sizes(model)
    tables = ("shared.", "embed_tokens", "word_embeddings.", "relative_attention_bias", "embeddings_layernorm")
    multiplying = {key: size for key, size in sizes.items() if not any(table in key for table in tables)}
    encoder = sum(size for key, size in multiplying.items() if key.startswith("encoder."))
    decoder = sum(multiplying.values()) - encoder
    if not any("lm_head" in key for key in sizes):  # the head is the table of embeddings
        decoder += max(size for key, size in sizes.items() if key not in multiplying)
    return encoder, decoder


def _sizes(model: Path) -> dict[str, int]:
    """Returns how many weights each tensor of a model folder has."""
    sizes: dict[str, int] = {}
    for path in sorted(model.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                shape = file.get_slice(key).get_shape()
                sizes[key] = shape[0] * (shape[1] if len(shape) > 1 else 1)
    return sizes


def _log(folder: Path) -> list[Tree]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def last_step(plan: Plan, cell: Cell) -> tuple[int, float]:
    """Returns the last logged step of a cell's training and its loss; (0, nan) before the first."""
    try:
        with (_folder(plan, cell) / "run" / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = [line for line in file.read().splitlines()[-8:] if b'"loss"' in line and line.endswith(b"}")]
        line = json.loads(lines[-1])
        return line["step"], line["loss"]
    except (OSError, ValueError, IndexError):  # not begun, or just being written
        return 0, math.nan


def _train_seconds(folder: Path) -> float:
    """Returns the seconds spent in steps, those that a kill undid left out."""
    path = folder / "run" / "metrics.jsonl"
    lines = _log(folder) if path.exists() else []
    return round(sum(line["tokens"] / line["tokens_per_second"] for line in lines if line.get("tokens_per_second")), 1)


def _score(plan: Plan, cell: Cell, leave: Callable[[], bool]) -> None:
    """scored.json holds the official scores under every condition."""
    folder = _folder(plan, cell)
    model = folder / "run" / "checkpoints" / "latest"
    engine = Engine.load(model)
    decoding = plan.tree["decoding"]
    sets = {name: plan.data(name) for name, _ in conditions(plan, cell)}
    scored: Tree = {}
    begun = time.perf_counter()
    for name, condition in conditions(plan, cell):
        if leave():
            raise Left
        examples = sets[name]
        views, missing = build_views(examples, condition, plan.tree["data"]["context_seed"])
        assert not missing, (condition, missing)
        limits = PromptLimits(**decoding, no_answer=examples[0].version == "2.0")
        path = folder / "predictions" / f"{condition}.jsonl"
        key = answer_key(engine, model, views, limits)
        predictions = predict_into(path, engine, views, limits, key, progress=False)
        scored[condition] = scores_of(examples, views, predictions) | {"predictions": file_hash(path)}
    seconds = read_json(folder / "seconds.json") or {}
    write_json(folder / "seconds.json", seconds | {"predict": round(time.perf_counter() - begun, 1)})
    write_json(folder / "scored.json", scored)


def scores_of(examples: list[Example], views: list[View], predictions: list[Prediction]) -> Tree:
    """Returns the official scores in percent, against what is right under the condition."""
    metrics = score(asked(examples, views), {p.id: p.prediction for p in predictions})
    return {"exact": metrics.get("exact_match", metrics.get("exact")), "f1": metrics["f1"], "total": metrics["total"]}


def read_json(path: Path) -> Tree | None:
    """Returns what a stage's file holds, or None where the stage is not done."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_json(path: Path, tree: Tree) -> None:
    """The file is whole, on disk, or not there."""
    write_whole(path, json.dumps(tree, indent=1) + "\n")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within, the folder is this process's alone; what a dead holder has left running on this machine is ended.

    A lock is given up for dead when its process is gone, or, of another machine, when its heartbeat is
    EXPIRED_SECONDS old by the file system's own clock.

    Raises:
        Busy: Somebody alive has it.
    """
    lock = folder / "lock"
    me = Holder(socket.gethostname(), os.getpid(), psutil.Process().create_time())
    _take(lock, me)
    _end_orphans(folder)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            with suppress(FileNotFoundError):  # the folder was removed under us, which the next stage will tell
                os.utime(lock)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        lock.unlink(missing_ok=True)


@dataclass(frozen=True)
class Holder:
    """Whose a lock is: a machine, a process there, and when that began, for numbers of processes come again."""

    host: str
    pid: int
    created: float

    def is_alive(self) -> bool:
        """Returns whether the process runs, asked on its own machine."""
        try:
            return psutil.Process(self.pid).create_time() == self.created
        except psutil.NoSuchProcess:
            return False


def _take(lock: Path, me: Holder) -> None:
    """The lock names this process."""
    gate = lock.parent / ".taking"
    with FileLock(gate):  # one at a time judges, and takes what is dead
        if lock.exists() and not _is_dead(lock, gate, me.host):
            raise Busy
        write_json(lock, vars(me))


def _is_dead(lock: Path, gate: Path, host: str) -> bool:
    holder = Holder(**json.loads(lock.read_text(encoding="utf-8")))
    if holder.host == host:
        return not holder.is_alive()
    os.utime(gate)  # the file system's clock, which every machine sees
    return gate.stat().st_mtime - lock.stat().st_mtime > EXPIRED_SECONDS


def _end_orphans(folder: Path) -> None:
    """Nothing on this machine trains this cell."""
    mark = str(folder.absolute())
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # somebody else's, or gone by now
            if process.environ().get(MARK) == mark:
                process.kill()
                found.append(process)
    psutil.wait_procs(found, timeout=10)
