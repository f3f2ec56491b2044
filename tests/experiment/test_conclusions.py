"""What a report concludes, where seeds or articles are few, nothing varies, or no model is needed."""

import json
import re

import pytest


def primary_of(report):
    return next(row for row in report["figures"]["contrasts"] if "primary" in row["role"])


def test_one_seed_speaks_of_the_trained_models_alone(make):
    report, texts = make(seeds=(7,)).report()
    row, lead = primary_of(report), report["answers"]["tiny-t5"]
    assert lead.startswith("Yes, for this one pair of trained models alone. Exact match is ")
    assert "over new articles alone, for these trained models: one seed tells nothing of how another would" in lead
    assert (row["scope"], row["low"], row["high"]) == ("articles", row["models_low"], row["models_high"])
    assert {of["scope"] for of in report["figures"]["contrasts"]} == {"articles"}
    for name in ("report.html", "report.md"):
        assert "new seeds" not in texts[name], name
        assert re.search(r"\+\d+\.\d \[\+\d+\.\d, \+\d+\.\d\]°", texts[name]), "intervals are marked"
        assert "one seed does not show its own part" in texts[name]
    assert {"share_article", "share_question and residual"} < report["primary"][0].keys()


def test_two_seeds_are_said_to_be_too_few(make):
    report, texts = make(seeds=(0, 1)).report()
    seeds = {(r["side"], r["seed"]): r["exact"] for r in report["figures"]["seeds"]}
    first, second = (f"{seeds['gold', s] - seeds['none', s]:+.1f}" for s in (0, 1))
    lead = report["answers"]["tiny-t5"]
    assert lead.startswith("Yes, for these 2 pairs of trained models alone.")
    assert f"the seeds give {first} and {second} EM points, and two are too few to tell how far a third may" in lead
    assert not any("new seeds" in texts[name] for name in ("report.html", "report.md"))


def test_a_part_done_experiment_concludes_from_the_seeds_it_has(make):
    experiment = make()
    experiment.cells = [cell for cell in experiment.cells if cell["seed"] == 0]
    report, texts = experiment.report()
    assert primary_of(report)["scope"] == "articles" and "3 of 9 cells scored" in texts["report.md"]
    assert report["answers"]["tiny-t5"].startswith("Yes, for this one pair of trained models alone.")
    assert "new seeds" not in texts["report.html"]


def test_three_seeds_on_few_articles_say_how_many_are_needed(make):
    report, _ = make(dev_articles=6).report()
    lead = report["answers"]["tiny-t5"]
    assert primary_of(report)["scope"] == "articles" and primary_of(report)["p"] < 0.05
    assert "beside 3 seeds, 6 articles are too few to speak of others of both (15 are needed)" in lead


def test_fewer_than_five_articles_have_neither_interval_nor_p(make):
    report, texts = make(dev_articles=4).report()
    row, lead = primary_of(report), report["answers"]["tiny-t5"]
    assert [row[key] for key in ("low", "high", "models_low", "p", "mde", "se")] == [None] * 6
    assert lead.startswith("Not known, for these 3 pairs") and "4 articles, and an interval needs 5" in lead
    assert [r["exact_low"] for r in report["table"]] == [None] * len(report["table"])
    assert "[–]" in texts["report.md"] and "[–]" in texts["report.html"]
    assert [r["covered"] for r in report["chance"]] == [None, None]


def test_two_dead_models_are_not_shown_to_be_equal(make):
    experiment = make()
    experiment.says = lambda *_: "nothing of the kind"
    report, texts = experiment.report()
    row = primary_of(report)
    same = next(of for of in report["figures"]["contrasts"] if "equivalence" in of["role"])
    assert row["difference"] == same["difference"] == 0
    nothing = ("low", "high", "p", "mde", "se_articles")
    assert [of.get(key) for of in (row, same) for key in (*nothing, "p_equivalence")] == [None] * 12
    assert report["answers"]["tiny-t5"].startswith(
        "Not known. Exact match is 0.0 % with the context and 0.0 % without it: +0.0 EM points, without interval and p "
        "(all articles agree exactly, so nothing shows how far others would differ)."
    )
    for name in ("report.html", "report.md"):
        assert "+0.0 [–]" in texts[name] and "[+0.0, +0.0]" not in texts[name] and "[0.0, 0.0]" not in texts[name]


@pytest.mark.parametrize(("metric", "name"), [("exact", "exact match"), ("f1", "F1")])
def test_the_lead_names_the_best_answer_without_a_model_where_it_is_better(make, metric, name):
    experiment = make(metric=metric)
    golds = {e.id: e.answers[0].text for e in experiment.test}
    few = set(sorted(golds)[:3])
    experiment.says = lambda arm, example, *_: (
        golds[example.id] if arm == "gold" and example.id in few else "no such word"
    )
    report, _ = experiment.report()
    best = max((r for r in report["table"] if r["model"] == "baseline"), key=lambda r: r[metric])
    gold = next(r for r in report["table"] if r["side"] == "gold")
    assert best[metric] > gold[metric] > 0
    assert report["answers"]["tiny-t5"].endswith(
        f" But without any model, the baseline {best['side']!r} reaches {name} {best[metric]:.1f} %, more than the "
        f"{gold[metric]:.1f} % of arm gold."
    )


def test_the_lead_names_no_baseline_that_is_worse(reported):
    report = json.loads((reported.folder / "report" / "report.json").read_text())
    assert "without any model" not in report["answers"]["tiny-t5"]
    assert "The 95 % interval and p are over new seeds and new articles." in report["answers"]["tiny-t5"]
