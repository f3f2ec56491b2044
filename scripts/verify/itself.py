"""A script held against itself: however a step is split over ranks, micro-batches and backends, it is the same step.

The reference is the script on one rank with one micro-batch. What rounding may do to this script, with its loss and its
optimizer, is measured: the reference runs once more from weights that are moved by about one rounding, and what that
changes a tensor or a number by, several times over, is what another split may change it by. So Adam's first steps along
a gradient that is all rounding are no difference, and a gradient divided by the wrong number is one.
"""

import math
import re
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from babl.scripts.verify.runs import Job, stored, weights
from babl.scripts.verify.statements import Statements
from babl.scripts.verify.stock import tried
from babl.scripts.verify.table import Row, Worst, failed, skipped

MOVED = 2**-21  # how far the weights of the second reference start from the first's, relative to each
GROWTH = 16  # by how many times what that changes another split may change
ROUNDING = 2e-5  # or this, of the largest of a tensor, or of a number
RATE = 0.01  # of how far a tensor moves, where its rate is stated
SPLIT = {"padding_fraction"}  # of metrics.jsonl: what depends on the split
Found = dict[str, dict[str, float]]  # check -> what and where -> relative difference


def compared_rows(job: Job, reference: Job, moved: Job, ignored: Collection[str]) -> list[Row]:
    """Returns how far a run is from the reference.

    Args:
        job: On other ranks, micro-batches or another backend.
        reference: On one rank and with one micro-batch.
        moved: The reference from weights that are moved.
        ignored: Keys of metrics.jsonl that may depend on the split.
    """
    name = str(job.case)
    if job.refused:
        return [skipped("run", name, f"refused: {job.failure}")]
    if job.failure or reference.failure or moved.failure:
        return [failed("run", name, job.failure or f"the reference: {reference.failure or moved.failure}")]
    if job.saved() != reference.saved():
        return [failed("run", name, f"checkpoints of steps {job.saved()}, of the reference {reference.saved()}")]

    def rows() -> list[Row]:
        allowed, found = differences(reference, moved, ignored), differences(reference, job, ignored)
        result = []
        for check, these in found.items():
            worst = Worst(ROUNDING)
            for label, difference in these.items():
                growth = GROWTH * allowed[check].get(label, 0.0)
                worst.add(difference, label, max(ROUNDING, growth) if math.isfinite(growth) else ROUNDING)
            result.append(worst.row(check, name))
        return result

    result = tried("run", name, rows)
    return [result] if isinstance(result, Row) else result


def differences(one: Job, other: Job, ignored: Collection[str] = ()) -> Found:
    """Returns by what share all that two runs left differs, by check, and by tensor or key and step."""
    found: Found = {"metrics": {}, "weights": {}, "state": {}}
    lines, others = one.metrics(), other.metrics()
    if [line["step"] for line in lines] != [line["step"] for line in others]:
        found["metrics"]["the steps of metrics.jsonl"] = math.inf
    for line, again in zip(lines, others, strict=False):
        for key in sorted((line.keys() | again.keys()) - SPLIT - set(ignored)):
            found["metrics"][f"{key}, step {line['step']}"] = _apart(line.get(key), again.get(key))
    for step in sorted(set(one.saved()) & set(other.saved())):
        for check, read in (("weights", weights), ("state", state)):
            found[check] |= _tensors_apart(read(one.checkpoint(step)), read(other.checkpoint(step)), f", step {step}")
    return found


def state(checkpoint: Path) -> dict[str, Tensor]:
    """Returns every tensor of a checkpoint but the model's: the optimizer's, and what an edited loop has beside it."""
    found: dict[str, Tensor] = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        file = re.sub(r"-\d{5}-of-\d{5}", "", str(path.relative_to(checkpoint)))  # ranks write shards
        if file != "model.safetensors":
            prefix = "" if file == "optimizer.safetensors" else f"{file}: "
            found |= {prefix + key: value for key, value in stored(path.parent, path.name).items()}
    return found


def _tensors_apart(one: dict[str, Tensor], other: dict[str, Tensor], where: str) -> dict[str, float]:
    result = {f"{name}{where}, which only one has": math.inf for name in one.keys() ^ other.keys()}
    for name in one.keys() & other.keys():
        same = one[name].shape == other[name].shape
        scale = max(one[name].abs().max().item(), 1e-30) if one[name].numel() else 1.0
        result[name + where] = (one[name] - other[name]).abs().max().item() / scale if same else math.inf
    return result


def _apart(one: object, other: object) -> float:
    """Returns the relative difference of two numbers; of anything else, whether there is one."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) / max(abs(one), 1e-12)
    return 0.0 if one == other else math.inf


def resume_row(job: Job, step: int, gone_on: Job) -> Row:
    """Returns how far the end of a run that went on after `step` is from that of the one that was never stopped."""
    name = f"{job.case} after step {step}"
    if gone_on.failure:
        return failed("resume", name, gone_on.failure)
    exact = job.case.backend == "ddp"
    worst = Worst(0.0 if exact else 1e-6)  # of fp32 added up in another order

    def compare() -> Row:
        if job.checkpoint(step).stat().st_mtime_ns != gone_on.checkpoint(step).stat().st_mtime_ns:
            worst.add(math.inf, f"step {step} was done again")
        if job.saved() != gone_on.saved():
            worst.add(math.inf, f"checkpoints of steps {gone_on.saved()}, but {job.saved()} without a stop")
        for check in differences(job, gone_on).values():
            for where, difference in check.items():
                worst.add(difference, where)
        ends = job.checkpoint(job.saved()[-1]), gone_on.checkpoint(job.saved()[-1])
        for path in sorted(ends[0].rglob("*")) if exact else ():
            here = path.relative_to(ends[0])
            if path.is_file() and path.name not in ("run.toml", "manifest.json"):  # which say whether it was resumed
                other = ends[1] / here
                if not other.is_file() or path.read_bytes() != other.read_bytes():
                    worst.add(math.ulp(1.0), f"the bytes of {here}")
        return worst.row("resume", name)

    return tried("resume", name, compare)


def statement_rows(job: Job, base: Job | None, said: Statements) -> list[Row]:
    """Returns how far the parameters that are said not to move have moved, and how far the others' rates are off.

    Args:
        job: Any run of the script.
        base: The loop without those rates on one rank, whose first step says how far a parameter moves at the full one.
        said: What is said.
    """
    name, rows = str(job.case), []

    def fixed() -> Row:
        worst, start = Worst(0.0), weights(job.checkpoint(0))
        for step in job.saved():
            for parameter, value in weights(job.checkpoint(step)).items():
                if said.fixes(parameter):
                    worst.add((value - start[parameter]).abs().max().item(), f"{parameter} moved by step {step}")
        return worst.row("fixed", name)

    def rate(base: Job) -> Row:
        worst, start, stock = Worst(RATE), weights(job.checkpoint(0)), weights(base.checkpoint(1))
        for parameter, value in weights(job.checkpoint(1)).items():
            if said.states_rate(parameter):
                there = (stock[parameter] - start[parameter]).norm().item()
                factor = (value - start[parameter]).norm().item() / there if there else math.inf
                off = abs(factor / said.factor(parameter) - 1)
                worst.add(off, f"{parameter} moves {factor:.3g} times as far as in {base.script.name}")
        return worst.row("rate", name)

    if job.failure:
        return []
    if said.fixed:
        rows.append(tried("fixed", name, fixed))
    if said.rates and base is not None:
        rows.append(failed("rate", name, base.failure) if base.failure else tried("rate", name, lambda: rate(base)))
    return rows
