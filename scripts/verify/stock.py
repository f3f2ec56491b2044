"""The script held against the stock loop: each of its steps computed here again, in fp64, one example at a time.

A step is computed from the checkpoint before it, so that a difference is that step's own, and rounding does not grow.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from babl.errors import UserError
from babl.generation import Engine, GenerationConfig
from babl.models import from_pretrained
from babl.models.layers import Model
from babl.scripts.verify import dropout
from babl.scripts.verify.runs import DECAY, LR, MAX_NORM, SMOOTHING, STEPS, VALIDATED, WARMUP, Job, stored, weights
from babl.scripts.verify.statements import Statements, listed
from babl.scripts.verify.subject import SEED, Ids
from babl.scripts.verify.table import Row, Worst, failed, skipped

T = TypeVar("T")
BETAS, EPSILON = (0.9, 0.98), 1e-8
EXACT = 2e-5  # of fp32 beside fp64, relative to the largest of a tensor, or of 1 % of the largest gradient
ERRORS = (UserError, AttributeError, LookupError, OSError, TypeError, ValueError)  # of reading what a script left


class Step(NamedTuple):
    """One step as it should have been.

    Attributes:
        number: From 1.
        examples: Which ones it had, or might have had.
        found: Whether these have the logged loss.
        logged: What belongs in metrics.jsonl.
        gradients: After clipping, by parameter.
    """

    number: int
    examples: list[int]
    found: bool
    logged: dict[str, float]
    gradients: dict[str, Tensor]


def case_rows(job: Job, said: Statements) -> list[Row]:
    """Returns how far a run is from what it should have done."""
    name = str(job.case)
    absent = [step for step in range(1, STEPS + 1) if step not in job.saved()]
    if job.failure or absent:
        return [failed("run", name, job.failure or f"no checkpoint step_{absent[0]:06d}")]
    lines = tried("metrics", name, job.metrics)
    if isinstance(lines, Row):
        return [lines]
    by_step = {line["step"]: line for line in lines if "loss" in line}
    steps = tried("weights", name, lambda: [_step(job, n, by_step.get(n, {}), said) for n in range(1, STEPS + 1)])
    if isinstance(steps, Row):
        return [steps]
    rows = [tried("order", name, lambda: _order(job, steps))]
    found = tried("AdamW", name, lambda: _updates(job, steps, said))
    rows += [found] if isinstance(found, Row) else found
    rows.append(tried("metrics", name, lambda: _metrics(job, steps, lines).row("metrics", name)))
    rows.append(tried("decode", name, lambda: _decode(job).row("decode", name)))
    return rows


def tried(check: str, case: str, compare: Callable[[], T]) -> T | Row:
    """Returns what `compare` does, or a row that says what could not be read."""
    try:
        return compare()
    except ERRORS as error:
        what = str(error) if isinstance(error, UserError) else f"what the script left cannot be read: {error!r}"
        return failed(check, case, what)


# --- One step --------------------------------------------------------------------------------------------------------


def _step(job: Job, number: int, line: dict[str, float], said: Statements) -> Step:
    """Returns a step, computed from the checkpoint before it and from the line that says how many examples it had."""
    model = dropout.number_sites(from_pretrained(job.checkpoint(number - 1), torch.float64).train())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not said.fixes(name))
    keys = [dropout.key(SEED, number, example) for example in range(len(job.subject.train))]
    with dropout.installed() as sites:
        losses = [
            _loss(model, source, target, key) for (source, target), key in zip(job.subject.train, keys, strict=True)
        ]
    assert sites, "the model's dropout does not go through babl.ops.dropout"
    counts = [len(target) for _, target in job.subject.train]
    examples = _examples([loss.item() for loss in losses], counts, line)
    targets = sum(counts[i] for i in examples)
    total = torch.stack([losses[i] for i in examples]).sum() / targets
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    logged = {"loss": total.item(), "lr": _learning_rate(number), "grad_norm": norm}
    logged |= {"target_tokens": targets, "examples": len(examples)}
    found = abs(total.item() - line.get("loss", math.nan)) <= EXACT * total.item()
    return Step(number, examples, found, logged, {n: g * min(1.0, MAX_NORM / norm) for n, g in gradients.items()})


def _examples(losses: list[float], counts: list[int], line: dict[str, float]) -> list[int]:
    """Returns which examples a step had: of all sets of as many, with as many targets, the one of the logged loss."""

    def mean(chosen: Sequence[int]) -> float:
        return sum(losses[i] for i in chosen) / sum(counts[i] for i in chosen)

    sets = [list(c) for size in range(1, len(losses) + 1) for c in combinations(range(len(losses)), size)]
    named = [
        c for c in sets if (len(c), sum(counts[i] for i in c)) == (line.get("examples"), line.get("target_tokens"))
    ]
    return min(named or sets, key=lambda chosen: abs(mean(chosen) - line.get("loss", 0.0)))


def _loss(model: Model, source: list[int], target: list[int], key: int) -> Tensor:
    """Returns the smoothed cross-entropy of one example, summed over its targets."""
    log_probs = _log_probs(model, source, target, key)
    return -((1 - SMOOTHING) * _of(target, log_probs) + SMOOTHING * log_probs.mean(-1)).sum()


def _log_probs(model: Model, source: list[int], target: list[int], key: int | None = None) -> Tensor:
    """Returns what one example's model thinks of every token, (T, V), each predicted by what stands before it."""
    read = torch.tensor([source])
    dropped = None if key is None else torch.tensor([key])
    if model.is_encoder_decoder:
        before = torch.tensor([[model.config.decoder_start_token_id, *target[:-1]]])
        logits = model(input_ids=read, decoder_input_ids=before, dropout_key=dropped)[0]  # (T, V)
    else:
        read = torch.tensor([[*source, *target[:-1]]])
        logits = model(input_ids=read, dropout_key=dropped)[0, len(source) - 1 :]  # (T, V)
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


# --- What differs ----------------------------------------------------------------------------------------------------


def _order(job: Job, steps: list[Step]) -> Row:
    """Returns how many times an example came too often or not at all in the run's two epochs."""
    name, middle = str(job.case), len(steps) // 2
    everything = list(range(len(job.subject.train)))
    unknown = [step.number for step in steps if not step.found]
    if unknown:
        return skipped("order", name, f"step {unknown[0]}: no set of examples has the logged number, targets and loss")
    for epoch in (steps[:middle], steps[middle:]):
        had = sorted(example for step in epoch for example in step.examples)
        wrong = sum(abs(had.count(example) - 1) for example in everything)
        if wrong:
            where = " and ".join(f"step {step.number} had {step.examples}" for step in epoch)
            return Row("order", name, float(wrong), 0.0, where)
    return Row("order", name, 0.0, 0.0)


def _updates(job: Job, steps: list[Step], said: Statements) -> list[Row]:
    """Returns how far gradients and AdamW's steps are from what they should be, and whose state there is not."""
    gradient, adamw, lacking = Worst(EXACT), Worst(EXACT), dict[str, str]()
    decays, name = _decays(from_pretrained(job.subject.folder)), str(job.case)
    for step in steps:
        at, (beta1, beta2) = step.number, BETAS
        before, after = (stored(job.checkpoint(n), "optimizer*.safetensors") for n in (at - 1, at))
        start, moved = weights(job.checkpoint(at - 1)), weights(job.checkpoint(at))
        floor = 0.01 * max(g.abs().max().item() for g in step.gradients.values())
        for parameter, w in start.items():
            where, change = f"{parameter}, step {at}", (moved[parameter] - w).abs().max().item()
            if said.fixes(parameter):
                adamw.add(change, f"{where}, moved, though it is said not to", 0.0)
                continue
            parts = [f"{parameter}/{part}" for part in ("exp_avg", "exp_avg_sq")]
            if not all(part in after for part in parts):
                lacking[parameter] = "moved" if change else lacking.get(parameter, "did not move")
                continue
            (m0, v0), (m, v) = ([each.get(part, torch.zeros_like(w)) for part in parts] for each in (before, after))
            g = step.gradients[parameter]
            largest = max(g.abs().max().item(), floor)
            gradient.add((m - (beta1 * m0 + (1 - beta1) * g)).abs().max().item() / ((1 - beta1) * largest), where)
            adamw.add((v - (beta2 * v0 + (1 - beta2) * g**2)).abs().max().item() / ((1 - beta2) * largest**2), where)
            # From the moments just proven, as those of the file: a gradient that is all rounding has a step, too.
            update = m / (1 - beta1**at) / ((v / (1 - beta2**at)).sqrt() + EPSILON)
            lr = _learning_rate(at) * said.factor(parameter)
            expected = w * (1 - lr * decays[parameter]) - lr * update
            adamw.add((moved[parameter] - expected).abs().max().item() / moved[parameter].abs().max().item(), where)
    return _state_rows(name, lacking, len(decays), [gradient.row("gradient", name), adamw.row("AdamW", name)])


def _state_rows(name: str, lacking: dict[str, str], number: int, compared: list[Row]) -> list[Row]:
    """Returns the rows compared, and one that says which parameters have no AdamW state to be compared."""
    if not lacking:
        return compared
    rows = []
    for how in sorted(set(lacking.values())):
        these = [parameter for parameter, did in lacking.items() if did == how]
        rows.append(failed("state", name, f"no AdamW state, and {how}: {listed(these, number)}"))
    if len(lacking) == number:
        return rows + [skipped(row.check, name, "the optimizer is not AdamW; try --self") for row in compared]
    return rows + compared


def _metrics(job: Job, steps: list[Step], lines: list[dict]) -> Worst:
    """Returns the largest difference of what was logged."""
    worst = Worst(EXACT)
    kinds = [(line["step"], "validation_loss" in line) for line in lines]
    expected = [(n, False) for n in range(1, STEPS + 1)] + [(n, True) for n in VALIDATED]
    if sorted(kinds) != sorted(expected):
        worst.add(math.inf, f"lines of steps {[step for step, _ in kinds]}")
    by_step = {line["step"]: line for line in lines if "loss" in line}
    for step in steps:
        for key, value in step.logged.items():
            logged = by_step.get(step.number, {}).get(key, math.nan)
            worst.add(abs(logged - value) / abs(value), f"{key}, step {step.number}")
    validations = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    for number in VALIDATED:
        value = _validation_loss(job, number)
        worst.add(abs(validations.get(number, math.nan) - value) / value, f"validation_loss, step {number}")
    return worst


@torch.no_grad()
def _validation_loss(job: Job, step: int) -> float:
    model = from_pretrained(job.checkpoint(step), torch.float64)
    found = [_of(target, _log_probs(model, source, target)).sum().item() for source, target in job.subject.validation]
    return -sum(found) / sum(len(target) for _, target in job.subject.validation)


@torch.no_grad()
def _decode(job: Job) -> Worst:
    """Returns how far what the engine writes, token by token, is from the whole text computed at once."""
    checkpoint, subject, worst = job.checkpoint(STEPS), job.subject, Worst(EXACT)
    answers = Engine.load(checkpoint, "cpu", "float32").answer(subject.prompts, GenerationConfig(max_new_tokens=6))
    model = from_pretrained(checkpoint, torch.float64)
    examples: list[Ids] = [*subject.train, *subject.validation]
    for number, (answer, (source, _)) in enumerate(zip(answers, examples, strict=True)):
        log_probs = _log_probs(model, source, list(answer.ids))
        said = _of(answer.ids, log_probs)
        worst.add(abs(said.sum().item() - answer.log_prob) / abs(said.sum().item()), f"prompt {number}")
        worst.add((log_probs.max(-1).values - said).max().item(), f"prompt {number}, not the likeliest")
    return worst
