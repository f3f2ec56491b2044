import numpy as np
import pytest

from babl.evaluation.statistics import cluster_bootstrap


def test_identical_clusters_leave_no_doubt():
    assert cluster_bootstrap(np.array([1.0, 0.0] * 10), [f"c{i // 2}" for i in range(20)]) == (0.5, 0.5)


def test_answers_that_agree_within_an_article_widen_the_interval():
    values = np.repeat([0.0, 1.0], 50)
    by_article = [f"a{i // 10}" for i in range(100)]  # ten articles, each all right or all wrong
    low, high = cluster_bootstrap(values, by_article)
    narrow_low, narrow_high = cluster_bootstrap(values, [str(i) for i in range(100)])
    assert high - low > 2 * (narrow_high - narrow_low)


def test_single_question_clusters_are_the_ordinary_bootstrap():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).random(40)
    ours = cluster_bootstrap(values, [str(i) for i in range(40)])
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for trial in range(200):
        articles = rng.normal(0.5, 0.2, 30)
        values = (articles[:, None] + rng.normal(0, 0.1, (30, 5))).ravel()
        low, high = cluster_bootstrap(values, [f"a{i // 5}" for i in range(150)], samples=500, seed=trial)
        hits += low <= 0.5 <= high
    assert hits / 200 > 0.88
