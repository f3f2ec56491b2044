import math
import time

import numpy as np
import pytest
from scipy import stats

from babl.evaluation.statistics import (
    cluster_bootstrap,
    cluster_standard_error,
    crossed_bootstrap,
    crossed_interval,
    crossed_standard_error,
    crossed_test,
    equivalence_test,
    expected_standard_error,
    holm,
    mcnemar,
    minimal_detectable_effect,
    power,
    randomisation_test,
    seed_sign_test,
    variance_components,
)


def articles(sizes):
    """A name for each question."""
    return np.repeat([f"article {i}" for i in range(len(sizes))], sizes)


@pytest.fixture
def uneven():
    """Differences (4, N) of four seeds on 12 articles of 2 to 13 questions, with effects of everything; and names."""
    rng, names = np.random.default_rng(3), articles(range(2, 14))
    member = np.unique(names, return_inverse=True)[1]
    values = rng.normal(1, 2, (4, 1)) + rng.normal(0, 3, 12)[member] + rng.normal(0, 5, len(names))
    return values + rng.normal(0, 4, (4, len(names))), names


def test_identical_clusters_leave_no_doubt():
    assert cluster_bootstrap(np.array([1.0, 0.0] * 10), [f"c{i // 2}" for i in range(20)]) == (0.5, 0.5)


def test_answers_that_agree_within_an_article_widen_the_interval():
    values = np.repeat([0.0, 1.0], 50)
    by_article = [f"a{i // 10}" for i in range(100)]  # ten articles, each all right or all wrong
    low, high = cluster_bootstrap(values, by_article)
    narrow_low, narrow_high = cluster_bootstrap(values, [str(i) for i in range(100)])
    assert high - low > 2 * (narrow_high - narrow_low)


def test_single_question_clusters_are_the_ordinary_bootstrap():
    values = np.random.default_rng(1).random(40)
    ours = cluster_bootstrap(values, [str(i) for i in range(40)])
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for trial in range(200):
        by_article = rng.normal(0.5, 0.2, 30)
        values = (by_article[:, None] + rng.normal(0, 0.1, (30, 5))).ravel()
        low, high = cluster_bootstrap(values, [f"a{i // 5}" for i in range(150)], samples=500, seed=trial)
        hits += low <= 0.5 <= high
    assert hits / 200 > 0.88


def test_one_seed_and_equal_articles_are_the_t_test_of_the_articles_means():
    values = np.random.default_rng(0).normal(0.3, 1, (1, 60))
    theirs = stats.ttest_1samp(values.reshape(15, 4).mean(1), 0)
    assert crossed_test(values, articles([4] * 15)) == pytest.approx(theirs.pvalue)
    assert crossed_interval(values, articles([4] * 15)) == pytest.approx(theirs.confidence_interval())


def test_the_variance_is_that_of_a_crossed_analysis_of_variance():
    import pandas
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    rng = np.random.default_rng(0)
    values = rng.normal(0, 2, (5, 1)) + rng.normal(0, 3, 20) + rng.normal(0, 1, (5, 20))
    seed, article = np.indices(values.shape)
    table = pandas.DataFrame({"y": values.ravel(), "seed": seed.ravel(), "article": article.ravel()})
    square = anova_lm(ols("y ~ C(seed) + C(article)", table).fit())["mean_sq"]
    error, df = crossed_standard_error(values, articles([1] * 20))
    variance = (square["C(seed)"] + square["C(article)"] - square["Residual"]) / values.size
    assert error**2 == pytest.approx(variance)
    assert 4 < df < 23


def test_the_variance_is_two_way_clustering_where_there_are_many_of_both():
    import statsmodels.api as sm
    from statsmodels.stats.sandwich_covariance import cov_cluster_2groups

    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (60, 1)) + rng.normal(0, 1, 60) + rng.normal(0, 1, (60, 60))
    fit = sm.OLS(values.ravel(), np.ones(values.size)).fit()
    theirs = cov_cluster_2groups(fit, *(index.ravel() for index in np.indices(values.shape)))[0].item()
    assert crossed_standard_error(values, articles([1] * 60))[0] == pytest.approx(math.sqrt(theirs), rel=0.02)


def test_unequal_articles_are_left_out_one_at_a_time(uneven):
    values, names = uneven
    one_seed = values[:1]
    left_out = np.array([one_seed[:, names != name].mean() for name in np.unique(names)])
    weights = np.array(range(2, 14)) / len(names)
    expected = 11 / 12 * ((left_out - one_seed.mean()) ** 2).sum()
    assert crossed_standard_error(one_seed, names) == pytest.approx((math.sqrt(expected), 1 / (weights**2).sum() - 1))


def test_an_effect_of_the_seed_widens_the_primary_interval_and_leaves_the_models_interval():
    names, rng = articles([5] * 20), np.random.default_rng(0)
    values = rng.normal(0, 1, 100) + rng.normal(0, 0.1, (3, 100))
    apart = values + np.array([[-1.0], [0.0], [1.0]])
    same, wide = crossed_interval(values, names), crossed_interval(apart, names)
    assert wide[1] - wide[0] > 4 * (same[1] - same[0])
    assert cluster_bootstrap(values.mean(0), names) == pytest.approx(cluster_bootstrap(apart.mean(0), names))


def test_the_interval_excludes_0_exactly_where_the_test_rejects(uneven):
    values, names = uneven
    rejected = []
    for shift in np.linspace(-12, 12, 49):
        low, high = crossed_interval(values + shift, names)
        rejected.append(crossed_test(values + shift, names) < 0.05)
        assert rejected[-1] == (not low <= 0 <= high)
    assert 0 < sum(rejected) < 49


@pytest.mark.parametrize("interval", [crossed_interval, crossed_bootstrap])
def test_intervals_keep_the_unit_and_do_not_depend_on_order(uneven, interval):
    values, names = uneven
    low, high = interval(values, names)
    assert interval(values, names) == (low, high), "repeated, the same"
    assert interval(100 * values, names) == pytest.approx((100 * low, 100 * high))
    order = np.random.default_rng(0).permutation(len(names))
    assert interval(values[:, order], names[order]) == pytest.approx((low, high))
    assert low < values.mean() < high
    inner = interval(values, names, level=0.5)
    assert low < inner[0] < inner[1] < high


def test_the_bootstrap_is_as_wide_as_the_students_interval_and_leans_as_the_articles_do(uneven):
    values, names = uneven
    drawn, student = crossed_bootstrap(values, names), crossed_interval(values, names)
    assert drawn[1] - drawn[0] == pytest.approx(student[1] - student[0], rel=0.06)
    skewed = np.zeros((3, 200))
    skewed[:, :10] = 1.0  # one article of twenty has it all
    low, high = crossed_bootstrap(skewed, articles([10] * 20))
    assert high - skewed.mean() > 1.5 * (skewed.mean() - low)


def test_redraws_of_six_seeds_and_48_articles_take_well_under_a_second():
    values, names = np.random.default_rng(0).random((6, 10_570)), [f"article {i % 48}" for i in range(10_570)]
    begun = time.perf_counter()
    crossed_bootstrap(values, names)
    randomisation_test(values - 0.5, names)
    assert time.perf_counter() - begun < 1


def test_many_articles_are_redrawn_in_blocks_that_fit_in_memory():
    import tracemalloc

    values, names = np.random.default_rng(0).random((2, 20_000)) - 0.5, [str(i) for i in range(20_000)]
    tracemalloc.start()
    low, high = crossed_bootstrap(values, names, samples=1000)
    p = randomisation_test(values, names, draws=1000)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert low < values.mean() < high and 0 < p <= 1
    assert most < 250 << 20  # all redraws at once take 480 MiB, and signs as numbers 160


def test_randomisation_agrees_with_scipys_over_all_signs(uneven):
    values, names = uneven
    sums = np.array([values[:, names == name].sum() for name in np.unique(names)])
    exact = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=5000).pvalue  # all 2^12
    assert 0.01 < exact < 0.9
    assert randomisation_test(values, names) == pytest.approx(exact, abs=0.006)
    assert randomisation_test(values, names, seed=1) != randomisation_test(values, names) == randomisation_test(*uneven)


def test_randomisation_flips_an_article_for_all_seeds_together():
    names = articles([3] * 48)
    assert randomisation_test(np.ones((3, 144)), names, draws=999) == 1 / 1000, "the observed labels count as a draw"
    opposed = np.concatenate([np.ones((1, 144)), -np.ones((1, 144))])
    assert randomisation_test(opposed, names, draws=999) == 1


def test_seed_signs_are_scipys_over_all_seeds(uneven):
    values = uneven[0]
    exact = stats.permutation_test((values.mean(1),), np.sum, permutation_type="samples").pvalue
    assert seed_sign_test(values) == pytest.approx(exact)
    assert seed_sign_test(np.ones((3, 4)) / 10) == 0.25 and seed_sign_test(np.ones((6, 4)) / 10) == 2 / 64


def test_the_cluster_robust_error_is_statsmodels(uneven):
    import statsmodels.api as sm

    values, names = uneven
    groups = np.unique(names, return_inverse=True)[1]
    fit = sm.OLS(values[0], np.ones(len(names))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    assert cluster_standard_error(values[0], names) == pytest.approx(fit.bse.item())
    independent = cluster_standard_error(values[0], [str(i) for i in range(len(names))])
    assert independent == pytest.approx(stats.sem(values[0]))


def test_cluster_robust_error_and_jackknife_and_bootstrap_agree():
    rng, names = np.random.default_rng(0), articles(np.random.default_rng(1).integers(10, 40, 48))
    values = rng.normal(0, 1, 48)[np.unique(names, return_inverse=True)[1]] + rng.normal(0, 3, len(names))
    robust, (jackknife, _) = cluster_standard_error(values, names), crossed_standard_error(values[None], names)
    low, high = cluster_bootstrap(values, names)
    assert jackknife == pytest.approx(robust, rel=0.05)
    assert (high - low) / (2 * 1.96) == pytest.approx(robust, rel=0.05)


def test_variance_components_are_found_again():
    truth = {"seed": 4.0, "article": 9.0, "question": 25.0, "residual": 16.0}
    sizes, rng = [5, 10, 15, 20, 25] * 8, np.random.default_rng(0)
    names = articles(sizes)
    member = np.unique(names, return_inverse=True)[1]
    found, means = [], []
    for _ in range(300):
        values = rng.normal(0, 2, (5, 1)) + rng.normal(0, 3, 40)[member] + rng.normal(0, 5, len(names))
        values = values + rng.normal(0, 4, (5, len(names)))
        found.append(variance_components(values, names))
        means.append(values.mean())
    for part, variance in truth.items():
        assert np.mean([one[part] for one in found]) == pytest.approx(variance, rel=0.1), part
    assert np.std(means) == pytest.approx(expected_standard_error(truth, 5, sizes)[0], rel=0.1)


def test_what_is_expected_of_an_experiment_is_what_it_gets():
    names, parts = articles([25] * 48), {"seed": 1.0, "article": 9.0, "question": 25.0, "residual": 16.0}
    rng, found = np.random.default_rng(0), []
    member = np.unique(names, return_inverse=True)[1]
    for _ in range(200):
        values = rng.normal(0, 1, (6, 1)) + rng.normal(0, 3, 48)[member] + rng.normal(0, 5, len(names))
        found.append(crossed_standard_error(values + rng.normal(0, 4, (6, len(names))), names))
    error, df = expected_standard_error(parts, 6, [25] * 48)
    assert np.sqrt(np.mean([e**2 for e, _ in found])) == pytest.approx(error, rel=0.05)
    assert np.median([d for _, d in found]) == pytest.approx(df, rel=0.25)


def test_one_seed_leaves_its_part_in_the_questions():
    rng, names = np.random.default_rng(0), articles([10] * 200)
    values = rng.normal(0, 3, (1, 2000)) + np.repeat(rng.normal(0, 2, 200), 10)
    found = variance_components(values, names)
    assert found["seed"] == found["residual"] == 0
    assert (found["article"], found["question"]) == pytest.approx((4, 9), rel=0.15)


def test_mcnemar_is_statsmodels_exact_test():
    from statsmodels.stats.contingency_tables import mcnemar as theirs

    a, b = np.random.default_rng(0).random((2, 200)) < [[0.5], [0.6]]
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    assert mcnemar(a, b) == pytest.approx(theirs(table, exact=True).pvalue) == pytest.approx(mcnemar(b, a))
    assert mcnemar(a, a) == 1


def test_mcnemar_takes_questions_of_one_article_for_independent():
    names, wins = articles([20] * 10), np.repeat([1.0] * 7 + [-1.0] * 3, 20)  # 7 articles better, 3 worse
    assert mcnemar(wins > 0, wins < 0) < 1e-6
    assert randomisation_test(wins[None], names) > 0.3 and crossed_test(wins[None], names) > 0.1


def test_holm_multiplies_the_smallest_by_how_many_there_are():
    assert holm({"b": 0.04, "a": 0.01, "c": 0.03}) == pytest.approx({"b": 0.06, "a": 0.03, "c": 0.06})
    assert list(holm({"b": 0.04, "a": 0.01})) == ["b", "a"]
    assert holm({}) == {}


def test_equivalence_is_statsmodels_where_questions_are_independent():
    from statsmodels.stats.weightstats import ttost_paired

    for seed, margin in ((0, 0.3), (1, 0.1), (2, 0.02)):
        a, b = np.random.default_rng(seed).normal(0, 1, (2, 300))
        theirs = ttost_paired(a, b, -margin, margin)[0]
        assert equivalence_test((a - b).mean(), stats.sem(a - b), margin, 299) == pytest.approx(theirs)
    assert equivalence_test(0.5, 0.0, 1.0, 4) == 0 and equivalence_test(1.5, 0.0, 1.0, 4) == 1


def test_power_is_statsmodels():
    from statsmodels.stats.power import NormalIndPower, TTestPower

    theirs = TTestPower().power(0.4, 20, 0.05)
    assert power(0.4, 1 / math.sqrt(20), df=19) == pytest.approx(theirs)
    theirs = NormalIndPower(ddof=0).power(0.4, 20, 0.01, ratio=0)
    assert power(0.4, 1 / math.sqrt(20), level=0.01) == pytest.approx(theirs)
    assert power(0, 1) == pytest.approx(0.05) == power(0, 1, df=3)


def test_the_minimal_effect_is_found_with_the_power_asked_for():
    assert minimal_detectable_effect(0.54) == pytest.approx(2.8 * 0.54, rel=0.001)
    for df in (1, 2, 5, 40, math.inf):
        for wanted in (0.5, 0.8, 0.99):
            effect = minimal_detectable_effect(2.0, wanted, 0.01, df)
            assert power(effect, 2.0, 0.01, df) == pytest.approx(wanted)
    assert minimal_detectable_effect(1, df=2) > minimal_detectable_effect(1, df=5) > minimal_detectable_effect(1)
    assert minimal_detectable_effect(0.0) == 0 and minimal_detectable_effect(math.inf) == math.inf


def test_seeds_and_articles_that_differ_only_together_still_leave_doubt():
    values = np.array([[1.0, -1.0], [-1.0, 1.0]])
    low, high = crossed_bootstrap(values, ["a", "b"])
    assert (low, high) == crossed_interval(values, ["a", "b"]) and low < 0 < high
    assert math.isfinite(high)


def test_one_article_says_nothing_about_others():
    values, names = np.random.default_rng(0).random((3, 10)), ["a"] * 10
    assert crossed_standard_error(values, names)[0] == cluster_standard_error(values[0], names) == math.inf
    assert crossed_interval(values, names) == crossed_bootstrap(values, names) == (-math.inf, math.inf)
    assert crossed_test(values, names) == randomisation_test(values, names, draws=99) == 1
    assert variance_components(values, names)["article"] == 0


def test_scores_that_are_all_equal_leave_no_doubt():
    names = articles([2, 3, 4])
    for value in (0.0, 0.1, 100.0):
        values = np.full((3, 9), value)
        for interval in (crossed_interval, crossed_bootstrap):
            assert interval(values, names) == pytest.approx((value, value), rel=1e-12)
        assert crossed_test(values, names) == (value == 0)
        assert list(variance_components(values, names).values()) == pytest.approx([0, 0, 0, 0], abs=1e-20)
    assert randomisation_test(np.zeros((3, 9)), names, draws=99) == seed_sign_test(np.zeros((3, 9))) == 1


def test_a_true_null_with_effects_of_seed_and_article_is_rejected_about_as_often_as_the_level_says():
    rng, names = np.random.default_rng(0), np.repeat(np.arange(40), 10)
    p, models_only = [], []
    for _ in range(400):
        values = rng.normal(0, 3, (4, 1)) + rng.normal(0, 10, 40)[names] + rng.normal(0, 30, (400))
        values = values + rng.normal(0, 20, (4, 400))
        p.append(crossed_test(values, names))
        models_only.append(randomisation_test(values, names, draws=199))
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.08
    assert np.mean(np.array(models_only) <= 0.05) > 0.1, "which is why it is not the primary test"
