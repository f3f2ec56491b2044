import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from babl.errors import UserError
from babl.experiment import analysis
from babl.experiment.contrasts import contrasts
from babl.experiment.report import (
    PICTURES,
    big,
    difference,
    is_p,
    p_value,
    percent,
    plain,
    points,
    to_csv,
    write_report,
)
from babl.experiment.results import read_results


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "report").iterdir()}


def report_of(experiment):
    write_report(experiment.folder)
    return read(experiment)


def read(experiment):
    return json.loads((experiment.folder / "report" / "report.json").read_text())


def rows_of(experiment, name):
    with (experiment.folder / "report" / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_repeated_it_has_the_same_bytes_anywhere(finished, tmp_path):
    write_report(finished.folder)
    first = files(finished.folder)
    (finished.folder / "report" / "left over.csv").write_text("of an older version")
    write_report(finished.folder)
    assert files(finished.folder) == first
    elsewhere = tmp_path / "else" / "where"
    shutil.copytree(finished.folder, elsewhere)
    write_report(elsewhere)
    assert files(elsewhere) == first
    assert not any(str(tmp_path).encode() in content for content in first.values())


def test_only_timing_knows_the_clock(finished):
    write_report(finished.folder)
    first = files(finished.folder)
    seconds = finished.folder / "cells/gold-0/seconds.json"
    seconds.write_text('{"train": 99.5, "predict": 1.0}')
    write_report(finished.folder)
    second = files(finished.folder)
    assert {name for name in first if first[name] != second[name]} == {"timing.csv"}
    assert {"cell": "gold-0", "stage": "train", "seconds": "99.5"} in rows_of(finished, "timing.csv")
    assert b"timing.csv" in first["report.html"] and b"timing.csv" in first["report.md"]


def test_the_known_truth_is_what_it_tells(reported):
    report = read(reported)
    rows = {row["side"]: row for row in report["table"]}
    gold, none = rows["gold"], rows["none"]
    assert 80 < gold["exact"] < 97 and gold["exact_low"] < 90 < gold["exact_high"]
    assert {row["side"]: row["covered"] for row in report["chance"]} == {"none": True, "random": True}
    primary = report["figures"]["contrasts"][0]
    assert primary["difference"] == pytest.approx(gold["exact"] - none["exact"], abs=1e-4)
    assert primary["p"] < 0.01 and primary["low"] > 50
    assert report["answers"]["tiny-t5"].startswith(f"Yes. Exact match is {gold['exact']:.1f} % with the context and ")
    reading = {(row["arm"], row["grade"]): row for row in report["counterfactual"]}
    assert reading["gold", "all"]["new_exact"] > 80 and reading["gold", "all"]["memorised"] < 0.05
    assert reading["none", "all"]["new_exact"] < 5 < 100 * reading["none", "all"]["memorised"]
    errors = {(row["side"], row["kind"]): row["percent"] for row in report["figures"]["errors"]}
    assert errors["gold", "right"] == pytest.approx(gold["exact"], abs=1e-4)
    html = (reported.folder / "report" / "report.html").read_text()
    assert "3 paired seeds cannot reach .05" in html and "not to be quoted" in html


def test_the_main_table_counts_and_averages(reported):
    row = next(row for row in read(reported)["table"] if row["side"] == "random")
    n, outcomes = len(reported.test), read_results(reported.folder).done("tiny-t5", "random", "random")
    assert (row["n"], row["articles"], row["seeds_done"], row["seeds_planned"], row["seeds_failed"]) == (n, 15, 3, 3, 0)
    seeds = [outcome.exact.mean() for outcome in outcomes.values()]
    assert row["exact"] == pytest.approx(np.mean(seeds), abs=1e-5)
    assert row["exact_sd"] == pytest.approx(np.std(seeds, ddof=1), abs=1e-5)
    cut = np.mean([100 * ~outcome.complete for outcome in outcomes.values()])
    assert row["truncated"] == pytest.approx(cut, abs=1e-5) and cut > 0
    assert (row["train_tokens"], row["flops"], row["chosen"]) == (36000, 4e10, "optim.lr 0.001")
    assert row["plan"] == json.loads((reported.folder / "plan.json").read_text())["hash"][:12]


def test_baselines_stand_in_the_same_table(reported):
    report = read(reported)
    rows = {row["side"]: row for row in report["table"] if row["model"] == "baseline"}
    assert rows.keys() == {"empty", "majority", "nearest question", "random span"}
    assert rows["empty"]["exact"] == 0 and rows["empty"]["empty"] == 100
    assert rows["random span"]["exact"] > 0 and "seeds_done" not in rows["random span"]


def test_a_missing_and_a_failed_cell_are_shown(experiment):
    *others, failed, missing = experiment.cells
    for cell in others:
        experiment.finish(cell)
    experiment.finish(failed)
    trained = experiment.cell(failed) / "trained.json"
    trained.write_text(json.dumps({"failed": "final loss 9.1 above 2.0", "chosen": {}}))
    report = report_of(experiment)
    row = next(row for row in report["table"] if row["side"] == "gold")
    assert (row["seeds_done"], row["seeds_planned"], row["seeds_failed"]) == (1, 3, 1)
    assert report["figures"]["contrasts"][0]["seeds"] == 1
    states = {cell["id"]: (cell["state"], cell["reason"]) for cell in report["cells"]}
    assert states[missing["id"]] == ("planned", None)
    assert states[failed["id"]] == ("failed", "final loss 9.1 above 2.0")
    html, markdown = ((experiment.folder / "report" / f"report.{end}").read_text() for end in ("html", "md"))
    for text in (html, markdown):
        assert "7 of 9 cells scored" in text and "1 failed" in text
        assert "failed: final loss 9.1 above 2.0" in text


def test_of_an_experiment_just_begun_it_says_that_nothing_is_known(experiment):
    report = report_of(experiment)
    assert report["answers"]["tiny-t5"].startswith("Not known yet: of the 6 cells that would tell, 0 are scored")
    assert all(row["seeds"] == 0 for row in report["figures"]["contrasts"])
    assert "no pair of seeds is scored yet" in (experiment.folder / "report" / "report.html").read_text()


def test_what_the_plan_does_not_name_is_post_hoc(finished):
    finished.plan |= {"secondary": [], "strata": finished.plan["strata"][1:]}
    finished.freeze()
    (finished.folder / "cells" / "tried").mkdir()
    report = report_of(finished)
    assert report["post_hoc"] == ["contrast gold − random", "stratum question kind", "folder cells/tried, not read"]
    html = (finished.folder / "report" / "report.html").read_text()
    assert "<li>contrast gold − random</li>" in html
    roles = {row["contrast"]: row["role"] for row in report["figures"]["contrasts"]}
    assert roles == {"gold − none": "primary", "random − none": "equivalence", "gold − random": "post hoc"}


def test_holm_is_over_the_secondary_contrasts_and_equivalence_where_it_was_named(reported):
    rows = {row["contrast"]: row for row in read(reported)["figures"]["contrasts"]}
    assert rows["gold − random"]["p_holm"] == rows["gold − random"]["p"]  # one alone needs no correction
    assert "p_holm" not in rows["gold − none"] and "p_equivalence" not in rows["gold − none"]
    assert 0 < rows["random − none"]["p_equivalence"] < 1


def test_arms_that_were_not_trained_alike_are_named(finished):
    path = finished.folder / "cells/gold-1/trained.json"
    path.write_text(path.read_text().replace("order of seed 1", "another order"))
    assert report_of(finished)["unequal"] == ["tiny-t5, seed 1: the arms differ in order of questions"]
    assert "the arms differ in order of questions" in (finished.folder / "report" / "report.html").read_text()


def test_every_trial_of_the_grid_is_told_and_which_was_chosen(finished):
    rates = (0.001, 0.01, 0.1)
    trials = [{"id": f"try-{rate}", "model": "tiny-t5", "arm": "gold", "seed": 0} for rate in rates]
    finished.plan["trials"] = [t | {"settings": {"optim.lr": rate}} for t, rate in zip(trials, rates, strict=True)]
    finished.freeze()
    finished.train(trials[0])
    claim = finished.predict(trials[0], "gold")
    (finished.cell(trials[0]) / "scored.json").write_text(json.dumps({"gold": claim}))
    finished.train(trials[2], failed="the loss is not finite")
    told = {row["settings"]: row for row in report_of(finished)["trials"]}
    assert told["optim.lr 0.001"]["exact"] == pytest.approx(claim["exact"], abs=1e-5)
    assert [row["chosen"] for row in told.values()] == [True, False, False]
    assert told["optim.lr 0.1"]["failed"] == "the loss is not finite" and "exact" not in told["optim.lr 0.01"]
    assert "the loss is not finite" in (finished.folder / "report" / "report.md").read_text()
    assert read(finished)["post_hoc"] == []
    path = finished.cell(trials[0]) / "predictions" / "gold.jsonl"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"try-0.001/predictions/gold\.jsonl: its hash is"):
        write_report(finished.folder)


def test_standard_errors_that_disagree_are_flagged(finished):
    results = read_results(finished.folder)
    results.plan["bootstrap_samples"] = 1  # a single redraw does not vary
    row = contrasts(results)[0]
    assert not row["se_agree"] and row["se_redrawn"] == 0 < row["se_articles"]


def test_every_stratification_holds_every_question_once(reported):
    counts: dict[str, int] = {}
    for row in read(reported)["figures"]["strata"]:
        counts[row["stratum"]] = counts.get(row["stratum"], 0) + row["n"]
    assert set(counts.values()) == {len(reported.test)}
    assert {"question kind", "answer words", "answer position", "grade", "overlap class (strict)"} <= counts.keys()


def test_each_picture_has_its_data_as_csv(reported):
    report = read(reported)
    for picture in PICTURES:
        shown = report["figures"][picture.name]
        written = rows_of(reported, f"{picture.name}.csv")
        assert len(written) == len(shown) > 0
        for row, text in zip(shown, written, strict=True):
            assert {key: "" if value is None else str(value) for key, value in row.items()} == {k: text[k] for k in row}


class Page(HTMLParser):
    """What a browser would fetch, and the ids."""

    def __init__(self, text):
        super().__init__()
        self.wanted, self.ids, self.tags = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.wanted += [value for key, value in attributes if key in ("src", "href", "xlink:href")]
        self.ids += [value for key, value in attributes if key == "id"]


def test_the_page_needs_nothing_beside_it(reported):
    text = (reported.folder / "report" / "report.html").read_text()
    page = Page(text)
    assert page.tags["svg"] == len(PICTURES) and "script" not in page.tags and "link" not in page.tags
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.wanted)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text and "@media print" in text and 'name="viewport"' in text


def test_a_name_is_text_not_markup(experiment):
    experiment.plan["hypotheses"] = ["<script>alert(1)</script>"]
    experiment.freeze()
    write_report(experiment.folder)
    assert "<script>" not in (experiment.folder / "report" / "report.html").read_text()


def test_contamination_is_told(reported):
    html = (reported.folder / "report" / "report.html").read_text()
    for text in ("FLAN-T5", "raises the none arm", "overlap class, strict", "near-duplicate contexts"):
        assert text in html


def test_nothing_is_written_where_something_is_refused(finished):
    path = finished.folder / "data" / "test.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match=r"test\.json: its hash is"):
        write_report(finished.folder)
    assert not (finished.folder / "report").exists()


def test_a_mixture_is_tested_with_and_without(finished):
    cells = [{"id": f"mixture-{seed}", "model": "tiny-t5", "arm": "mixture", "seed": seed} for seed in (0, 1)]
    finished.plan["arms"].append("mixture")
    finished.plan["cells"] += cells
    finished.plan["secondary"].append(["mixture@gold", "mixture@none"])
    finished.freeze()
    for cell in cells:
        finished.finish(cell)
    report = report_of(finished)
    assert [row["side"] for row in report["table"]][3:5] == ["mixture@gold", "mixture@none"]
    within = next(
        row for row in report["figures"]["contrasts"] if row["a"] == "mixture@gold" and row["b"] == "mixture@none"
    )
    assert within["seeds"] == 2 and within["role"] == "secondary" and within["p_holm"] >= within["p"]
    against = next(row for row in report["figures"]["contrasts"] if (row["a"], row["b"]) == ("mixture@gold", "none"))
    assert against["role"] == "post hoc" and "contrast mixture@gold − none" in report["post_hoc"]


def test_seeds_of_one_arm_are_compared_with_each_other(reported):
    rows = [row for row in read(reported)["figures"]["same_arm"] if row["side"] == "gold"]
    assert [(row["first"], row["second"]) for row in rows if row["kind"] == "seeds"] == [(0, 1), (0, 2), (1, 2)]
    assert len(rows) == 3 * (1 + analysis.DEALS) and all(0 < row["p"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(91.24), "91.2"),
        (percent(None), "–"),
        (points(-0.349, 2), "−0.35"),
        (difference({"difference": 81.42, "low": 79, "high": 83.66, "scope": "articles"}), "+81.4 [+79.0, +83.7]°"),
        (difference({"difference": 100, "low": None, "high": None, "scope": "articles"}), "+100.0 [–]"),
        (is_p(None), "–"),
        (p_value(0.0004), "< .001"),
        (p_value(0.0132), ".013"),
        (p_value(1.0), "1.00"),
        (is_p(0.25), "= .25"),
        (is_p(0.0), "< .001"),
        (big(1.234e12), "1.2 × 10¹²"),
        (big(0), "0"),
    ],
)
def test_numbers_are_written_as_people_read_them(shown, expected):
    assert shown == expected


def test_plain_values_are_json_of_few_digits():
    value = {"a": np.float64(1 / 3), 2: (np.int64(3), np.bool_(True)), "inf": float("inf"), "path": "x"}
    assert plain(value) == {"a": 0.33333333, "2": [3, True], "inf": None, "path": "x"}
    assert to_csv([{"a": 1}, {"b": None, "a": "x,y"}]) == 'a,b\n1,\n"x,y",\n'


def test_the_templates_are_package_data():
    folder = Path(analysis.__file__).parent
    patterns = (folder.parent.parent / "pyproject.toml").read_text().split('"babl.experiment" = ')[1].split("\n")[0]
    assert {path.suffix for path in folder.iterdir() if path.name.startswith("report.")} == {".py", ".html", ".md"}
    assert '"*.html"' in patterns and '"*.md"' in patterns
