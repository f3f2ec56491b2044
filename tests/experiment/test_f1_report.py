"""Every figure of an experiment that F1 decides, as HTML, Markdown, CSV, JSON and the dry run show it.

They are made anew from the answers in the folder by a scorer that shares nothing with Babl's: words without the 32
ASCII punctuation marks and the articles, counted off against each other in sorted order.
"""

import csv
import json
from html.parser import HTMLParser
from statistics import mean

import pytest

from babl.data.contexts import build_views
from babl.data.squad import load_squad
from babl.evaluation.baselines import baselines
from babl.experiment.forecast import _power
from babl.experiment.plan import Plan

MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def words(text):
    return sorted(w for w in "".join(c for c in text.lower() if c not in MARKS).split() if w not in ("a", "an", "the"))


def own_exact(answer, golds):
    """In percent; word order is left to the answers here, which differ in words."""
    return 100.0 * any(words(answer) == words(gold) for gold in golds)


def own_f1(answer, golds):
    best = 0.0
    for gold in golds:
        left, right, same = words(answer), words(gold), 0
        total = len(left) + len(right)
        while left and right:
            if left[-1] == right[-1]:
                same += 1
                left.pop()
                right.pop()
            elif left[-1] > right[-1]:
                left.pop()
            else:
                right.pop()
        best = max(best, 100 * 2 * same / total)
    return best


class Tables(HTMLParser):
    """The tables of a page, as lists of rows of cells' texts; what a <small> holds follows after a bar."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True
        elif tag in ("small", "br") and self.inside:
            self.tables[-1][-1][-1] += "|" if tag == "small" else " "

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1] += data


def by_heading(table, start):
    """Returns the rows of a table under their headings without what is small, where the first heading is as told."""
    headings = [cell.split("|")[0].strip() for cell in table[0]]
    assert headings[0] == start
    return [dict(zip(headings, row, strict=False)) for row in table[1:]]


def markdown_tables(text):
    tables, last = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and not last:
            tables.append([])
        if line.startswith("|") and set(line) - set("|-: "):
            tables[-1].append(cells)
        last = line.startswith("|")
    return tables


def says(arm, example, view, rng):
    """Right, right and more, half right, or wrong: F1 and exact match tell different stories."""
    gold = view.golds[0]
    right = rng.random() < (0.35 if arm == "gold" else 0.1)
    if right:
        return gold
    more = rng.random() < (0.6 if arm == "gold" else 0.2)
    return f"{gold} and so on" if more else "nothing of that sort"


@pytest.fixture(scope="module")
def told(make):
    """The experiment, its report.json and all texts of its report."""
    experiment = make(metric="f1")
    experiment.says = says
    report, texts = experiment.report()
    return experiment, report, texts


@pytest.fixture(scope="module")
def truth(told):
    """(arm, condition) -> metric -> a mean in percent for each seed, of the answers in the folder."""
    experiment, _, _ = told
    golds = {e.id: [a.text for a in e.answers] for e in experiment.test}
    found = {}
    for cell in experiment.cells:
        for path in (experiment.cell(cell) / "predictions").iterdir():
            of = rewritten(experiment) if path.stem == "counterfactual" else golds
            lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
            scores = {"exact": own_exact, "f1": own_f1}
            for metric, scorer in scores.items():
                score = mean(scorer(line["prediction"], of[line["id"]]) for line in lines)
                found.setdefault((cell["arm"], path.stem), {}).setdefault(metric, []).append(score)
    return found


def rewritten(experiment):
    """The right answers of the counterfactual questions."""
    return {view.id: view.golds for view in build_views(experiment.test, "counterfactual", 0)[0]}


def close(shown, value):
    """A figure in a text is the value, rounded as it stands there."""
    digits = len(shown.partition(".")[2])
    return abs(float(shown.replace("−", "-")) - value) <= 0.5001 * 10**-digits


def test_f1_and_exact_match_tell_different_stories_here(truth):
    assert mean(truth["gold", "gold"]["f1"]) > mean(truth["gold", "gold"]["exact"]) + 10
    gain = {m: mean(truth["gold", "gold"][m]) - mean(truth["none", "none"][m]) for m in ("exact", "f1")}
    assert abs(gain["f1"] - gain["exact"]) > 3, "so that one cannot stand for the other"


def test_json_and_csv_name_each_metric_and_hold_its_figures(told, truth):
    _, report, texts = told
    rows = list(csv.DictReader(texts["table.csv"].splitlines()))
    assert {"exact", "f1", "exact_low", "f1_low", "vs_none_f1_difference", "vs_random_f1_p", "f1_clean"} <= rows[
        0
    ].keys()
    assert not {"vs_none_difference", "exact_clean", "vs_none_exact_difference"} & rows[0].keys()
    none, random = (mean(truth[arm, arm]["f1"]) for arm in ("none", "random"))
    for row in [row for row in rows if row["model"] != "baseline"]:
        of = truth[row["side"], row["side"]]
        assert (float(row["exact"]), float(row["f1"])) == pytest.approx((mean(of["exact"]), mean(of["f1"])), rel=1e-6)
        for reference, value in (("none", none), ("random", random)):
            if row["side"] != reference and (row["side"], reference) != ("none", "random"):
                found = float(row[f"vs_{reference}_f1_difference"])
                assert found == pytest.approx(mean(of["f1"]) - value, rel=1e-5)
    for row in list(csv.DictReader(texts["contrasts.csv"].splitlines())) + report["figures"]["contrasts"]:
        a, b = (truth[row[side], row[side]]["f1"] for side in ("a", "b"))
        assert row["metric"] == "f1"
        figures = [float(row[key]) for key in ("mean_a", "mean_b", "difference")]
        assert figures == pytest.approx([mean(a), mean(b), mean(a) - mean(b)], rel=1e-5)
        by_seed = [float(text) for text in row["difference_by_seed"].split("; ")]
        assert by_seed == pytest.approx([x - y for x, y in zip(a, b, strict=True)], rel=1e-5)
    for row in csv.DictReader(texts["matrix.csv"].splitlines()):
        assert "exact" not in row and row["metric"] == "f1"
        assert float(row["f1"]) == pytest.approx(mean(truth[row["arm"], row["condition"]]["f1"]), rel=1e-6)
    for row in csv.DictReader(texts["seeds.csv"].splitlines()):
        of = truth[row["side"], row["side"]]
        figures = float(row["exact"]), float(row["f1"])
        assert figures == pytest.approx((of["exact"][int(row["seed"])], of["f1"][int(row["seed"])]), rel=1e-6)
    for row in csv.DictReader(texts["same_arm.csv"].splitlines()):
        assert row["metric"] == "f1"
    assert "metric" in texts["strata.csv"].partition("\n")[0] and "f1_low" in texts["positions.csv"].partition("\n")[0]


def test_strata_hold_f1(told):
    """By the grade that the file names."""
    experiment, report, _ = told
    grade = {e.id: e.grade for e in experiment.test}
    golds = {e.id: [a.text for a in e.answers] for e in experiment.test}
    scores = {}
    for cell in (cell for cell in experiment.cells if cell["arm"] in ("gold", "none")):
        path = experiment.cell(cell) / "predictions" / f"{cell['arm']}.jsonl"
        for line in map(json.loads, path.read_text().splitlines()[1:]):
            scores.setdefault((cell["arm"], grade[line["id"]]), []).append(
                own_f1(line["prediction"], golds[line["id"]])
            )
    rows = [row for row in report["figures"]["strata"] if row["stratum"] == "grade"]
    assert len(rows) > 1
    for row in rows:
        a, b = (mean(scores[arm, row["value"]]) for arm in ("gold", "none"))
        assert row["metric"] == "f1"
        assert (row["a"], row["b"], row["difference"]) == pytest.approx((a, b, a - b), rel=1e-5)


def test_the_page_heads_its_columns_by_the_metric_and_shows_its_figures(told, truth):
    _, report, texts = told
    tables = Tables(texts["report.html"]).tables
    scores = by_heading(tables[0], "model")
    assert list(scores[0])[-3:] == ["F1 vs none, points", "F1 vs random, points", "F1, clean stratum, %"]
    for row in scores[:3]:
        of, none = truth[row["arm"], row["arm"]], truth["none", "none"]
        for heading, metric in (("EM, % ± seed SD", "exact"), ("F1, % ± seed SD", "f1")):
            assert close(row[heading].split(" ")[0], mean(of[metric]))
            low, high = (report_row(report, row["arm"])[f"{metric}_{end}"] for end in ("low", "high"))
            assert row[heading].split("|")[1] == f"[{low:.1f}, {high:.1f}]"
        if row["arm"] != "none":
            assert close(row["F1 vs none, points"].split("|")[0], mean(of["f1"]) - mean(none["f1"]))
    contrasts = by_heading(tables[2], "model")
    assert {"difference, F1 points", "detectable, F1 points"} < contrasts[0].keys()
    assert "within ±1.0 F1 points" in texts["report.html"]
    for row in contrasts:
        a, b = (truth[arm, arm]["f1"] for arm in row["contrast"].split("|")[0].split(" − "))
        assert close(row["difference, F1 points"].split("|")[0], mean(a) - mean(b))
    reads = next(table for table in tables if "EM with the new answer, % |95 % interval" in table[0])
    for row in by_heading(reads, "model"):
        if row["grade"] == "all":
            assert close(
                row["EM with the new answer, %"].split("|")[0], mean(truth[row["arm"], "counterfactual"]["exact"])
            )
    for label in ("difference, F1 points", "F1, %"):
        assert f">{label}<" in texts["report.html"], "the pictures' axes"


def report_row(report, side):
    return next(row for row in report["table"] if row["side"] == side)


def test_markdown_and_the_lead_say_the_same(told, truth):
    _, report, texts = told
    gold, none = (mean(truth[arm, arm]["f1"]) for arm in ("gold", "none"))
    lead = report["answers"]["tiny-t5"]
    assert lead.startswith(
        f"Yes. F1 is {gold:.1f} % with the context and {none:.1f} % without it: +{gold - none:.1f} F1 points ["
    )
    assert lead in texts["report.md"] and "EM" not in lead.partition("But without")[0]
    scores, contrasts = (by_heading(table, "model") for table in markdown_tables(texts["report.md"])[:2])
    assert {"F1 vs none, points", "F1 vs random, points", "clean F1 %"} < scores[0].keys()
    for row in scores[:3]:
        of = truth[row["arm"], row["arm"]]
        assert close(row["EM % ± SD [95 %]"].split(" ")[0], mean(of["exact"]))
        assert close(row["F1 % ± SD [95 %]"].split(" ")[0], mean(of["f1"]))
        if row["arm"] != "none":
            assert close(row["F1 vs none, points"].split(" ")[0], mean(of["f1"]) - none)
    for row in contrasts:
        a, b = (truth[arm, arm]["f1"] for arm in row["contrast"].split(" − "))
        assert close(row["F1 difference, points [95 %]"].split(" ")[0], mean(a) - mean(b))
    block = texts["report.md"].partition("## The primary contrast")[2].partition("##")[0]
    assert ", F1\n" in block and "EM points" not in texts["report.md"] and "EM points" not in texts["report.html"]
    assert "Naive sign test" in block and "McNemar" not in texts["report.md"] + texts["report.html"]


def test_baselines_are_scored_in_both_metrics(told):
    experiment, report, texts = told
    train = load_squad(experiment.folder / "data" / "train.json")
    golds = {e.id: [a.text for a in e.answers] for e in experiment.test}
    for name, answers in baselines(train, experiment.test, 0).items():
        row = report_row(report, name)
        for metric, scorer in (("exact", own_exact), ("f1", own_f1)):
            value = mean(scorer(answers[qid], golds[qid]) for qid in golds)
            assert row[metric] == pytest.approx(value, rel=1e-6, abs=1e-9)
            assert f"{value:.1f}" in texts["report.md"]


def test_the_dry_run_says_f1(told):
    experiment, _, _ = told
    lines = list(_power(Plan(experiment.folder, experiment.plan)))
    assert "smallest difference in F1 points that 3 seeds and 15 articles find" in lines[0]
    assert all(line.endswith("F1 points") for line in lines[-4:]) and "as published for EM,\ntaking each" in lines[-5]
    assert lines[-5].endswith("so at most:")
