"""The report of an experiment: one HTML file that needs nothing beside it, Markdown, JSON, and every figure as CSV.

It is a pure function of what the folder holds: repeated, it has the same bytes. Seconds on the clock, which no two runs
share, stand apart in timing.csv.
"""

import csv
import io
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from babl.data.overlap import DECLARED, OVERLAP_BIASES
from babl.evaluation.statistics import FEWEST_ANSWERS, FEWEST_ARTICLES, FEWEST_ARTICLES_WITH_SEEDS, FEWEST_SEEDS
from babl.experiment import analysis, figures
from babl.experiment.contrasts import Row, contrasts, primary_details
from babl.experiment.figures import SHORT
from babl.experiment.results import Results, read_results

SIGNIFICANT = 8  # digits of a number in report.json and the CSV files
LEVEL = 0.05
METRICS = {"exact": "exact match", "f1": "F1"}
NO_INTERVAL = (
    f"[–]: none that would hold, with fewer than {FEWEST_ARTICLES} articles, one with more than a third of the "
    "questions, or articles that all agree exactly; of a score, with fewer than "
    f"{FEWEST_ANSWERS} right or wrong answers."
)
IN_WORDS = {"gold": "with the context", "none": "without it"}


@dataclass(frozen=True)
class Picture:
    """One figure of the report.

    Attributes:
        name: Of its CSV file, and the key of its rows in report.json.
        title: Above it.
        caption: How to read it; {metric} stands for the plan's.
        draw: Draws the rows of one model.
    """

    name: str
    title: str
    caption: str
    draw: figures.Draw


PICTURES = (
    Picture(
        "contrasts",
        "Every contrast",
        "The dot is the mean difference in {metric} of the first arm minus the second, the bar its 95 % interval (°: "
        "for these trained models alone). Orange: primary; blue: named in the plan; hollow: post hoc. A bar that does "
        "not touch the line at 0 is a difference that chance does not explain.",
        figures.forest,
    ),
    Picture(
        "matrix",
        "Trained in one arm, tested under another",
        "The {metric} in percent, mean over seeds. Outlined: tested as trained. A row is one model, a column one test.",
        figures.heat_map,
    ),
    Picture(
        "strata",
        "Where the difference comes from",
        "In {metric}. Hollow: the second arm of the primary contrast; orange: the first; the line between them: the "
        "difference. In brackets the number of questions. Strata describe; none is tested, and their intervals (in the "
        "CSV) are not corrected for being many.",
        figures.strata,
    ),
    Picture(
        "learning_curves",
        "Learning curves",
        "Loss on the validation slice of the training articles. Thin: each seed; thick: their mean; dotted: failed. "
        "Above at equal examples, below at equal arithmetic: arms with longer inputs lie further right.",
        figures.learning_curves,
    ),
    Picture(
        "seeds",
        "Seed by seed",
        "Each mark is the {metric} of one training run; the bar is their mean. Marks far apart mean that one run says "
        "little.",
        figures.seed_strip,
    ),
    Picture(
        "reliability",
        "Does the model know what it knows?",
        "Answers sorted by the probability the model gives them, in groups of equally many. On the dashes the "
        "probability is the share of exact matches; below them the model is too sure of itself.",
        figures.reliability,
    ),
    Picture(
        "risk",
        "If only the surest answers are given",
        "From right to left more answers are withheld, the least probable first. A curve that falls to the left has a "
        "probability worth listening to; a flat one has not.",
        figures.risk,
    ),
    Picture(
        "positions",
        "Where in the context the answer stands",
        "The {metric} by the sentence that holds the answer, with 95 % intervals. A line that falls is a model that "
        "does not read to the end.",
        figures.positions,
    ),
    Picture(
        "errors",
        "In which way answers are wrong",
        "Green is an exact match; the other colours are kinds of errors, told apart by rule. Numbers: percent of all "
        "answers.",
        figures.errors,
    ),
    Picture(
        "same_arm",
        "A test of the test: seeds of one arm",
        "p of the test of {metric} by article where there is no arm to tell apart. Blue, for each article a coin "
        "decides whose answers are whose: flat at the dashes if the test is right. Orange, one seed against another: "
        "what exceeds the dashes on the left is how often two single runs would be told apart though only the seed "
        "differs.",
        figures.same_arm,
    ),
)


def write_report(folder: Path) -> None:
    """The folder's report/ holds report.html, report.md, report.json, table.csv, timing.csv and a CSV for each picture.

    Args:
        folder: Of an experiment, finished or not.

    Raises:
        UserError: Something in the folder is not what its hash says.
    """
    results = read_results(folder)
    report = summarise(results)
    files = {"report.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n"}
    files["table.csv"] = to_csv(report["table"])
    files["timing.csv"] = to_csv(plain(analysis.timing_rows(results)))
    files |= {f"{picture.name}.csv": to_csv(report["figures"][picture.name]) for picture in PICTURES}
    drawn = draw_pictures(report)
    for name in ("report.html", "report.md"):
        files[name] = render(name, report, drawn)
    _replace(folder / "report", files)


def summarise(results: Results) -> dict[str, Any]:
    """Returns all that the report says, as plain JSON."""
    compared = contrasts(results)
    rows, worth = analysis.table(results, compared), analysis.selective(results)
    found = {
        "name": results.plan["name"],
        "plan": results.plan,
        "questions": len(results.test),
        "articles": len(set(results.titles)),
        "primary": primary_details(results),
        "table": rows,
        "chance": analysis.chance(results, rows),
        "counterfactual": analysis.counterfactual(results),
        "selective": worth,
        "cells": analysis.cell_rows(results),
        "trials": analysis.trial_rows(results),
        "unequal": analysis.unequal(results),
        "post_hoc": analysis.post_hoc(results, compared),
        "overlap": results.overlap,
        "figures": {
            "contrasts": compared,
            "matrix": analysis.matrix(results),
            "strata": analysis.strata(results),
            "learning_curves": analysis.learning_curves(results),
            "seeds": analysis.seed_scores(results),
            "reliability": analysis.reliability(worth),
            "risk": analysis.risk(worth),
            "positions": analysis.positions(results),
            "errors": analysis.errors(results),
            "same_arm": analysis.same_arm(results),
        },
    }
    report = plain(found)
    report["answers"] = {model: answer(report, model) for model in results.plan["models"]}
    return report


def answer(report: dict[str, Any], model: str) -> str:
    """Returns whether the context helps this model, in words and figures, and what the answer is about."""
    a, b = report["plan"]["primary"]["contrast"]
    rows = [row for row in report["figures"]["contrasts"] if row["model"] == model and row["seeds"]]
    row = next((row for row in rows if "primary" in row["role"]), None)
    if row is None:
        cells = [cell for cell in report["cells"] if cell["model"] == model and cell["arm"] in (a, b)]
        scored = sum(cell["state"] == "scored" for cell in cells)
        return f"Not known yet: of the {len(cells)} cells that would tell, {scored} are scored, none of them a pair."
    between = " and ".join(
        f"{percent(row[key])} % {IN_WORDS.get(side, f'in arm {side}')}" for key, side in (("mean_a", a), ("mean_b", b))
    )
    metric = METRICS[row["metric"]]
    text = f"{_verdict(row)}. {metric[0].upper()}{metric[1:]} is {between}: {sure(row)}. {about(row, report)}"
    for placebo in rows:
        if (placebo["a"], placebo["b"]) == (a, "random"):
            text += f" Against another article's text of the same length it is {difference(placebo)} {unit(placebo)}."
    return text + _better_without_a_model(report, row)


def _verdict(row: Row) -> str:
    if row["p"] is None:
        found = "Not known"
    elif row["p"] >= LEVEL:
        found = "Not shown"
    else:
        found = "Yes" if row["difference"] > 0 else "No, it harms"
    if row["scope"] == "seeds and articles":
        return found
    pairs = "this one pair" if row["seeds"] == 1 else f"these {row['seeds']} pairs"
    return f"{found}, for {pairs} of trained models alone"


def about(row: Row, report: dict[str, Any]) -> str:
    """Returns a sentence on what is drawn anew in a contrast's interval and p, and why no more is."""
    if row["scope"] == "seeds and articles":
        return "The 95 % interval and p are over new seeds and new articles."
    if row["seeds"] == 1:
        why = "one seed tells nothing of how another would turn out"
    elif row["seeds"] < FEWEST_SEEDS:
        by_seed = [points(float(value)) for value in row["difference_by_seed"].split("; ")]
        given = f"{' and '.join(by_seed)} {unit(row)}"
        why = f"the seeds give {given}, and two are too few to tell how far a third may differ"
    else:
        why = (
            f"beside {row['seeds']} seeds, {report['articles']} articles are too few to speak of others of both "
            f"({FEWEST_ARTICLES_WITH_SEEDS} are needed)"
        )
    return f"The 95 % interval and p are over new articles alone, for these trained models: {why}."


def scope_note(report: dict[str, Any]) -> str:
    """Returns a sentence on what is drawn anew in the report's intervals."""
    rows = [row["scope"] for row in report["figures"]["contrasts"] if row["seeds"]]
    rows += [row["exact_scope"] for row in report["table"] if row["model"] != "baseline" and row["seeds_done"]]
    alone = "over new articles alone, for these trained models"
    needed = f"there are fewer than {FEWEST_SEEDS} seeds or {FEWEST_ARTICLES_WITH_SEEDS} articles"
    if "seeds and articles" not in rows:
        return f"The 95 % intervals, marked °, and p are {alone}: {needed}."
    if "articles" not in rows:
        return "The 95 % intervals and p are over new seeds and new articles; those of baselines, °, over new articles."
    return f"The 95 % intervals and p are over new seeds and new articles; with ° they are {alone}, where {needed}."


def _better_without_a_model(report: dict[str, Any], row: Row) -> str:
    """Returns a sentence on the best baseline where it beats the first arm of the contrast."""
    metric = row["metric"]
    best = max((of for of in report["table"] if of["model"] == "baseline"), key=lambda of: of[metric])
    if best[metric] <= row["mean_a"]:
        return ""
    return (
        f" But without any model, the baseline {best['side']!r} reaches {METRICS[metric]} {percent(best[metric])} %, "
        f"more than the {percent(row['mean_a'])} % of arm {row['a']}."
    )


def draw_pictures(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns, for each picture that has something to show, its words and an <svg> by model."""
    drawn = []
    for picture in PICTURES:
        rows = report["figures"][picture.name]
        by_model = {model: [row for row in rows if row["model"] == model] for model in report["plan"]["models"]}
        svgs = {
            model: figures.picture(f"{picture.name}-{i}", picture.draw, of_model)
            for i, (model, of_model) in enumerate(by_model.items())
            if any(row.get("seeds", 1) for row in of_model)
        }
        if svgs:
            caption = picture.caption.format(metric=METRICS[report["plan"]["primary"]["metric"]])
            drawn.append({"name": picture.name, "title": picture.title, "caption": caption, "svgs": svgs})
    return drawn


def render(name: str, report: dict[str, Any], drawn: list[dict[str, Any]]) -> str:
    """Returns a template of this folder filled with the report."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "percent": percent, "points": points, "p": p_value, "is_p": is_p, "count": count, "big": big,
        "difference": difference, "sure": sure,
    }  # fmt: skip
    return environment.get_template(name).render(
        report=report,
        plan=report["plan"],
        pictures=drawn,
        contrasts=report["figures"]["contrasts"],
        about=about,
        scope_note=scope_note(report),
        interval=interval,
        reasons=sorted({row["unknown"] for row in report["figures"]["contrasts"] if row.get("unknown")}),
        states=Counter(cell["state"] for cell in report["cells"]),
        plan_text=json.dumps(report["plan"], indent=1, ensure_ascii=False),
        key=report["plan"]["primary"]["metric"],
        metric=METRICS[report["plan"]["primary"]["metric"]],
        short=SHORT[report["plan"]["primary"]["metric"]],
        no_interval=NO_INTERVAL,
        declared=DECLARED,
        biases=OVERLAP_BIASES,
        level=LEVEL,
    )


def to_csv(rows: list[Row]) -> str:
    """Returns the rows as CSV, under all their keys in order of appearance; what a row lacks is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def plain(value: Any) -> Any:
    """Returns the value in what JSON knows, numbers that are not whole with 8 significant digits."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT}g}") if np.isfinite(value) else None
    return value


def _replace(folder: Path, files: dict[str, str]) -> None:
    """The folder holds these files and no others."""
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, text in files.items():
        (aside / name).write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


# ---- numbers as people read them


def percent(value: float | None, digits: int = 1) -> str:
    """91.2, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def points(value: float | None, digits: int = 1) -> str:
    """+81.4, −0.3, or a dash where there is none."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def interval(low: float | None, high: float | None, scope: str = "", signed: bool = False) -> str:
    """[79.0, 83.7], with ° where only articles are drawn anew, or [–] where there is none."""
    form = points if signed else percent
    return "[–]" if low is None else f"[{form(low)}, {form(high)}]{'°' if scope == 'articles' else ''}"


def difference(row: Row) -> str:
    """+81.4 [+79.0, +83.7]."""
    return f"{points(row['difference'])} {interval(row['low'], row['high'], row['scope'], signed=True)}"


def unit(row: Row) -> str:
    """EM points."""
    return f"{SHORT[row['metric']]} points"


def sure(row: Row) -> str:
    """+81.4 EM points [+79.0, +83.7], p = .013; or why there is neither interval nor p."""
    if row["unknown"]:
        return f"{points(row['difference'])} {unit(row)}, without interval and p ({row['unknown']})"
    ends = interval(row["low"], row["high"], signed=True)
    return f"{points(row['difference'])} {unit(row)} {ends}, p {is_p(row['p'])}"


def p_value(value: float | None) -> str:
    """.013, < .001, or a dash where there is none."""
    if value is None:
        return "–"
    if value < 0.001:
        return "< .001"
    return (f"{value:.3f}" if value < 0.1 else f"{value:.2f}").removeprefix("0")


def is_p(value: float | None) -> str:
    """= .013 or < .001, to follow the letter p."""
    text = p_value(value)
    return text if text[0] in "<–" else f"= {text}"


def count(value: float | None) -> str:
    """10,570, or a dash where there is none."""
    return "–" if value is None else f"{value:,.0f}"


def big(value: float | None) -> str:
    """1.2 × 10¹²."""
    if not value:
        return "–" if value is None else "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
