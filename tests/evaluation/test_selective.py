import json

import numpy as np
import pytest
import sklearn.metrics

from babl.errors import UserError
from babl.evaluation.selective import (
    area_under_risk,
    article_halves,
    calibration,
    coverage_at_precision,
    cross_fitted,
    precision_threshold,
    risk_coverage,
    selective_report,
    tie_safe_best,
)
from babl.evaluation.squad import score


def squad(questions):
    qas = [{"id": qid, "answers": [{"text": gold} for gold in golds]} for qid, golds in questions]
    return {"version": "2.0", "data": [{"title": "T", "paragraphs": [{"qas": qas}]}]}


@pytest.fixture(params=range(3))
def answered(request):
    """Correctness, and confidence in steps of a tenth: many ties."""
    rng = np.random.default_rng(request.param)
    confidence = rng.integers(0, 11, 400) / 10
    return (rng.random(400) < confidence).astype(float), confidence


def test_risk_and_coverage_by_hand():
    coverage, risk = risk_coverage(np.array([1, 0, 1, 0, 1]), np.array([0.9, 0.5, 0.5, 0.2, 0.2]))
    assert coverage.tolist() == [0.2, 0.6, 1.0]
    assert risk == pytest.approx([0, 1 / 3, 2 / 5])


def test_risk_and_coverage_are_those_of_the_rule(answered):
    correct, confidence = answered
    for threshold, coverage, risk in zip(np.unique(confidence)[::-1], *risk_coverage(correct, confidence), strict=True):
        given = confidence >= threshold
        assert (coverage, risk) == (given.mean(), pytest.approx(1 - correct[given].mean()))


def test_the_area_is_the_mean_over_all_orders_of_ties(answered):
    correct, confidence = answered
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(2000):
        order = np.lexsort((rng.random(len(correct)), -confidence))
        areas.append(np.mean(1 - correct[order].cumsum() / np.arange(1, len(order) + 1)))
    assert area_under_risk(correct, confidence) == pytest.approx(np.mean(areas), abs=4 * np.std(areas) / 2000**0.5)
    assert area_under_risk(np.array([1, 0, 1]), np.array([3, 2, 1])) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)


def test_coverage_at_a_precision_is_the_best_of_all_thresholds(answered):
    correct, confidence = answered
    given = [confidence >= threshold for threshold in np.unique(confidence)]
    possible = [mask.mean() for mask in given if correct[mask].mean() >= 0.9]
    assert coverage_at_precision(correct, confidence) == max(possible, default=0)
    assert coverage_at_precision(np.array([1] * 9 + [0]), np.arange(10)[::-1]) == 1.0  # 9 of 10 is 90 %
    assert precision_threshold(np.zeros(3), np.arange(3)) == float("inf")


def test_calibration_by_hand_and_beside_scikit_learn(answered):
    correct, confidence = answered
    result = calibration(correct, confidence)
    assert result["brier"] == pytest.approx(sklearn.metrics.brier_score_loss(correct, confidence))
    assert result["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(correct, confidence))
    # Two bins of two: |.15 - 0| and |.85 - .5|.
    found = calibration(np.array([0, 0, 1, 0]), np.array([0.1, 0.2, 0.8, 0.9]), bins=2)
    assert found["ece"] == pytest.approx((0.15 + 0.35) / 2)
    assert calibration(np.ones(3), np.ones(3)) == {"ece": 0, "brier": 0, "auroc": None}


def test_calibration_error_falls_with_calibration():
    rng = np.random.default_rng(0)
    truth = rng.random(20_000)
    correct = (rng.random(20_000) < truth).astype(float)
    assert calibration(correct, truth)["ece"] < 0.02
    assert calibration(correct, truth**3)["ece"] == pytest.approx(np.mean(truth - truth**3), abs=0.02)


def test_nothing_depends_on_the_order_of_the_questions(answered):
    correct, confidence = answered
    titles, has_answer = [f"t{i % 9}" for i in range(400)], np.arange(400) % 3 > 0
    order = np.random.default_rng(5).permutation(400)
    one = selective_report(correct, confidence, titles, has_answer)
    other = selective_report(correct[order], confidence[order], [titles[i] for i in order], has_answer[order])
    assert one.keys() == other.keys()
    for key in one:
        a, b = (report[key] if isinstance(report[key], dict) else {"": report[key]} for report in (one, other))
        for part in a:
            assert a[part] == pytest.approx(b[part], abs=1e-12), key


# What the official best_exact says of these; see the vectors of the golden files.
TIED = (("q1", ["x"]), ("q2", []))


@pytest.mark.parametrize(("questions", "official"), [(TIED, 100), (TIED[::-1], 50)])
def test_ties_are_answered_together(questions, official):
    result = score(squad(questions), {"q1": "x", "q2": "y"}, {"q1": 0.0, "q2": 0.0})
    assert result["best_exact"] == official
    assert result["oracle_best_exact"] == result["oracle_best_f1"] == 50  # no threshold parts equals


def test_an_article_alone_is_an_empty_answer_to_an_unanswerable_question():
    result = score(squad([("n", []), ("h", ["x"])]), {"n": "the", "h": "x"}, {"n": 0.1, "h": 0.2})
    assert (result["exact"], result["best_exact"]) == (100, 50)
    assert (result["oracle_best_exact"], result["oracle_best_exact_thresh"]) == (100, 0.2)


@pytest.mark.parametrize("na_prob", [{"a": -3.0, "b": -2.0}, {"a": 0.0, "b": 0.5}])
def test_the_threshold_that_abstains_always_does_so_for_any_scale(na_prob):
    data, wrong = squad([("a", []), ("b", [])]), {"a": "x", "b": "x"}
    result = score(data, wrong, na_prob)
    assert (result["best_exact"], result["best_exact_thresh"]) == (100, 0)
    assert score(data, wrong, na_prob, result["best_exact_thresh"])["exact"] < 100  # the official one does not
    assert score(data, wrong, na_prob, result["oracle_best_exact_thresh"])["exact"] == 100


def test_the_best_is_that_of_all_thresholds_and_its_own_threshold_reaches_it():
    rng = np.random.default_rng(0)
    for _ in range(200):
        number = int(rng.integers(1, 12))
        scores, has_answer = rng.integers(0, 3, number) / 2, rng.random(number) < 0.5
        na_prob = rng.integers(0, 5, number) / 4
        reached = {t: np.where(na_prob > t, ~has_answer, scores).mean() for t in (-1.0, *np.unique(na_prob))}
        best, threshold = tie_safe_best(scores, na_prob, has_answer)
        assert best == max(reached.values()) == np.where(na_prob > threshold, ~has_answer, scores).mean()


def test_halves_share_no_article_and_are_alike_in_size():
    titles = [f"t{i % 7}" for i in range(700)]
    second = article_halves(titles, 3)
    assert {t for t, s in zip(titles, second, strict=True) if s}.isdisjoint(
        t for t, s in zip(titles, second, strict=True) if not s
    )
    assert abs(second.mean() - 0.5) < 0.1
    assert article_halves(["a", "a", "a", "b"]).sum() in (1, 3)
    assert (second != article_halves(titles, 4)).any()


def test_a_threshold_is_fitted_on_the_other_half_only():
    titles, confidence = ["a"] * 3 + ["b"] * 3, np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    seen = []

    def fit(mask):
        seen.append(mask.tolist())
        return 0.2 if mask[3:].all() else 0.5

    assert cross_fitted(fit, confidence, titles).tolist() == [False, True, True, False, True, True]
    assert sorted(seen) == [[False] * 3 + [True] * 3, [True] * 3 + [False] * 3]
    with pytest.raises(UserError, match="fitted on other articles than it is used on; all are of 'a'"):
        cross_fitted(fit, confidence, ["a"] * 6)


def test_what_is_fitted_on_noise_is_found_out_on_the_other_half():
    """With confidences that say nothing, the oracle gains and the cross-fitted threshold does not."""
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(100):
        exact, confidence, has_answer = rng.integers(0, 2, 60), rng.random(60), rng.random(60) < 0.5
        report = selective_report(exact, confidence, [f"t{i % 6}" for i in range(60)], has_answer)
        never, always = exact.mean(), (~has_answer).mean()
        assert report["oracle_best_exact"] >= max(never, always)
        gains.append((report["oracle_best_exact"] - max(never, always), report["thresholded_exact"] - 0.5))
    oracle, fitted = np.mean(gains, 0)
    assert oracle > 0.02
    assert abs(fitted) < 0.03


def test_the_report_keeps_what_is_fitted_elsewhere_from_what_an_oracle_says():
    rng = np.random.default_rng(1)
    confidence = rng.random(2000)
    exact = (rng.random(2000) < confidence).astype(float)
    titles, has_answer = [f"t{i % 20}" for i in range(2000)], rng.random(2000) < 0.5
    report = json.loads(json.dumps(selective_report(exact, confidence, titles, has_answer), allow_nan=False))
    assert report["precision"] == pytest.approx(0.9, abs=0.03)
    assert report["coverage"] == pytest.approx(report["oracle_coverage"], abs=0.1)
    assert report["thresholded_exact"] <= report["oracle_best_exact"]
    abstains = confidence < report["oracle_best_exact_thresh"]
    assert np.where(abstains, ~has_answer, exact).mean() == pytest.approx(report["oracle_best_exact"])
    assert sum(report["reliability"]["share"]) == pytest.approx(1)
    assert len(report["curve"]["risk"]) == 101
    assert report["curve"]["coverage"][-1] == 1
    assert report["curve"]["risk"][-1] == pytest.approx(1 - exact.mean())


def test_what_is_undefined_is_none_and_thresholds_need_something_to_part():
    one = selective_report(np.ones(3), np.full(3, 0.5), ["a"] * 3)
    assert one["coverage"] is one["precision"] is one["auroc"] is None
    assert "oracle_best_exact" not in one  # every question has an answer
    constant = selective_report(np.ones(4), np.full(4, 0.5), ["a", "b"] * 2, np.array([True, False] * 2))
    assert "oracle_best_exact" not in constant
    nothing = selective_report(np.zeros(4), np.arange(4) / 4, ["a", "b"] * 2)
    assert (nothing["coverage"], nothing["precision"], nothing["oracle_coverage"]) == (0, None, 0)


@pytest.mark.parametrize("wrong", [-2.1, 1.5, float("nan")])
def test_a_confidence_is_a_probability(wrong):
    with pytest.raises(UserError, match=rf"a confidence is {wrong:g}, expected a probability in \[0, 1\]"):
        selective_report(np.ones(2), np.array([0.5, wrong]), ["a", "b"])
