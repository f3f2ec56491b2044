"""The figures of a report beside its contrasts: every one a list of rows, computed from stored answers alone.

A column of scores is named by its metric, `exact` or `f1`; where that depends on the plan, `metric` says which it is.
Intervals are those of `babl.evaluation.statistics.estimate`: None where there is none; `scope` says what is drawn anew.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

import numpy as np

from babl.data.squad import to_squad
from babl.evaluation.baselines import baselines
from babl.evaluation.errors import ERROR_KINDS, error_kind
from babl.evaluation.selective import selective_report
from babl.evaluation.squad import question_scores
from babl.evaluation.statistics import estimate, estimate_score, randomisation_test
from babl.experiment.contrasts import (
    REFERENCES,
    Pair,
    Row,
    arm_and_condition,
    ends,
    metric_of,
    outcomes,
    own_sides,
    scores,
)
from babl.experiment.results import REWRITTEN, Metric, Outcome, Results
from babl.experiment.strata import POSITIONS, STRATA, position_label, stratify

UNINFORMED = ("none", "blank", "random")  # what they show tells nothing of the answer, so chance is their truth
DEALS = 4  # random deals of articles for each pair of seeds
DEAL_DRAWS = 2_000  # sign flips of one of the many A/A tests


# ---- the table


def table(results: Results, compared: list[Row]) -> list[Row]:
    """Returns the main table: a row for each model and side, then the baselines.

    Args:
        results: All of it.
        compared: Of `contrasts.contrasts`.
    """
    found = {(row["model"], row["a"], row["b"]): row for row in compared if row["seeds"]}
    rows, metric = [], metric_of(results)
    for model in results.plan["models"]:
        for side in own_sides(results):
            row = _table_row(results, model, side)
            for reference in REFERENCES:
                against = found.get((model, side, reference), {})
                for key in ("difference", "low", "high", "p", "p_holm", "scope"):
                    row[f"vs_{reference}_{metric}_{key}"] = against.get(key)
            rows.append(row)
    return rows + _baseline_rows(results)


def _table_row(results: Results, model: str, side: str) -> Row:
    arm, _ = arm_and_condition(side)
    cells = [cell for cell in results.cells if (cell.model, cell.arm) == (model, arm)]
    done = outcomes(results, model, side)
    row: Row = {
        "model": model,
        "side": side,
        "n": len(results.test),
        "articles": len(set(results.titles)),
        "seeds_done": len(done),
        "seeds_planned": len(cells),
        "seeds_failed": sum(cell.state == "failed" for cell in cells),
    }
    metrics: tuple[Metric, ...] = ("exact", "f1")
    for metric in metrics:
        row |= _mean_row(results, scores(results, model, side, metric), metric)
    clean, decides = clean_mask(results), metric_of(results)
    trained = [cell.trained for cell in cells if cell.trained and cell.seed in done]
    of_clean = scores(results, model, side, decides)[:, clean]
    row[f"{decides}_clean"] = of_clean.mean() if of_clean.size else None
    row |= {
        "truncated": _mean(100 * ~outcome.complete for outcome in done.values()),
        "windowed": _mean(100 * (outcome.windows > 1) for outcome in done.values()),
        "empty": _mean(100 * outcome.empty for outcome in done.values()),
        "output_tokens": _mean(outcome.tokens for outcome in done.values()),
        "train_tokens": _mean(of["tokens"] for of in trained),
        "flops": _mean(of["flops"] for of in trained),
        "chosen": "; ".join(sorted({_settings(of["chosen"]) for of in trained})),
        "plan": results.plan["hash"][:12],
    }
    return row


def _mean_row(results: Results, values: np.ndarray, metric: Metric) -> Row:
    """Returns the mean of (S, N) scores, the standard deviation of the seeds' means, and the interval."""
    if not len(values):
        return dict.fromkeys([metric, f"{metric}_sd", f"{metric}_low", f"{metric}_high", f"{metric}_scope"])
    sure = estimate_score(values, results.titles)
    sd = values.mean(1).std(ddof=1) if len(values) > 1 else None
    row = {metric: sure.mean, f"{metric}_sd": sd, **ends(sure.score_interval(), 0, f"{metric}_")}
    return row | {f"{metric}_scope": sure.scope}


def _baseline_rows(results: Results) -> list[Row]:
    rows = []
    clean, decides = clean_mask(results), metric_of(results)
    metrics: tuple[Metric, ...] = ("exact", "f1")
    for name, predictions in baselines(results.train, results.test, results.plan["data"]["context_seed"]).items():
        found = question_scores(to_squad(results.test), predictions)
        row: Row = {"model": "baseline", "side": name, "n": len(results.test), "articles": len(set(results.titles))}
        for metric in metrics:
            values = np.array([[100 * getattr(found[e.id], metric) for e in results.test]])
            row |= _mean_row(results, values, metric)
            if metric == decides and clean.any():
                row[f"{metric}_clean"] = values[:, clean].mean()
        row["empty"] = 100 * np.mean([not predictions[e.id] for e in results.test])
        rows.append(row | {"plan": results.plan["hash"][:12]})
    return rows


def clean_mask(results: Results) -> np.ndarray:
    """Returns the (N,) mask of questions of which neither question nor answer is in the training set."""
    return np.array([results.classes["strict"][e.id] == "none" for e in results.test])


def _mean(values: Iterable[Any]) -> float | None:
    found = [np.mean(value) for value in values]
    return float(np.mean(found)) if found else None


def _settings(chosen: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(chosen.items()))


def cell_rows(results: Results) -> list[Row]:
    """Returns how far each cell of the plan is, none left out."""
    rows = []
    for cell in results.cells:
        trained = cell.trained or {}
        row: Row = {"id": cell.id, "model": cell.model, "arm": cell.arm, "seed": cell.seed, "state": cell.state}
        row |= {"reason": cell.failed} | {
            key: trained.get(key) for key in ("steps", "examples", "final_loss", "weights")
        }
        rows.append(row)
    return rows


def timing_rows(results: Results) -> list[Row]:
    """Returns the seconds on the clock of each cell, which differ between two runs that are otherwise the same."""
    return [
        {"cell": c.id, "stage": stage, "seconds": s} for c in results.cells for stage, s in sorted(c.seconds.items())
    ]


def trial_rows(results: Results) -> list[Row]:
    """Returns every trial of the grid, and whether its settings are those that its arm was trained with."""
    chosen = {(cell.model, cell.arm): cell.trained["chosen"] for cell in results.cells if cell.trained}
    return [
        trial
        | {"settings": _settings(trial["settings"])}
        | {"chosen": chosen.get((trial["model"], trial["arm"])) == trial["settings"]}
        for trial in results.trials
    ]


# ---- what the pictures show


def matrix(results: Results) -> list[Row]:
    """Returns the score of every arm under every condition."""
    rows, metric = [], metric_of(results)
    for model in results.plan["models"]:
        for arm in results.plan["arms"]:
            for condition in results.plan["tests"]:
                values = scores(results, model, f"{arm}@{condition}", metric)
                row = {"model": model, "arm": arm, "condition": condition, "seeds": len(values), "metric": metric}
                rows.append(row | {metric: values.mean() if len(values) else None})
    return rows


def strata(results: Results) -> list[Row]:
    """Returns both sides of the primary contrast in each stratum, with the interval of their difference."""
    (a, b), metric = results.plan["primary"]["contrast"], metric_of(results)
    masks = stratify(results.test, results.classes)
    rows = []
    for model in results.plan["models"]:
        done_a, done_b = outcomes(results, model, a), outcomes(results, model, b)
        seeds = [seed for seed in done_a if seed in done_b]
        if not seeds:
            continue
        of_a, of_b = (np.array([getattr(done[seed], metric) for seed in seeds]) for done in (done_a, done_b))
        for stratum, values in masks.items():
            assert sum(mask.sum() for mask in values.values()) == len(results.test), stratum
            for value, mask in values.items():
                row = {"model": model, "stratum": stratum, "value": value, "n": int(mask.sum())}
                row |= {
                    "metric": metric,
                    "articles": len(set(results.titles[mask])),
                    "a": of_a[:, mask].mean(),
                    "b": of_b[:, mask].mean(),
                }
                row["difference"] = row["a"] - row["b"]
                sure = estimate((of_a - of_b)[:, mask], results.titles[mask])
                rows.append(row | ends(sure.interval(), -100) | {"scope": sure.scope})
    return rows


def learning_curves(results: Results) -> list[Row]:
    """Returns the validation loss of every trained cell, also of those that count as failed."""
    return [
        {"model": cell.model, "arm": cell.arm, "seed": cell.seed, "failed": bool(cell.failed)} | point
        for cell in results.cells
        if cell.trained
        for point in cell.trained.get("curve", [])
    ]


def seed_scores(results: Results) -> list[Row]:
    """Returns the score of each seed of each side."""
    level, metric = results.plan["chance_exact"], metric_of(results)
    return [
        {"model": model, "side": side, "seed": seed, "exact": outcome.exact.mean(), "f1": outcome.f1.mean()}
        | {"metric": metric, "chance_exact": level}
        for model, side in _sides_done(results)
        for seed, outcome in outcomes(results, model, side).items()
    ]


def _sides_done(results: Results) -> Iterator[Pair]:
    """Yields each model and side with a scored seed."""
    for model in results.plan["models"]:
        yield from ((model, side) for side in own_sides(results) if outcomes(results, model, side))


def selective(results: Results) -> list[Row]:
    """Returns what a model's confidence is worth, of each side, all its seeds in one; the last keys hold curves."""
    rows = []
    has_answer = np.array([not e.impossible for e in results.test])
    for model, side in _sides_done(results):
        done = list(outcomes(results, model, side).values())
        confidences = {"answer": [np.exp(outcome.log_prob) for outcome in done]}
        if all(outcome.no_answer is not None for outcome in done):
            confidences["1 − no answer"] = [1 - outcome.no_answer for outcome in done if outcome.no_answer is not None]
        right = np.concatenate([outcome.exact / 100 for outcome in done])
        titles: Any = np.tile(results.titles, len(done))
        answerable = np.tile(has_answer, len(done))
        for name, values in confidences.items():
            worth = selective_report(right, np.clip(np.concatenate(values), 0, 1), titles, answerable)
            rows.append({"model": model, "side": side, "metric": "exact", "confidence": name} | worth)
    return rows


def reliability(worth: list[Row]) -> list[Row]:
    """Returns how often answers are right by how probable the model finds them, in bins of equally many answers."""
    return [
        {
            "model": row["model"],
            "side": row["side"],
            "share": 100 * share,
            "probability": 100 * said,
            "exact": 100 * was,
        }
        for row in worth
        if row["confidence"] == "answer"
        for share, said, was in zip(*(row["reliability"][key] for key in ("share", "said", "was")), strict=True)
    ]


def risk(worth: list[Row]) -> list[Row]:
    """Returns the share of the surest answers that are no exact match, by how many are given."""
    return [
        {"model": row["model"], "side": row["side"], "coverage": 100 * coverage, "not_exact": 100 * wrong}
        for row in worth
        if row["confidence"] == "answer"
        for coverage, wrong in zip(row["curve"]["coverage"], row["curve"]["risk"], strict=True)
    ]


def positions(results: Results) -> list[Row]:
    """Returns the score by the sentence in which the answer stands, of each side that shows it."""
    rows, metric = [], metric_of(results)
    for model, side in _sides_done(results):
        views = results.views(arm_and_condition(side)[1])
        labels = np.array([position_label(v.context, v.at) if v.context and v.at is not None else "" for v in views])
        values = scores(results, model, side, metric)
        for position in POSITIONS:
            mask = labels == position
            if mask.any():
                row = {"model": model, "side": side, "position": position, "n": int(mask.sum()), "metric": metric}
                sure = estimate_score(values[:, mask], results.titles[mask])
                rows.append(row | {metric: sure.mean, **ends(sure.score_interval(), 0, f"{metric}_")})
                rows[-1][f"{metric}_scope"] = sure.scope
    return rows


def errors(results: Results) -> list[Row]:
    """Returns how many answers of each side are right, and how many wrong in which way."""
    rows = []
    for model, side in _sides_done(results):
        views = results.views(arm_and_condition(side)[1])
        kinds: Counter[str] = Counter()
        for outcome in outcomes(results, model, side).values():
            for view, text, complete in zip(views, outcome.predictions, outcome.complete, strict=True):
                kinds[error_kind(text, view.golds, view.context, bool(complete))] += 1
        for kind in ERROR_KINDS:
            row = {"model": model, "side": side, "metric": "exact", "kind": kind, "answers": kinds[kind]}
            rows.append(row | {"percent": 100 * kinds[kind] / kinds.total()})
    return rows


def same_arm(results: Results) -> list[Row]:
    """Returns p values of differences in the plan's metric between seeds of one arm, where there is nothing to find.

    `seeds`: one seed against another; what a single run of each would have claimed. `dealt`: for each article a coin
    decides which of the two answers as A and which as B, so the test's assumption holds exactly and p is uniform.
    """
    rows, metric = [], metric_of(results)
    articles, member = np.unique(results.titles, return_inverse=True)
    for model, side in _sides_done(results):
        done = outcomes(results, model, side)
        for s, t in combinations(done, 2):
            d = (getattr(done[s], metric) - getattr(done[t], metric))[None]  # (1, N)
            coins = np.random.default_rng([s, t]).choice([-1, 1], (DEALS, len(articles)))
            tests = [("seeds", d)] + [("dealt", d * coin[member]) for coin in coins]
            for kind, values in tests:
                p = randomisation_test(values, results.titles, draws=DEAL_DRAWS)
                row = {"model": model, "side": side, "metric": metric, "first": s, "second": t}
                rows.append(row | {"kind": kind, "p": p})
    return rows


def counterfactual(results: Results) -> list[Row]:
    """Returns how often the answer matches the rewritten context's exactly, and how often the one from before."""
    if REWRITTEN not in results.plan["tests"]:
        return []
    original = to_squad(results.test)
    grades = stratify(results.test, results.classes).get("grade", {})
    parts = {"all": np.ones(len(results.test), bool)} | grades
    rows = []
    for model in results.plan["models"]:
        for arm in results.plan["arms"]:
            done = results.done(model, arm, REWRITTEN)
            if not done:
                continue
            new = np.array([outcome.exact for outcome in done.values()])
            old = np.array([_exact(results, original, outcome) for outcome in done.values()])
            for grade, mask in parts.items():
                n, o = new[:, mask].mean(), old[:, mask].mean()
                row = {"model": model, "arm": arm, "grade": grade, "n": int(mask.sum()), "new_exact": n}
                sure = estimate_score(new[:, mask], results.titles[mask])
                row |= ends(sure.score_interval(), 0, "new_exact_") | {"new_exact_scope": sure.scope}
                rows.append(row | {"old_exact": o, "memorised": o / (o + n) if o + n else None})
    return rows


def _exact(results: Results, dataset: dict[str, Any], outcome: Outcome) -> list[float]:
    predictions = {e.id: text for e, text in zip(results.test, outcome.predictions, strict=True)}
    found = question_scores(dataset, predictions)
    return [100 * found[e.id].exact for e in results.test]


# ---- what a reader must be told


def chance(results: Results, rows: list[Row]) -> list[Row]:
    """Returns, for sides that cannot know the answer, whether the interval of exact match holds the chance level.

    Without an interval, `covered` is None.

    Args:
        results: All of it.
        rows: Of `table`.
    """
    level = results.plan["chance_exact"]
    told = [row for row in rows if row["side"] in UNINFORMED and row["model"] != "baseline" and row["seeds_done"]]
    found = []
    for row in told if level is not None else ():
        low, high = row["exact_low"], row["exact_high"]
        covered = None if low is None else bool(low <= level <= high)
        found.append({key: row[key] for key in ("model", "side", "exact", "exact_low", "exact_high")})
        found[-1] |= {"chance_exact": level, "covered": covered}
    return found


def unequal(results: Results) -> list[str]:
    """Returns a sentence for each seed whose arms were not trained alike, where they should be."""
    told = []
    for model in results.plan["models"]:
        for seed in results.plan["seeds"]:
            cells = [c for c in results.cells if (c.model, c.seed) == (model, seed) and c.trained and not c.failed]
            for key, name in (("order", "order of questions"), ("steps", "steps"), ("examples", "examples")):
                if len({c.trained[key] for c in cells if c.trained}) > 1:
                    told.append(f"{model}, seed {seed}: the arms differ in {name}")
    return told


def post_hoc(results: Results, compared: list[Row]) -> list[str]:
    """Returns a line for everything in the report, or in the folder, that the plan does not name."""
    lines = [f"contrast {name}" for name in dict.fromkeys(r["contrast"] for r in compared if r["role"] == "post hoc")]
    shown = stratify(results.test, results.classes)
    lines += [f"stratum {name}" for name in STRATA if name in shown and name not in results.plan["strata"]]
    tests = {condition for cell in results.cells for condition in cell.outcomes}
    lines += [f"condition {name}" for name in sorted(tests - set(results.plan["tests"]))]
    return lines + [f"folder cells/{name}, not read" for name in results.strangers]
