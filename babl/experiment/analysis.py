"""The figures of a report: every one a list of rows, computed from stored answers alone, the same each time.

A side of a contrast is an arm tested under its own condition (`gold`), or `arm@condition`: `mixture@none` is the model
trained with and without the context, tested without.
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
from babl.evaluation.statistics import (
    cluster_bootstrap,
    cluster_standard_error,
    crossed_bootstrap,
    crossed_interval,
    crossed_standard_error,
    crossed_test,
    equivalence_test,
    holm,
    mcnemar,
    minimal_detectable_effect,
    randomisation_test,
    seed_sign_test,
    variance_components,
)
from babl.experiment.results import REWRITTEN, Metric, Outcome, Results
from babl.experiment.strata import POSITIONS, STRATA, position_label, stratify

Row = dict[str, Any]
Pair = tuple[str, str]

REFERENCES = ("none", "random")  # every arm is compared with them
UNINFORMED = ("none", "blank", "random")  # what they show tells nothing of the answer, so chance is their truth
SE_AGREEMENT = 0.15  # share by which two standard errors of one difference may differ
FEWEST_ARTICLES = 5  # with fewer, no interval is given
DEALS = 4  # random deals of articles for each pair of seeds
DEAL_DRAWS = 2_000  # sign flips of one of the many A/A tests


# ---- sides and contrasts


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
        secondary = {row["contrast"]: row["p"] for row in of_model if "secondary" in row["role"] and row["seeds"]}
        for name, p in holm(secondary).items():
            next(row for row in of_model if row["contrast"] == name)["p_holm"] = p
        rows += of_model
    return rows


def _contrast(results: Results, model: str, pair: Pair, roles: list[str]) -> Row:
    """Returns the paired difference of two sides, in points, over the seeds that both have."""
    plan = results.plan
    metric, samples = plan["primary"]["metric"], plan["bootstrap_samples"]
    a, b = (outcomes(results, model, side) for side in pair)
    seeds = [seed for seed in a if seed in b]
    row: Row = {"model": model, "contrast": f"{pair[0]} − {pair[1]}", "a": pair[0], "b": pair[1]}
    row |= {"role": ", ".join(roles) or "post hoc", "seeds": len(seeds)}
    if not seeds:
        return row
    titles = results.titles
    d = _differences(a, b, seeds, metric)
    per_question = d.mean(0)
    low, high = np.clip(np.array(crossed_interval(d, titles)), -100, 100)
    redrawn_low, redrawn_high = np.clip(np.array(crossed_bootstrap(d, titles, samples=samples)), -100, 100)
    models_low, models_high = cluster_bootstrap(per_question, titles, samples=samples)
    se, df = crossed_standard_error(d, titles)
    se_articles, se_redrawn = cluster_standard_error(per_question, titles), (models_high - models_low) / (2 * 1.96)
    row |= {
        "mean_a": np.mean([getattr(a[seed], metric) for seed in seeds]),
        "mean_b": np.mean([getattr(b[seed], metric) for seed in seeds]),
        "difference": d.mean(),
        "low": low,
        "high": high,
        "redrawn_low": redrawn_low,
        "redrawn_high": redrawn_high,
        "models_low": models_low,
        "models_high": models_high,
        "macro": np.mean([per_question[titles == title].mean() for title in np.unique(titles)]),
        "p": crossed_test(d, titles),
        "p_models": randomisation_test(d, titles, draws=10 * samples),
        "p_seeds": seed_sign_test(d),
        "p_naive": mcnemar(getattr(a[seeds[0]], metric), getattr(b[seeds[0]], metric)),
        "se_articles": se_articles,
        "se_redrawn": se_redrawn,
        "se_agree": abs(se_redrawn - se_articles) <= SE_AGREEMENT * se_articles,
        "se": se,
        "mde": minimal_detectable_effect(se, df=df),
    }
    if "equivalence" in roles:
        row["p_equivalence"] = equivalence_test(d.mean(), se, plan["margin"], df)
    return row


def _differences(a: dict[int, Outcome], b: dict[int, Outcome], seeds: list[int], metric: Metric) -> np.ndarray:
    """Returns the (S, N) paired differences, in points."""
    return np.array([getattr(a[seed], metric) - getattr(b[seed], metric) for seed in seeds])


def primary_details(results: Results) -> list[Row]:
    """Returns, for each model, where the variance of a single difference of the primary contrast comes from."""
    pair, metric = results.plan["primary"]["contrast"], results.plan["primary"]["metric"]
    rows = []
    for model in results.plan["models"]:
        a, b = (outcomes(results, model, side) for side in pair)
        seeds = [seed for seed in a if seed in b]
        if seeds:
            parts = variance_components(_differences(a, b, seeds, metric), results.titles)
            whole = sum(parts.values()) or 1.0
            rows.append({"model": model} | {f"share_{name}": part / whole for name, part in parts.items()})
    return rows


# ---- the table


def table(results: Results, compared: list[Row]) -> list[Row]:
    """Returns the main table: a row for each model and side, then the baselines.

    Args:
        results: All of it.
        compared: Of `contrasts`.
    """
    found = {(row["model"], row["a"], row["b"]): row for row in compared if row["seeds"]}
    rows = []
    for model in results.plan["models"]:
        for side in own_sides(results):
            row = _table_row(results, model, side)
            for reference in REFERENCES:
                against = found.get((model, side, reference), {})
                for key in ("difference", "low", "high", "p", "p_holm"):
                    row[f"vs_{reference}_{key}"] = against.get(key)
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
    for metric in ("exact", "f1"):
        row |= _mean_row(results, scores(results, model, side, metric), metric)  # type: ignore[arg-type]
    clean = clean_mask(results)
    trained = [cell.trained for cell in cells if cell.trained and cell.seed in done]
    row["exact_clean"] = scores(results, model, side)[:, clean].mean() if done and clean.any() else None
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


def _mean_row(results: Results, values: np.ndarray, metric: str) -> Row:
    """Returns the mean of (S, N) scores, the standard deviation of the seeds' means, and the crossed interval."""
    if not len(values):
        return dict.fromkeys([metric, f"{metric}_sd", f"{metric}_low", f"{metric}_high"])
    low, high = np.clip(np.array(crossed_interval(values, results.titles)), 0, 100)
    sd = values.mean(1).std(ddof=1) if len(values) > 1 else None
    return {metric: values.mean(), f"{metric}_sd": sd, f"{metric}_low": low, f"{metric}_high": high}


def _baseline_rows(results: Results) -> list[Row]:
    rows = []
    clean, samples = clean_mask(results), results.plan["bootstrap_samples"]
    for name, predictions in baselines(results.train, results.test, results.plan["data"]["context_seed"]).items():
        found = question_scores(to_squad(results.test), predictions)
        row: Row = {"model": "baseline", "side": name, "n": len(results.test), "articles": len(set(results.titles))}
        for metric in ("exact", "f1"):
            values = np.array([100 * getattr(found[e.id], metric) for e in results.test])
            low, high = cluster_bootstrap(values, results.titles, samples=samples)
            row |= {metric: values.mean(), f"{metric}_low": low, f"{metric}_high": high}
            if metric == "exact" and clean.any():
                row["exact_clean"] = values[clean].mean()
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
    rows = []
    for model in results.plan["models"]:
        for arm in results.plan["arms"]:
            for condition in results.plan["tests"]:
                values = scores(results, model, f"{arm}@{condition}")
                row = {"model": model, "arm": arm, "condition": condition, "seeds": len(values)}
                rows.append(row | {"exact": values.mean() if len(values) else None})
    return rows


def strata(results: Results) -> list[Row]:
    """Returns both sides of the primary contrast in each stratum, with the interval of their difference."""
    (a, b), metric = results.plan["primary"]["contrast"], results.plan["primary"]["metric"]
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
                    "articles": len(set(results.titles[mask])),
                    "a": of_a[:, mask].mean(),
                    "b": of_b[:, mask].mean(),
                }
                row["difference"] = row["a"] - row["b"]
                rows.append(row | _interval(results, (of_a - of_b)[:, mask], mask, lowest=-100))
    return rows


def _interval(results: Results, values: np.ndarray, mask: np.ndarray, lowest: float = 0.0) -> Row:
    """Returns the interval of (S, n) scores or differences, where their questions come from enough articles."""
    if len(set(results.titles[mask])) < FEWEST_ARTICLES:
        return {"low": None, "high": None}
    low, high = np.clip(np.array(crossed_interval(values, results.titles[mask])), lowest, 100)
    return {"low": low, "high": high}


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
    level = results.plan["chance_exact"]
    return [
        {"model": model, "side": side, "seed": seed, "exact": outcome.exact.mean(), "f1": outcome.f1.mean()}
        | {"chance": level}
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
            rows.append({"model": model, "side": side, "confidence": name} | worth)
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
    """Returns the share of wrong answers among the surest ones, by how many are given."""
    return [
        {"model": row["model"], "side": row["side"], "coverage": 100 * coverage, "wrong": 100 * wrong}
        for row in worth
        if row["confidence"] == "answer"
        for coverage, wrong in zip(row["curve"]["coverage"], row["curve"]["risk"], strict=True)
    ]


def positions(results: Results) -> list[Row]:
    """Returns the score by the sentence in which the answer stands, of each side that shows it."""
    rows = []
    for model, side in _sides_done(results):
        views = results.views(arm_and_condition(side)[1])
        labels = np.array([position_label(v.context, v.at) if v.context and v.at is not None else "" for v in views])
        values = scores(results, model, side)
        for position in POSITIONS:
            mask = labels == position
            if mask.any():
                row = {"model": model, "side": side, "position": position, "n": int(mask.sum())}
                row["exact"] = values[:, mask].mean()
                rows.append(row | _interval(results, values[:, mask], mask))
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
            row = {"model": model, "side": side, "kind": kind, "answers": kinds[kind]}
            rows.append(row | {"percent": 100 * kinds[kind] / kinds.total()})
    return rows


def same_arm(results: Results) -> list[Row]:
    """Returns p values of differences between seeds of one arm, where there is nothing to find.

    `seeds`: one seed against another; what a single run of each would have claimed. `dealt`: for each article a coin
    decides which of the two answers as A and which as B, so the test's assumption holds exactly and p is uniform.
    """
    rows = []
    articles, member = np.unique(results.titles, return_inverse=True)
    for model, side in _sides_done(results):
        done = outcomes(results, model, side)
        for s, t in combinations(done, 2):
            d = (done[s].exact - done[t].exact)[None]  # (1, N)
            coins = np.random.default_rng([s, t]).choice([-1, 1], (DEALS, len(articles)))
            tests = [("seeds", d)] + [("dealt", d * coin[member]) for coin in coins]
            for kind, values in tests:
                p = randomisation_test(values, results.titles, draws=DEAL_DRAWS)
                rows.append({"model": model, "side": side, "first": s, "second": t, "kind": kind, "p": p})
    return rows


def counterfactual(results: Results) -> list[Row]:
    """Returns how often the answer follows a rewritten context, and how often it is the one from before."""
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
                row = {"model": model, "arm": arm, "grade": grade, "n": int(mask.sum()), "new": n}
                row |= _interval(results, new[:, mask], mask)
                rows.append(row | {"old": o, "memorised": o / (o + n) if o + n else None})
    return rows


def _exact(results: Results, dataset: dict[str, Any], outcome: Outcome) -> list[float]:
    predictions = {e.id: text for e, text in zip(results.test, outcome.predictions, strict=True)}
    found = question_scores(dataset, predictions)
    return [100 * found[e.id].exact for e in results.test]


# ---- what a reader must be told


def chance(results: Results, rows: list[Row]) -> list[Row]:
    """Returns, for sides that cannot know the answer, whether the interval holds the chance level of the plan.

    Args:
        results: All of it.
        rows: Of `table`.
    """
    level = results.plan["chance_exact"]
    told = [row for row in rows if row["side"] in UNINFORMED and row["model"] != "baseline" and row["seeds_done"]]
    return [
        {key: row[key] for key in ("model", "side", "exact", "exact_low", "exact_high")}
        | {"chance": level, "covered": bool(row["exact_low"] <= level <= row["exact_high"])}
        for row in told
        if level is not None
    ]


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
