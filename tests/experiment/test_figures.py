import re

import pytest

from babl.experiment import figures
from babl.experiment.figures import INK, picture

CONTRASTS = [
    {"contrast": "gold − none", "role": "primary", "seeds": 3, "difference": 81.4, "low": 79.0, "high": 83.7},
    {"contrast": "random − none", "role": "post hoc", "seeds": 1, "difference": -0.3, "low": -1.2, "high": 0.6},
    {"contrast": "blank − none", "role": "secondary", "seeds": 0},
    {"contrast": "dead − none", "role": "secondary", "seeds": 3, "difference": 0.0, "low": None, "high": None},
]
for contrast in CONTRASTS:
    contrast |= {"metric": "f1", "scope": "articles" if contrast["seeds"] == 1 else "seeds and articles"}
MATRIX = [
    {"arm": arm, "condition": condition, "metric": "exact", "exact": exact}
    for arm, condition, exact in (
        ("none", "none", 9.8),
        ("none", "gold", None),
        ("gold", "none", 4.0),
        ("gold", "gold", 91),
    )
]
STRATA = [{"stratum": "grade", "value": "name", "metric": "f1", "n": 1234, "a": 90.0, "b": 10.0}]
CURVES = [
    {
        "arm": "gold",
        "seed": seed,
        "failed": seed == 2,
        "step": step,
        "examples": 8 * step,
        "flops": step,
        "validation_loss": 1,
    }
    for seed in range(3)
    for step in (1, 2)
]
SEEDS = [
    {"side": "gold", "seed": seed, "metric": "exact", "exact": 90 + seed, "f1": 95, "chance_exact": 10.0}
    for seed in range(3)
]
RELIABILITY = [{"side": "gold", "probability": x, "exact": x} for x in (10, 50, 90)]
RISK = [{"side": "gold", "coverage": x, "not_exact": 100 - x} for x in (10, 50, 90)]
POSITIONS = [
    {"side": "gold", "position": p, "n": 7, "metric": "f1", "f1": 80, "f1_low": low, "f1_high": 90}
    for p, low in (("0", 70), ("3+", None))
]
ERRORS = [{"side": "gold", "kind": kind, "percent": share} for kind, share in (("right", 91), ("boundary", 9))]
SAME_ARM = [{"kind": kind, "p": p} for kind in ("seeds", "dealt") for p in (0.01, 0.5, 1.0)]

DRAWN = [
    (
        figures.forest,
        CONTRASTS,
        ["gold − none", "+81.4 [+79.0, +83.7]", "−0.3 [−1.2, +0.6]°", "+0.0 [–]", "difference, F1 points"],
    ),
    (figures.heat_map, MATRIX, ["trained", "tested", "10", "–", "91"]),
    (figures.strata, STRATA, ["grade", "name (1,234)", "F1, %"]),
    (figures.learning_curves, CURVES, ["examples seen", "floating-point operations", "gold"]),
    (figures.seed_strip, SEEDS, ["gold", "chance", "EM, %"]),
    (figures.reliability, RELIABILITY, ["gold", "probability the model gives its answer, %"]),
    (figures.risk, RISK, ["answers given, %", "no exact match among them, %"]),
    (figures.positions, POSITIONS, ["n = 7", "3+", "F1, %"]),
    (figures.errors, ERRORS, ["right", "boundary", "91", "answers, %"]),
    (figures.same_arm, SAME_ARM, ["seed against seed (3)", "articles dealt by coin (3)", "p"]),
]
named = pytest.mark.parametrize(("draw", "rows", "texts"), DRAWN, ids=[draw.__name__ for draw, _, _ in DRAWN])


def texts_of(svg):
    return [re.sub(r"<[^>]*>", "", text).strip() for text in re.findall(r"<text.*?</text>", svg, re.S)]


@named
def test_words_and_numbers_are_text(draw, rows, texts):
    shown = texts_of(picture("x", draw, rows))
    assert [text for text in texts if text not in shown] == []


@named
def test_the_same_rows_give_the_same_bytes(draw, rows, texts):
    svg = picture("x", draw, rows)
    assert svg == picture("x", draw, [dict(row) for row in rows])
    assert svg.startswith("<svg role") and svg.rstrip().endswith("</svg>")
    assert "http" not in svg and "<image" not in svg and INK not in svg and "currentColor" in svg


@named
def test_a_name_keeps_the_ids_of_pictures_apart(draw, rows, texts):
    ids = re.findall(r'\bid="([^"]*)"', picture("one", draw, rows))
    assert ids and all(name.startswith("one-") for name in ids)
    svg = picture("two", draw, rows)
    assert set(re.findall(r'(?:url\(#|href="#)([^")]*)', svg)) <= set(re.findall(r'\bid="([^"]*)"', svg))


def axes_of(draw, rows):
    from matplotlib.figure import Figure

    figure = Figure()
    draw(figure, rows)
    return figure.axes


@pytest.mark.parametrize(
    ("draw", "rows"),
    [
        (figures.seed_strip, SEEDS),
        (figures.reliability, RELIABILITY),
        (figures.risk, RISK),
        (figures.positions, POSITIONS),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_percentages_begin_at_zero(draw, rows):
    low, high = axes_of(draw, rows)[0].get_ylim()
    assert low == 0 and high >= 100


def test_a_contrast_without_seeds_is_not_drawn_and_a_post_hoc_one_is_hollow():
    dots = [line for line in axes_of(figures.forest, CONTRASTS)[0].lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() for line in dots] == [figures.COLOURS["gold"], "none", figures.COLOURS["random"]]
    assert [float(line.get_xdata()[0]) for line in dots] == [81.4, -0.3, 0.0]


def test_the_mean_curve_leaves_failed_seeds_out():
    rows = [row | {"validation_loss": 9.0 if row["failed"] else 1.0 + row["seed"]} for row in CURVES]
    thick = [line for line in axes_of(figures.learning_curves, rows)[0].lines if line.get_linewidth() > 2]
    assert [list(line.get_ydata()) for line in thick] == [[1.5, 1.5]]


def test_every_arm_has_a_colour_and_a_marker_of_its_own():
    from babl.data.contexts import TRAIN_ARMS

    assert set(TRAIN_ARMS) <= figures.COLOURS.keys()
    assert len(set(figures.MARKERS.values())) == len(figures.MARKERS) == len(figures.COLOURS)
