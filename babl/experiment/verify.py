"""Whether an experiment's folder is what was computed: every hash made anew, every answer scored again."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from babl.data.contexts import Arm, build_views
from babl.data.formats import data_hash
from babl.data.sets import FICTIONAL
from babl.errors import UserError
from babl.evaluation.predictions import read_predictions
from babl.experiment.plan import Cell, Plan, environment, manifest
from babl.experiment.run import conditions, read_json, scores_of, weights_hash
from babl.files import file_hash


def mismatches(plan: Plan) -> list[str]:
    """Returns a line for everything that is not what the plan, or a later stage, says it is."""
    found = [*_data(plan), *_surroundings(plan)]
    orders: dict[tuple[str, int, str], set[str]] = defaultdict(set)  # models and trials may differ in steps
    for cell in (*plan.trials, *plan.cells):
        folder = plan.folder / "cells" / cell.id
        trained = read_json(folder / "trained.json")
        if trained and not trained["failed"]:
            orders[cell.model, cell.seed, str(cell.settings)].add(trained["order"])
            if weights_hash(folder / "run" / "checkpoints" / "latest") != trained["weights"]:
                found.append(f"{cell.id}: the weights are not those that were trained")
        found += _scores(plan, cell)
    found += [
        f"{model}, seed {seed}: arms were trained in {len(seen)} different orders"
        for (model, seed, _), seen in orders.items()
        if len(seen) > 1
    ]
    return found


def _data(plan: Plan) -> Iterator[str]:
    """Yields a line for each file of data/ that was changed, and each context that is made in another way now."""
    stated = plan.tree["data"]
    changed = set()
    for name, digest in stated["sha256"].items():
        path = plan.folder / "data" / name
        if not path.exists() or file_hash(path) != digest:
            changed.add(name)
            yield f"data/{name}: not what the plan was made of"
    for part in ("train", "validation", "test"):
        if changed & {f"{part}.json", f"contexts-{part}.jsonl"}:
            continue
        arms: list[Arm] = plan.tree["tests"] if part == "test" else plan.tree["arms"]
        rows = manifest(plan.data(part), arms, stated["context_seed"])
        written = (plan.folder / "data" / f"contexts-{part}.jsonl").read_text(encoding="utf-8").splitlines()
        for row, line in zip(rows, written, strict=True):
            if row != json.loads(line):
                yield f"data/contexts-{part}.jsonl: question {row['id']} is shown otherwise now"
                break


def _surroundings(plan: Plan) -> Iterator[str]:
    """Yields a line for each source file, package and part of the code that is another one now."""
    for name, source in plan.tree["data"]["sources"].items():
        if source["file"] != FICTIONAL and not _is_source(source):
            yield f"{name}: {source['file']} is not the file that the plan was made of"
    now = environment()
    for name, value in plan.tree["environment"].items():
        if value != now[name]:
            yield f"environment: {name} is another one than planned"
    for model, start in plan.tree["starts"].items():
        path = plan.tree["settings"][model].get("model.path", plan.tree["run"]["model"]["path"])
        for name, digest in start["weights"].items() if path else ():
            if not _is(Path(path) / name, digest):
                yield f"model {model}: {path}/{name} is not what the plan names"


def _is_source(source: dict[str, str]) -> bool:
    try:
        return data_hash(source["file"]) == source["sha256"]
    except (OSError, UserError):
        return False


def _is(path: Path, digest: str) -> bool:
    return path.exists() and file_hash(path) == digest


def _scores(plan: Plan, cell: Cell) -> Iterator[str]:
    """Yields a line for each condition whose answers were changed, or score otherwise now."""
    folder = plan.folder / "cells" / cell.id
    scored = read_json(folder / "scored.json")
    if scored is None:
        return
    for part, condition in conditions(plan, cell):
        path = folder / "predictions" / f"{condition}.jsonl"
        examples = plan.data(part)
        views, _ = build_views(examples, condition, plan.tree["data"]["context_seed"])
        try:
            now = scores_of(examples, views, read_predictions(path)) | {"predictions": file_hash(path)}
        except (UserError, OSError) as error:
            yield f"{cell.id}: {error}"
            continue
        if now != scored[condition]:
            what = "answers" if now["predictions"] != scored[condition]["predictions"] else "scores"
            yield f"{cell.id}: the {what} under {condition} are not those that were written"
