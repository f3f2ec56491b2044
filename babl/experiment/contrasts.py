"""The differences that an experiment is about, each with what is known of how sure it is.

A side of a contrast is an arm tested under its own condition (`gold`), or `arm@condition`: `mixture@none` is the model
trained with and without the context, tested without.
"""

from typing import Any

import numpy as np

from babl.evaluation.statistics import (
    Interval,
    cluster_standard_error,
    estimate,
    holm,
    mcnemar,
    randomisation_test,
    redrawn_standard_error,
    seed_sign_test,
    variance_components,
)
from babl.experiment.results import Metric, Outcome, Results

Row = dict[str, Any]
Pair = tuple[str, str]

REFERENCES = ("none", "random")  # every arm is compared with them
SE_AGREEMENT = 0.15  # share by which two standard errors of one difference may differ


def arm_and_condition(side: str) -> Pair:
    """Returns the arm trained in and the condition tested under."""
    arm, _, condition = side.partition("@")
    return arm, condition or arm


def own_sides(results: Results) -> list[str]:
    """Returns the sides of the main table: every arm under its own condition, the mixture under both of its."""
    sides = []
    for arm in results.plan["arms"]:
        sides += [f"mixture@{condition}" for condition in ("gold", "none")] if arm == "mixture" else [arm]
    return [side for side in sides if arm_and_condition(side)[1] in results.plan["tests"]]


def outcomes(results: Results, model: str, side: str) -> dict[int, Outcome]:
    """Returns the scored outcomes of a side, by seed."""
    return results.done(model, *arm_and_condition(side))


def metric_of(results: Results) -> Metric:
    """Returns what decides, by the plan."""
    found: Metric = results.plan["primary"]["metric"]
    return found


def scores(results: Results, model: str, side: str, metric: Metric = "exact") -> np.ndarray:
    """Returns the (S, N) scores in percent of a side, one row a seed."""
    rows = [getattr(outcome, metric) for outcome in outcomes(results, model, side).values()]
    return np.array(rows).reshape(len(rows), len(results.test))


def declared_roles(plan: dict[str, Any]) -> dict[Pair, list[str]]:
    """Returns what the plan calls each contrast it names: primary, secondary, equivalence."""
    roles: dict[Pair, list[str]] = {tuple(plan["primary"]["contrast"]): ["primary"]}
    for role, key in (("secondary", "secondary"), ("equivalence", "equivalence")):
        for pair in plan[key]:
            roles.setdefault(tuple(pair), []).append(role)
    return roles


def contrasts(results: Results) -> list[Row]:
    """Returns a row for each contrast of each model: those the plan names, then each side against none and random."""
    plan = results.plan
    roles = declared_roles(plan)
    sides = own_sides(results)
    pairs = list(roles)
    possible = [(side, ref) for ref in REFERENCES if ref in sides for side in sides if side != ref]
    possible += [("mixture@gold", "mixture@none")] if {"mixture@gold", "mixture@none"} <= set(sides) else []
    for a, b in possible:
        if not {(a, b), (b, a)} & set(pairs):
            pairs.append((a, b))
    rows = []
    for model in plan["models"]:
        of_model = [_contrast(results, model, pair, roles.get(pair, [])) for pair in pairs]
        of_model = [row for row in of_model if row["seeds"] or row["role"] != "post hoc"]
        secondary = {row["contrast"]: row for row in of_model if "secondary" in row["role"] and row["seeds"]}
        known = {name: 1.0 if row["p"] is None else row["p"] for name, row in secondary.items()}
        for name, p in holm(known).items():
            secondary[name]["p_holm"] = None if secondary[name]["p"] is None else p
        rows += of_model
    return rows


def _contrast(results: Results, model: str, pair: Pair, roles: list[str]) -> Row:
    """Returns the paired difference of two sides, in points of the plan's metric, over the seeds that both have."""
    plan = results.plan
    metric = metric_of(results)
    a, b = (outcomes(results, model, side) for side in pair)
    seeds = [seed for seed in a if seed in b]
    row: Row = {"model": model, "metric": metric, "contrast": f"{pair[0]} − {pair[1]}", "a": pair[0], "b": pair[1]}
    row |= {"role": ", ".join(roles) or "post hoc", "seeds": len(seeds)}
    if not seeds:
        return row
    titles = results.titles
    d = _differences(a, b, seeds, metric)
    sure, models = estimate(d, titles), estimate(d, titles, "articles")
    row |= {
        "scope": sure.scope,
        "mean_a": np.mean([getattr(a[seed], metric) for seed in seeds]),
        "mean_b": np.mean([getattr(b[seed], metric) for seed in seeds]),
        "difference": d.mean(),
        **ends(sure.interval(), -100),
        "unknown": sure.unknown,
        **ends(models.interval(), -100, "models_"),
        "difference_by_seed": "; ".join(f"{mean:+.8g}" for mean in d.mean(1)),
        "macro": np.mean([d.mean(0)[titles == title].mean() for title in np.unique(titles)]),
        "p": sure.p,
        "p_models": randomisation_test(d, titles, draws=10 * plan["bootstrap_samples"]),
        "p_seeds": seed_sign_test(d),
        "p_naive": mcnemar(getattr(a[seeds[0]], metric), getattr(b[seeds[0]], metric)),
        **_standard_errors(results, d.mean(0), bool(models.unknown)),
        "se": sure.error,
        "mde": sure.detectable,
    }
    if "equivalence" in roles:
        row["p_equivalence"] = sure.p_equivalent(plan["margin"])
    return row


def _standard_errors(results: Results, per_question: np.ndarray, unknown: bool) -> Row:
    """Returns the standard error over articles in closed form and by redrawing, and whether the two agree."""
    if unknown:
        return dict.fromkeys(("se_articles", "se_redrawn", "se_agree"))
    closed = cluster_standard_error(per_question, results.titles)
    redrawn = redrawn_standard_error(per_question, results.titles, samples=results.plan["bootstrap_samples"])
    return {"se_articles": closed, "se_redrawn": redrawn, "se_agree": abs(redrawn - closed) <= SE_AGREEMENT * closed}


def ends(interval: Interval | None, least: float, prefix: str = "") -> Row:
    """Returns both ends of an interval of percentages, or of their differences, inside what is possible."""
    ends = interval and (max(interval[0], least), min(interval[1], 100.0))
    return dict(zip((f"{prefix}low", f"{prefix}high"), ends or (None, None), strict=True))


def _differences(a: dict[int, Outcome], b: dict[int, Outcome], seeds: list[int], metric: Metric) -> np.ndarray:
    """Returns the (S, N) paired differences, in points."""
    return np.array([getattr(a[seed], metric) - getattr(b[seed], metric) for seed in seeds])


def primary_details(results: Results) -> list[Row]:
    """Returns, for each model, where the variance of a single difference of the primary contrast comes from."""
    pair, metric = results.plan["primary"]["contrast"], metric_of(results)
    rows = []
    for model in results.plan["models"]:
        a, b = (outcomes(results, model, side) for side in pair)
        seeds = [seed for seed in a if seed in b]
        if not seeds:
            continue
        parts: dict[str, float] = variance_components(_differences(a, b, seeds, metric), results.titles)
        whole = sum(parts.values())
        if len(seeds) == 1:  # what seeds do is not known, and stands among the questions
            parts = {"article": parts["article"], "question and residual": parts["question"]}
        if whole:
            rows.append({"model": model, "metric": metric} | {f"share_{n}": part / whole for n, part in parts.items()})
    return rows
