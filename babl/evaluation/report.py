"""The demo's report: one HTML file that needs nothing beside it."""

import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLOURS = {"none": "#b0b0b0", "gold": "#d9822b"}
SMOOTH = 25  # steps


def write_report(report: dict[str, Any], losses: dict[str, list[float]], folder: Path) -> None:
    """The folder holds report.json and report.html.

    Args:
        report: The figures, see `scripts/demo.py`.
        losses: Arm -> training loss of each step.
        folder: Where.
    """
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    html = (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(
            report=report, grades=list(report["chance_grades"]), comparison=_comparison(report), curves=_curves(losses)
        )
    )
    (folder / "report.html").write_text(html, encoding="utf-8")


def _comparison(report: dict[str, Any]) -> str:
    grades = list(report["chance_grades"])
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, (arm, result) in enumerate(report["arms"].items()):
        values = [result["grades"][grade] for grade in grades]
        bars = axes.bar(np.arange(len(grades)) + (i - 0.5) * 0.36, values, 0.34, color=COLOURS[arm], label=arm)
        axes.bar_label(bars, fmt="%.0f", padding=2)
    for x, grade in enumerate(grades):
        axes.hlines(report["chance_grades"][grade], x - 0.4, x + 0.4, colors="#333", linestyles="dashed", linewidth=1)
    axes.set_xticks(range(len(grades)), grades)
    axes.set(ylim=(0, 108), ylabel="exact match, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    return _svg(figure)


def _curves(losses: dict[str, list[float]]) -> str:
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for arm, values in losses.items():
        axes.plot(range(1, len(values) + 1), values, color=COLOURS[arm], linewidth=0.4, alpha=0.5)
        window = min(SMOOTH, len(values))
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(len(smooth)) + window, smooth, color=COLOURS[arm], linewidth=2, label=arm)
    axes.set(xlabel="step", ylabel="loss per target token, nats", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """Returns the figure as an <svg> element, the same bytes for the same figure."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "babl", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
