"""The pictures of a report, each drawn from the rows of its CSV file alone; the same rows give the same bytes.

Text stays text, and ink takes the colour of the page around it, so one picture serves light, dark and print. They are
as narrow as a telephone. Colours are told apart by the colour-blind; lines and dots differ in marker, too.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
Draw = Callable[[Figure, list[Row]], None]

INK = "#123456"  # stands for the page's text colour
GREY = "#8a8a8a"
WIDTH = 5.0  # inches
LINE = 0.27  # inches a row of text takes
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "babl",
    "svg.fonttype": "none",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.formatter.use_mathtext": True,
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)

SHORT = {"exact": "EM", "f1": "F1"}

# Okabe and Ito 2008, with shades beside it.
COLOURS = {
    "none": "#8a8a8a",
    "blank": "#56b4e9",
    "random": "#0072b2",
    "same-article": "#009e73",
    "answer-removed": "#cc79a7",
    "gold": "#e69f00",
    "gold+distractors": "#d55e00",
    "mixture": "#a6761d",
    "mixture@gold": "#a6761d",
    "mixture@none": "#666633",
    "context-only": "#7b4fa3",
}
MARKERS = dict(zip(COLOURS, "osv^DPXd*h<", strict=True))
ERROR_COLOURS = ("#009e73", "#e69f00", "#d55e00", "#cc79a7", "#56b4e9", "#0072b2", "#f0e442", "#8a8a8a", "#7b4fa3")


def picture(name: str, draw: Draw, rows: list[Row]) -> str:
    """Returns the picture of the rows as an <svg> element without any address in it.

    Args:
        name: Prefix of its ids, unique in the page.
        draw: One of the functions below.
        rows: Of one model.
    """
    stream = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        draw(figure, rows)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{name}" ', text, count=1)


def forest(figure: Figure, rows: list[Row]) -> None:
    """Every contrast with its interval; hollow where the plan does not name it."""
    rows = [row for row in rows if row["seeds"]]
    figure.set_figheight(0.8 + 1.6 * LINE * len(rows))
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=0.8)
    labels = []
    for y, row in enumerate(rows):
        planned = row["role"] != "post hoc"
        colour = COLOURS["gold"] if "primary" in row["role"] else COLOURS["random"] if planned else GREY
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2)
        axes.plot(row["difference"], y, "o", color=colour, markerfacecolor=colour if planned else "none")
        labels.append(f"{row['contrast']}\n{_signed(row['difference'])} {_interval(row)}")
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"difference, {SHORT[rows[0]['metric']]} points")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -2), max(high, 2))


def heat_map(figure: Figure, rows: list[Row]) -> None:
    """Score of every arm (down) under every condition (across), the diagonal outlined."""
    arms, conditions = _unique(rows, "arm"), _unique(rows, "condition")
    figure.set_figheight(1.3 + 0.42 * len(arms))
    axes = figure.subplots()
    cells = {(row["arm"], row["condition"]): row[row["metric"]] for row in rows}
    values = np.array([[np.nan if cells[a, c] is None else cells[a, c] for c in conditions] for a in arms])
    axes.pcolormesh(np.ma.masked_invalid(values), cmap="cividis", vmin=0, vmax=100)
    for (y, x), value in np.ndenumerate(values):
        if np.isnan(value):
            axes.text(x + 0.5, y + 0.5, "–", ha="center", va="center")
        else:
            ink = "#ffffff" if value < 55 else "#111111"
            axes.text(x + 0.5, y + 0.5, f"{value:.0f}", ha="center", va="center", color=ink)
        if arms[y] == conditions[x]:
            box = matplotlib.patches.Rectangle((x, y), 1, 1, fill=False, edgecolor=INK, linewidth=1.5, clip_on=False)
            axes.add_patch(box)
    axes.set_xticks(np.arange(len(conditions)) + 0.5, conditions, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(arms)) + 0.5, arms)
    axes.set(ylabel="trained", xlabel="tested")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)


def strata(figure: Figure, rows: list[Row]) -> None:
    """Both sides of the primary contrast in each stratum, joined by a line."""
    names = _unique(rows, "stratum")
    figure.set_figheight(0.9 + LINE * 0.75 * (len(rows) + 1.5 * len(names)))
    axes = figure.subplots()
    ticks, labels, y = [], [], 0.0
    for name in names:
        axes.text(0, y, name, fontsize=9, weight="bold", va="center")
        y += 1
        for row in (row for row in rows if row["stratum"] == name):
            axes.plot([row["b"], row["a"]], [y, y], color=GREY, linewidth=1.5, zorder=1)
            axes.plot(row["b"], y, "o", markersize=5, color=COLOURS["none"], markerfacecolor="none")
            axes.plot(row["a"], y, "o", markersize=5, color=COLOURS["gold"])
            ticks.append(y)
            labels.append(f"{row['value']} ({row['n']:,})")
            y += 1
        y += 0.5
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.set(xlim=(-2, 102), ylim=(y, -0.8), xlabel=f"{SHORT[rows[0]['metric']]}, %")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)


def learning_curves(figure: Figure, rows: list[Row]) -> None:
    """Validation loss against examples and against FLOPs: seeds thin, their mean thick, failed seeds dotted."""
    figure.set_figheight(5.4)
    for axes, key, label in zip(
        figure.subplots(2, 1), ("examples", "flops"), ("examples seen", "floating-point operations"), strict=True
    ):
        for arm in _unique(rows, "arm"):
            seeds = [
                [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
                for seed in _unique([row for row in rows if row["arm"] == arm], "seed")
            ]
            for points in seeds:
                style = ":" if points[0]["failed"] else "-"
                x, y = ([point[of] for point in points] for of in (key, "validation_loss"))
                axes.plot(x, y, style, color=COLOURS[arm], linewidth=0.6, alpha=0.7)
            x, y = _mean_curve([points for points in seeds if not points[0]["failed"]], key)
            axes.plot(x, y, color=COLOURS[arm], linewidth=2.2, label=arm, marker=MARKERS[arm], markersize=4)
        axes.set(xlabel=label, ylabel="validation loss, nats", ylim=(0, None), xlim=(0, None))
    _legend(figure)


def _mean_curve(seeds: Sequence[list[Row]], key: str) -> tuple[list[float], list[float]]:
    """Returns the means over seeds at each step that all of them have."""
    steps = sorted(set.intersection(*({point["step"] for point in points} for points in seeds))) if seeds else []
    at = [[point for points in seeds for point in points if point["step"] == step] for step in steps]
    x, y = ([float(np.mean([point[of] for point in points])) for points in at] for of in (key, "validation_loss"))
    return x, y


def seed_strip(figure: Figure, rows: list[Row]) -> None:
    """Score of every seed; the bar is their mean, the dashes are the exact match that chance gives."""
    sides = _unique(rows, "side")
    figure.set_figheight(3.4)
    axes = figure.subplots()
    metric = rows[0]["metric"]
    for x, side in enumerate(sides):
        values = [row[metric] for row in rows if row["side"] == side]
        spread = (np.arange(len(values)) - (len(values) - 1) / 2) * 0.09
        axes.plot([x - 0.32, x + 0.32], [np.mean(values)] * 2, color=COLOURS[side], linewidth=2)
        axes.plot(x + spread, values, MARKERS[side], color=COLOURS[side], alpha=0.8, markersize=6)
    level = rows[0]["chance_exact"]
    if metric == "exact" and level is not None:
        axes.axhline(level, color=INK, linewidth=1, linestyle="--")
        axes.annotate("chance", (len(sides) - 0.5, level), fontsize=9, ha="right", va="bottom")
    axes.set_xticks(range(len(sides)), sides, rotation=35, ha="right", rotation_mode="anchor")
    axes.set(ylim=(0, 103), xlim=(-0.6, len(sides) - 0.4), ylabel=f"{SHORT[metric]}, %")


def reliability(figure: Figure, rows: list[Row]) -> None:
    """How often answers are right, by how probable the model finds them; on the diagonal it knows what it knows."""
    axes = _percent_square(figure)
    axes.plot([0, 100], [0, 100], "--", color=INK, linewidth=0.8)
    _lines(axes, rows, "probability", "exact")
    axes.set(xlabel="probability the model gives its answer, %", ylabel="exact match, %")
    _legend(figure)


def risk(figure: Figure, rows: list[Row]) -> None:
    """Share of answers that are no exact match when only the surest are given."""
    axes = _percent_square(figure)
    _lines(axes, rows, "coverage", "not_exact", marker=False)
    axes.set(xlabel="answers given, %", ylabel="no exact match among them, %")
    _legend(figure)


def positions(figure: Figure, rows: list[Row]) -> None:
    """Score by the sentence of the context in which the answer stands."""
    axes = figure.subplots()
    labels = sorted(_unique(rows, "position"))
    sides, metric = _unique(rows, "side"), rows[0]["metric"]
    for i, side in enumerate(sides):
        of_side = [row for row in rows if row["side"] == side]
        x = np.array([labels.index(row["position"]) for row in of_side]) + (i - (len(sides) - 1) / 2) * 0.08
        axes.plot(x, [row[metric] for row in of_side], color=COLOURS[side], marker=MARKERS[side], label=side)
        for at, row in zip(x, of_side, strict=True):
            ends = [row[f"{metric}_low"], row[f"{metric}_high"]]
            if ends[0] is not None:
                axes.plot([at, at], ends, color=COLOURS[side], linewidth=1)
    counts = {row["position"]: row["n"] for row in reversed(rows)}
    axes.set_xticks(range(len(labels)), [f"{label}\nn = {counts[label]:,}" for label in labels])
    axes.set(ylim=(0, 103), xlabel="sentence of the answer (0 is the first)", ylabel=f"{SHORT[metric]}, %")
    _legend(figure)


def errors(figure: Figure, rows: list[Row]) -> None:
    """What became of the answers of each side, right ones and kinds of wrong ones, adding up to 100."""
    sides, kinds = _unique(rows, "side"), _unique(rows, "kind")
    figure.set_figheight(1.4 + 0.4 * len(sides) + 0.2 * len(kinds) / 2)
    axes = figure.subplots()
    left = np.zeros(len(sides))
    for kind, colour in zip(kinds, ERROR_COLOURS, strict=False):
        of_kind = {row["side"]: row["percent"] for row in rows if row["kind"] == kind}
        share = np.array([of_kind[side] for side in sides])
        axes.barh(range(len(sides)), share, 0.7, left=left, color=colour, label=kind)
        for y, (start, value) in enumerate(zip(left, share, strict=True)):
            if value >= 8:
                axes.text(start + value / 2, y, f"{value:.0f}", ha="center", va="center", color="#111111", fontsize=9)
        left += share
    axes.set_yticks(range(len(sides)), sides)
    axes.set(xlim=(0, 100), xlabel="answers, %")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2)


def same_arm(figure: Figure, rows: list[Row]) -> None:
    """Distribution of p where nothing is to be found; the dashes are where it should lie."""
    axes = figure.subplots()
    edges = np.linspace(0, 1, 11)
    for kind, colour, label in (
        ("seeds", COLOURS["gold"], "seed against seed"),
        ("dealt", COLOURS["random"], "articles dealt by coin"),
    ):
        p = [row["p"] for row in rows if row["kind"] == kind]
        share = 100 * np.histogram(p, edges)[0] / max(len(p), 1)
        axes.stairs(share, edges, color=colour, linewidth=2, label=f"{label} ({len(p)})")
    axes.axhline(10, color=INK, linewidth=1, linestyle="--")
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="p", ylabel="contrasts, %")
    _legend(figure)


def _percent_square(figure: Figure) -> Axes:
    figure.set_figheight(3.6)
    axes = figure.subplots()
    axes.set(xlim=(0, 101), ylim=(0, 101))
    return axes


def _lines(axes: Axes, rows: list[Row], x: str, y: str, marker: bool = True) -> None:
    """A line for each side."""
    for side in _unique(rows, "side"):
        of_side = [row for row in rows if row["side"] == side]
        shape = MARKERS[side] if marker else None
        points = [row[x] for row in of_side], [row[y] for row in of_side]
        axes.plot(*points, color=COLOURS[side], marker=shape, markersize=4, label=side)


def _legend(figure: Figure) -> None:
    """What the lines of the first axes are, below all, where it hides none of them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 3 if len(labels) > 2 else 2
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _unique(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _interval(row: Row) -> str:
    if row["low"] is None:
        return "[–]"
    return f"[{_signed(row['low'])}, {_signed(row['high'])}]{'°' if row['scope'] == 'articles' else ''}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")
