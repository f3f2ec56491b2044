"""Proves that a training script still does what it should: `babl verify [SCRIPT]`.

The script is run as it is, in processes of its own, on tiny models and a few embedded questions. What it leaves behind,
a checkpoint after each step and metrics.jsonl, is held against the same steps computed here: in fp64, one example at a
time, without the house's loop, collator, backends, optimizer or schedule. Each step is computed from the checkpoint
before it, so that a difference is that step's own, and rounding does not grow.

Covered: every combination of backend, 1 or 2 ranks, and 1 or 4 micro-batches a step, each with one of the families in
turn; unequal numbers of targets; micro-batches without any; dropout; tied and untied heads; clipping, label smoothing
and weight decay that count; a rate that rises and falls; going on after each step, over the end of an epoch too; and
answers through the cache. All of it runs on CPUs, where the same work gives the same bytes.

Not proven, for both sides use it: the models' arithmetic, which the tests hold against transformers', the wording of
prompts, the tokenizer, and the random numbers of dropout and order. Of the last, only that each example has its turn in
each epoch, and that no two epochs, and no two examples' dropouts, are alike.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import tomli_w
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from babl.data.loader import dropout_keys, plan_epoch
from babl.errors import UserError
from babl.generation import Engine, GenerationConfig
from babl.models import from_pretrained, save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.models.layers import Model
from babl.models.weights import Family
from babl.text import Tokenizer, train_tokenizer
from babl.text.prompts import Style, qa_prompt
from babl.training.checkpoint import checkpoint_name
from babl.training.metrics import CLOCK_FIELDS

LOOP = Path(__file__).parent / "train.py"
BACKENDS = ("ddp", "fsdp", "zero1", "zero2", "zero3")
SHAPES: dict[Family, dict[str, Any]] = {
    "t5": {"d_model": 12, "d_kv": 5, "d_ff": 17, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    | {"dropout_rate": 0.2},
    "llama": {"hidden_size": 12, "intermediate_size": 17, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "max_position_embeddings": 512, "attention_dropout": 0.2},
    "bloom": {"hidden_size": 12, "n_layer": 2, "n_head": 3, "hidden_dropout": 0.1, "attention_dropout": 0.2},
}
LONG = (
    "The old market of Tarnwick opens at dawn on the first day of the week, and from then until noon ",
    "As soon as the ferry has crossed the lake, which takes it less than an hour when the wind is low, ",
    "In the valley behind the two hills, where the road turns to the north and the houses end, ",
)
TRAIN = [  # context and answer: three long ones are one batch, six short ones the other
    (LONG[0] + "Mara sells blue glass there.", "Mara"),
    (LONG[1] + "Oskar rings a small copper bell.", "a small copper bell"),
    (LONG[2] + "Ines keeps bees and goats.", "bees and goats"),
    ("Rudi bakes.", "Rudi"),
    ("Ada has a red boat.", "a red boat"),
    ("Leo is six.", "six"),
    ("Una reads old maps.", "old maps"),
    ("Tom left in May.", "Tom left in May"),
    ("Eva sings.", "sings"),
]
VALIDATION = [("Pia paints.", "Pia"), ("Kurt has two grey cats.", "two grey cats"), ("It rains.", "rains")]
QUESTION = "What does it say?"

SEED, STEPS = 3, 4  # two batches are an epoch, so the third step begins another
LR, WARMUP, DECAY, MAX_NORM, SMOOTHING = 0.01, 2, 0.1, 0.5, 0.1
BETAS, EPSILON = (0.9, 0.98), 1e-8
EXACT = 2e-5  # of fp32 beside fp64, relative to the largest of a tensor, or of 1 % of the largest gradient
ALIKE = 1e-6  # of fp32 added up in another order
LIMIT = 180  # seconds a run may take
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Case(NamedTuple):
    """One way to run the script."""

    family: Family
    backend: str
    ranks: int
    accumulation: int

    def __str__(self) -> str:
        return f"{self.family} {self.backend} {self.ranks}x{self.accumulation}"


@dataclass
class Row:
    """One line of the proof.

    Attributes:
        check: What was compared.
        case: Where.
        difference: The largest one found; None where there is nothing to compare with, or no number.
        bound: The largest that is rounding.
        note: Where the largest difference is, what failed, or why the case was not run.
        run: False where this machine cannot.
    """

    check: str
    case: str
    difference: float | None
    bound: float
    note: str = ""
    run: bool = True

    @property
    def verdict(self) -> str:
        """In a word."""
        if not self.run:
            return "not run"
        return "ok" if self.difference is not None and self.difference <= self.bound else "WRONG"


@dataclass
class Worst:
    """The largest difference so far, and where it is."""

    value: float = 0.0
    where: str = ""

    def add(self, difference: float, where: str) -> None:
        """Counts one more; one that is no number is the largest of all."""
        difference = math.inf if math.isnan(difference) else difference
        if difference > self.value:
            self.value, self.where = difference, where

    def row(self, check: str, case: str, bound: float) -> Row:
        """Returns it as a line of the proof."""
        return Row(check, case, self.value if math.isfinite(self.value) else None, bound, self.where)


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


def prove(script: Path, cases: Sequence[Case], after: Sequence[tuple[Case, int]]) -> list[Row]:
    """Returns every comparison.

    Args:
        script: Takes what scripts/train.py takes.
        cases: To be run from beginning to end.
        after: Cases of these to be run again from the checkpoint of a step, as if killed thereafter.

    Raises:
        UserError: There is no such script.
    """
    if not script.is_file():
        raise UserError(f"{script}: no such script")
    missing = {case: _missing(case) for case in cases}
    able = [case for case in cases if not missing[case]]
    rows = [_order(), _keys()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subjects = {family: Subject(family, folder / family) for family in {case.family for case in able}}
        jobs = [Job(case, subjects[case.family], folder / f"run{i}") for i, case in enumerate(able)]
        whole = dict(zip(able, jobs, strict=True))
        again = [(whole[c], step, folder / f"again{i}") for i, (c, step) in enumerate(after) if c in whole]
        with tqdm(total=len(jobs) + len(again), desc=str(script), unit="run", leave=False) as bar:
            _run_all(script, jobs, bar)
            resumed = [_cut(job, step, to) for job, step, to in again if not job.failure]
            _run_all(script, resumed, bar)
        for case in cases:
            if case in whole:
                rows += _compared("run", str(case), whole[case], partial(_case_rows, whole[case]))
            else:
                rows.append(Row("all", str(case), None, 0.0, missing[case], run=False))
        for (job, step, _), gone_on in zip([a for a in again if not a[0].failure], resumed, strict=True):
            rows += _compared(
                "resume", f"{job.case} after step {step}", gone_on, partial(_resume_row, job, step, gone_on)
            )
    return rows


# --- What is run -----------------------------------------------------------------------------------------------------


class Subject:
    """A model to start from, and the questions as its family reads them.

    Attributes:
        folder: The model's, with its tokenizer and the two data files.
        train: Ids of each example's prompt and answer.
        validation: Likewise.
        budget: Tokens of a step that make an epoch of the two batches meant.
    """

    def __init__(self, family: Family, folder: Path):
        self.folder = folder
        style: Style = "t5" if family == "t5" else "decoder"
        prompts = {c: qa_prompt(QUESTION, c, style) for c, _ in [*TRAIN, *VALIDATION]}
        tokenizer = train_tokenizer([*prompts.values(), *(" " + a for _, a in TRAIN)], 290, folder)
        model, _ = build_model(ModelConfig(family=family, shape=SHAPES[family], tokenizer=str(folder)), folder, SEED)
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in model.parameters():  # a bias of 0 or a norm's weight of 1 would hide what it does
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        save_pretrained(model, folder)
        for name, texts in (("train", TRAIN), ("validation", VALIDATION)):
            lines = [json.dumps({"question": QUESTION, "context": c, "answer": a}) for c, a in texts]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.prompts = list(prompts.values())
        self.train, self.validation = (
            [_ids(tokenizer, style, prompts[c], a) for c, a in texts] for texts in (TRAIN, VALIDATION)
        )
        self.lengths = [(len(s), len(t)) if style == "t5" else (len(s) + len(t) - 1, 0) for s, t in self.train]
        longest = [max(lengths[i] for lengths in self.lengths) for i in (0, 1)]
        self.budget = len(LONG) * sum(longest)
        plan = self.plan(0)
        assert sorted(map(len, plan)) == [len(LONG), len(TRAIN) - len(LONG)], plan

    def plan(self, epoch: int) -> list[list[int]]:
        """Returns the epoch's batches."""
        return plan_epoch(self.lengths, self.budget, SEED, epoch)

    def batch(self, step: int) -> list[int]:
        """Returns the examples of a step, counted from 1."""
        epoch, place = divmod(step - 1, 2)
        return self.plan(epoch)[place]


def _ids(tokenizer: Tokenizer, style: Style, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Returns what is read and what is to be written, which ends with EOS."""
    if style == "t5":
        return [*tokenizer.encode(prompt), tokenizer.eos_id], [*tokenizer.encode(answer), tokenizer.eos_id]
    source = [*tokenizer.prefix_ids, *tokenizer.encode(prompt)]
    return source, [*tokenizer.encode_continuation(f" {answer}"), tokenizer.eos_id]


@dataclass
class Job:
    """One run of the script; `failure` says in a line what went wrong with it."""

    case: Case
    subject: Subject
    folder: Path
    resume: bool = False
    failure: str = ""

    def checkpoint(self, step: int) -> Path:
        """Returns where the run is after a step; before the first one, where it starts from."""
        return self.folder / "run" / "checkpoints" / checkpoint_name(step) if step else self.subject.folder

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl, without what a clock measures."""
        lines = (self.folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in CLOCK_FIELDS} for line in lines]


def _missing(case: Case) -> str:
    """Returns what this machine lacks for the case, in words, or nothing."""
    if case.backend.startswith("zero"):
        if importlib.util.find_spec("deepspeed") is None:
            return "deepspeed is not installed"
        if not shutil.which("g++"):
            return "deepspeed needs g++"
        if not (shutil.which("ninja") or importlib.util.find_spec("ninja")):
            return "deepspeed needs ninja"
    return ""


def _run_all(script: Path, jobs: list[Job], bar: tqdm) -> None:
    """All have run, as many at a time as there are processors for."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for ranks in sorted({job.case.ranks for job in jobs}):
        with ThreadPoolExecutor(max(1, processors // ranks)) as pool:
            for _ in pool.map(partial(_run, script), [job for job in jobs if job.case.ranks == ranks]):
                bar.update()


def _run(script: Path, job: Job) -> None:
    """The script has run, and left what it promises, or the job says why not."""
    case, subject = job.case, job.subject
    job.folder.mkdir(exist_ok=True)
    config = {
        "run": {"name": "run", "dir": str(job.folder), "seed": SEED, "resume": job.resume},
        "model": {"path": str(subject.folder)},
        "data": {name: str(subject.folder / f"{name}.jsonl") for name in ("train", "validation")},
        "batch": {"tokens": subject.budget, "accumulation": case.accumulation},
        "optim": {"lr": LR, "weight_decay": DECAY, "schedule": "linear", "warmup_steps": WARMUP}
        | {"max_grad_norm": MAX_NORM, "label_smoothing": SMOOTHING},
        "train": {"steps": STEPS, "save_every": 1, "keep_last": 0},
        "distributed": {"backend": case.backend},
    }
    path, log = job.folder / "config.toml", job.folder / "log"
    path.write_text(tomli_w.dumps(config), encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}"]
    command = [sys.executable, *(torchrun if case.ranks > 1 else []), str(script), str(path)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | CPU_ONLY)
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            job.failure = f"not done in {LIMIT} s"
            return
        finally:
            _end(process)
    absent = [step for step in range(1, STEPS + 1) if not job.checkpoint(step).is_dir()]
    if code:
        job.failure = f"exit code {code}: {_reason(log.read_text(encoding='utf-8', errors='replace'))}"
    elif absent:
        job.failure = f"no checkpoint {checkpoint_name(absent[0])}"


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
    told = [line for line in lines if line.startswith("train: ") or "Error: " in line]
    return (told or lines or ["nothing was said"])[0 if told else -1][:200]


def _cut(job: Job, step: int, folder: Path) -> Job:
    """Returns a run as a kill in the step after `step` leaves it, to go on: with a line too many, and half a save."""
    shutil.copytree(job.folder, folder, symlinks=True)
    cut = Job(job.case, job.subject, folder, resume=True)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(cut.checkpoint(later))
    half = cut.checkpoint(step + 1).with_name(f".{checkpoint_name(step + 1)}.tmp")
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"cut short")
    latest = cut.checkpoint(step).with_name("latest")
    latest.unlink(missing_ok=True)
    latest.symlink_to(checkpoint_name(step))
    return cut


# --- What it should have done ----------------------------------------------------------------------------------------


def _log_probs(model: Model, source: list[int], target: list[int], key: int | None = None) -> Tensor:
    """Returns what one example's model thinks of every token, (T, V), each predicted by what stands before it."""
    read = torch.tensor([source])
    dropout = None if key is None else torch.tensor([key])
    if model.is_encoder_decoder:
        before = torch.tensor([[model.config.decoder_start_token_id, *target[:-1]]])
        logits = model(input_ids=read, decoder_input_ids=before, dropout_key=dropout)[0]  # (T, V)
    else:
        read = torch.tensor([[*source, *target[:-1]]])
        logits = model(input_ids=read, dropout_key=dropout)[0, len(source) - 1 :]  # (T, V)
    return logits.log_softmax(-1)


def _of(target: Sequence[int], log_probs: Tensor) -> Tensor:
    """Returns those of the target, (T,)."""
    return log_probs.gather(-1, torch.tensor(target)[:, None])[:, 0]


def _learning_rate(step: int) -> float:
    """Returns the rate of a step: it rises over the warm-up, then falls, to reach 0 after the last step."""
    return LR * (step / WARMUP if step <= WARMUP else 1 - (step - 1 - WARMUP) / (STEPS - WARMUP))


def _decays(model: Model) -> dict[str, float]:
    """Returns the weight decay of each parameter: of matrices, but not of tables of position biases."""
    tables = {id(m.weight) for name, m in model.named_modules() if name.rpartition(".")[2] == "relative_bias"}
    return {n: DECAY if p.ndim == 2 and id(p) not in tables else 0.0 for n, p in model.named_parameters()}


def _optimizer(checkpoint: Path) -> dict[str, Tensor]:
    """Returns what the optimizer remembers, in fp64; nothing where it has not begun."""
    files = [load_file(path) for path in checkpoint.glob("optimizer*.safetensors")]
    return {name: value.double() for file in files for name, value in file.items()}


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in from_pretrained(checkpoint, torch.float64).named_parameters()}


# --- What differs ----------------------------------------------------------------------------------------------------


def _compared(check: str, name: str, job: Job, compare: Callable[[str], list[Row]]) -> list[Row]:
    """Returns what `compare` finds in what a run has left, or a line that says why there is nothing to compare."""
    reason = job.failure
    if not reason:
        try:
            return compare(name)
        except (UserError, LookupError, OSError, TypeError, ValueError) as error:
            reason = f"what it left cannot be read: {error!r}"
    return [Row(check, name, None, 0.0, reason)]


def _case_rows(job: Job, name: str) -> list[Row]:
    """Returns how far a run is from what it should have done."""
    checks = zip(("gradient", "AdamW", "metrics", "decode"), (*_steps(job), _decode(job)), strict=True)
    return [worst.row(check, name, EXACT) for check, worst in checks]


def _steps(job: Job) -> tuple[Worst, Worst, Worst]:
    """Returns the largest differences of gradients, of AdamW's steps, and of what was logged."""
    gradient, adamw, metrics = Worst(), Worst(), Worst()
    decays = _decays(from_pretrained(job.subject.folder))
    lines = job.metrics()
    steps = {line["step"]: line for line in lines if "loss" in line}
    if sorted(steps) != list(range(1, STEPS + 1)) or len(lines) != STEPS + 1:
        metrics.add(math.inf, "lines of other steps")
        steps = {step: {} for step in range(1, STEPS + 1)} | steps
    for step in range(1, STEPS + 1):
        expected, clipped = _step(job, step)
        for key, value in expected.items():
            logged = steps[step].get(key, math.nan)
            metrics.add(abs(logged - value) / abs(value), f"{key}, step {step}")
        before, after = _optimizer(job.checkpoint(step - 1)), _optimizer(job.checkpoint(step))
        weights, moved = _weights(job.checkpoint(step - 1)), _weights(job.checkpoint(step))
        floor = 0.01 * max(g.abs().max().item() for g in clipped.values())
        lr, (beta1, beta2) = _learning_rate(step), BETAS
        for parameter, g in clipped.items():
            zero = torch.zeros_like(g)
            m0, v0 = (before.get(f"{parameter}/{part}", zero) for part in ("exp_avg", "exp_avg_sq"))
            m, v = after[f"{parameter}/exp_avg"], after[f"{parameter}/exp_avg_sq"]
            largest, where = max(g.abs().max().item(), floor), f"{parameter}, step {step}"
            gradient.add((m - (beta1 * m0 + (1 - beta1) * g)).abs().max().item() / ((1 - beta1) * largest), where)
            adamw.add((v - (beta2 * v0 + (1 - beta2) * g**2)).abs().max().item() / ((1 - beta2) * largest**2), where)
            # From the moments just proven, as those of the file: a gradient that is all rounding has a step, too.
            update = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + EPSILON)
            w = weights[parameter] * (1 - lr * decays[parameter]) - lr * update
            adamw.add((moved[parameter] - w).abs().max().item() / moved[parameter].abs().max().item(), where)
    model, total, count = from_pretrained(job.checkpoint(STEPS), torch.float64), 0.0, 0
    with torch.no_grad():
        for source, target in job.subject.validation:
            total -= _of(target, _log_probs(model, source, target)).sum().item()
            count += len(target)
    logged = lines[-1].get("validation_loss", math.nan)
    metrics.add(abs(logged - total / count) / (total / count), "validation_loss")
    return gradient, adamw, metrics


def _step(job: Job, step: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Returns what is to be logged of a step, and its gradient after clipping, from the checkpoint before it."""
    model = from_pretrained(job.checkpoint(step - 1), torch.float64).train()
    indices = job.subject.batch(step)
    examples = [job.subject.train[i] for i in indices]
    targets = sum(len(target) for _, target in examples)
    keys = dropout_keys(SEED, step, indices)
    total = 0.0
    for (source, target), key in zip(examples, keys, strict=True):
        log_probs = _log_probs(model, source, target, key)
        smooth = log_probs.mean(-1)  # of a target that is any token alike
        loss = -((1 - SMOOTHING) * _of(target, log_probs) + SMOOTHING * smooth).sum() / targets
        loss.backward()
        total += loss.item()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    logged = {"loss": total, "lr": _learning_rate(step), "grad_norm": norm}
    logged |= {"target_tokens": targets, "examples": len(examples)}
    return logged, {name: g * min(1.0, MAX_NORM / norm) for name, g in gradients.items()}


def _resume_row(job: Job, step: int, gone_on: Job, name: str) -> list[Row]:
    """Returns how far the end of a run that went on after `step` is from that of the one that was never stopped."""
    exact = job.case.backend == "ddp"
    worst = Worst()
    if job.checkpoint(step).stat().st_mtime_ns != gone_on.checkpoint(step).stat().st_mtime_ns:
        worst.add(math.inf, f"step {step} was done again")
    ends = job.checkpoint(STEPS), gone_on.checkpoint(STEPS)
    for read in (_weights, _optimizer):
        one, other = map(read, ends)
        if one.keys() != other.keys():
            worst.add(math.inf, "names of tensors")
        for tensor in one.keys() & other.keys():
            difference = (one[tensor] - other[tensor]).abs().max().item()
            worst.add(difference / max(one[tensor].abs().max().item(), 1e-30), tensor)
    for file in ends[0].glob("*.safetensors") if exact else ():
        if file.read_bytes() != (ends[1] / file.name).read_bytes():
            worst.add(math.ulp(1.0), f"the bytes of {file.name}")
    one_log, other_log = job.metrics(), gone_on.metrics()
    if len(one_log) != len(other_log):
        worst.add(math.inf, "lines of metrics.jsonl")
    for line, other_line in zip(one_log, other_log, strict=False):
        for key in line.keys() | other_line.keys():
            value, again = line.get(key, math.inf), other_line.get(key, math.nan)
            worst.add(abs(value - again) / max(abs(value), 1e-12), f"{key}, step {line['step']}")
    return [worst.row("resume", name, 0.0 if exact else ALIKE)]


def _decode(job: Job) -> Worst:
    """Returns how far what the engine writes, token by token, is from the whole text computed at once."""
    checkpoint, worst = job.checkpoint(STEPS), Worst()
    subject = job.subject
    answers = Engine.load(checkpoint, "cpu", "float32").answer(subject.prompts, GenerationConfig(max_new_tokens=6))
    model = from_pretrained(checkpoint, torch.float64)
    for number, (answer, (source, _)) in enumerate(zip(answers, [*subject.train, *subject.validation], strict=True)):
        with torch.no_grad():
            log_probs = _log_probs(model, source, list(answer.ids))
        told = _of(answer.ids, log_probs)
        worst.add(abs(told.sum().item() - answer.log_prob) / abs(told.sum().item()), f"prompt {number}")
        worst.add((log_probs.max(-1).values - told).max().item(), f"prompt {number}, not the likeliest")
    return worst


def _order() -> Row:
    """Returns how many examples an epoch's plan has too often or not at all, and how many epochs are alike."""
    lengths = [(3 + i % 11, 1 + i % 4) for i in range(50)]
    plans = [plan_epoch(lengths, 60, SEED, epoch) for epoch in range(3)]
    wrong = sum(sorted(i for batch in plan for i in batch) != list(range(len(lengths))) for plan in plans)
    wrong += sum(plan in plans[:place] for place, plan in enumerate(plans))
    return Row("order", "each example once an epoch", float(wrong), 0.0)


def _keys() -> Row:
    """Returns how many examples share their dropout with another example, step or seed."""
    keys = [key for seed in range(3) for step in range(20) for key in dropout_keys(seed, step, range(50))]
    return Row("dropout", "each (seed, step, example) its own", float(len(keys) - len(set(keys))), 0.0)


# --- What is told ----------------------------------------------------------------------------------------------------


def run(script: Path, cases: Sequence[Case], after: Sequence[tuple[Case, int]], as_json: bool) -> int:
    """Prints the table of `prove`; returns 0 where all is as it should be that this machine can run, else 1."""
    rows = prove(script, cases, after)
    if as_json:
        print(json.dumps([asdict(row) | {"verdict": row.verdict} for row in rows], indent=2))
    else:
        lines = [("check", "of", "difference", "bound", "", "")]
        lines += [(r.check, r.case, _number(r.difference), _number(r.bound), r.verdict, _note(r)) for r in rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    count = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("ok", "WRONG", "not run")}
    told = f"{count['ok']} proven, {count['WRONG']} wrong, {count['not run']} not run"
    print(f"verify: {script}: {told}", file=sys.stderr)
    return 1 if count["WRONG"] else 0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value else "0"


def _note(row: Row) -> str:
    return "" if row.verdict == "ok" else row.note
