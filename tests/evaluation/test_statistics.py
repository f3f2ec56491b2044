import math

import numpy as np
import pytest
from scipy import stats

from babl.evaluation.statistics import (
    cluster_standard_error,
    crossed_standard_error,
    equivalence_test,
    estimate,
    estimate_score,
    expected_standard_error,
    holm,
    mcnemar,
    minimal_detectable_effect,
    power,
    randomisation_test,
    redrawn_standard_error,
    seed_sign_test,
    too_few,
    variance_components,
)


def articles(sizes):
    """A name for each question."""
    return np.repeat([f"article {i}" for i in range(len(sizes))], sizes)


@pytest.fixture
def uneven():
    """Differences (4, N) of four seeds on 15 articles of 2 to 16 questions, with effects of everything; and names."""
    rng, names = np.random.default_rng(3), articles(range(2, 17))
    member = np.unique(names, return_inverse=True)[1]
    values = rng.normal(1, 2, (4, 1)) + rng.normal(0, 3, 15)[member] + rng.normal(0, 5, len(names))
    return values + rng.normal(0, 4, (4, len(names))), names


def test_answers_that_agree_within_an_article_widen_the_interval():
    values = np.repeat([0.0, 100.0], 50)
    by_article = [f"a{i // 10}" for i in range(100)]  # ten articles, each all right or all wrong
    for kind in ("interval", "score_interval"):
        low, high = getattr(estimate(values[None], by_article), kind)()
        narrow_low, narrow_high = getattr(estimate(values[None], [str(i) for i in range(100)]), kind)()
        assert high - low > 2 * (narrow_high - narrow_low)


def test_redrawing_articles_of_one_question_is_the_ordinary_bootstrap():
    values = np.random.default_rng(1).random(40)
    theirs = stats.bootstrap((values,), np.mean, rng=0, n_resamples=10_000).standard_error
    ours = redrawn_standard_error(values, [str(i) for i in range(40)])
    assert ours == pytest.approx(theirs * math.sqrt(40 / 39), rel=0.03) == pytest.approx(stats.sem(values), rel=0.03)


def test_one_seed_and_equal_articles_are_the_t_test_of_the_articles_means():
    values = np.random.default_rng(0).normal(0.3, 1, (1, 60))
    theirs = stats.ttest_1samp(values.reshape(15, 4).mean(1), 0)
    ours = estimate(values, articles([4] * 15))
    assert (ours.scope, ours.unknown) == ("articles", "")
    assert ours.p == pytest.approx(theirs.pvalue)
    assert ours.interval() == pytest.approx(theirs.confidence_interval())


def test_scores_of_independent_questions_have_wilsons_interval():
    right = np.repeat([100.0, 0.0], [37, 463])
    theirs = stats.binomtest(37, 500).proportion_ci(method="wilson")
    low, high = estimate(right[None], [str(i) for i in range(500)]).score_interval()
    assert (low / 100, high / 100) == pytest.approx(theirs, rel=0.01)  # Student's quantile, and n - 1
    assert 0 < low < 7.4 < high


@pytest.mark.parametrize(
    ("right", "reason"),
    [
        (4, "4 right of 40 answers, and an interval needs 5"),
        (5, ""),
        (35, ""),
        (36, "4 wrong of 40 answers, and an interval needs 5"),
    ],
)
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_score_of_few_right_or_few_wrong_answers_has_no_interval(seeds, right, reason):
    values = np.tile(np.repeat([100.0, 0.0], [right, 40 - right]), (seeds, 1))
    found = estimate_score(values, articles([1] * 40))
    assert found.unknown == reason and (found.score_interval() is None) == bool(reason)
    halves = np.repeat([50.0, 0.0], [2 * right, 80 - 2 * right])[None]  # half the words of twice as many answers
    assert (estimate_score(halves, articles([1] * 80)).score_interval() is None) == (right < 5)
    assert estimate(values, articles([1] * 40)).interval() is not None  # a difference may be that rare
    other = np.roll(values[:1], 20, axis=1)  # a seed that is right and wrong elsewhere
    assert estimate_score(np.concatenate([values, other]), articles([1] * 40)).score_interval() is not None


def test_conclusions_are_about_the_trained_models_where_seeds_or_articles_are_few(uneven):
    values, names = uneven
    assert estimate(values, names).scope == estimate(values[:3], names).scope == "seeds and articles"
    for few in (values[:1], values[:2]):
        assert estimate(few, names).scope == "articles"
        alone = estimate(few.mean(0)[None], names)  # the seeds' mean is one model's score
        assert estimate(few, names).interval() == pytest.approx(alone.interval())
    fewer = names != "article 14"
    assert estimate(values[:, fewer], names[fewer]).scope == "articles"
    assert estimate(values, names, "articles").error < estimate(values, names).error


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ([300], "1 article, and an interval needs 5"),
        ([3, 3, 3, 3], "4 articles, and an interval needs 5"),
        ([1] * 30 + [300], "one article holds 91% of the questions, and an interval needs all to hold at most a third"),
        ([4, 4, 3, 3, 4], ""),
        ([20, 8, 8, 8, 8, 8], ""),
    ],
)
def test_articles_that_are_too_few_or_too_unequal_give_a_reason_and_no_interval(sizes, reason):
    assert too_few(sizes) == reason
    found = estimate(np.random.default_rng(0).normal(0, 1, (1, sum(sizes))), articles(sizes))
    nothing = (found.interval(), found.score_interval(), found.p, found.p_equivalent(1.0), found.detectable)
    assert found.unknown == reason and all((value is None) == bool(reason) for value in nothing[:1] + nothing[2:])


@pytest.mark.parametrize("seeds", [1, 3])
def test_scores_that_do_not_differ_between_articles_are_no_certainty(seeds):
    names = articles([3] * 20)
    alike = np.tile([100 / 3, 200 / 3, 0.1], 20)  # within each article they differ, its means do not
    for values in (np.full((seeds, 60), 100.0), np.zeros((seeds, 60)), np.tile(alike, (seeds, 1))):
        found = estimate(values, names)
        assert found.unknown == "all articles agree exactly, so nothing shows how far others would differ"
        assert [found.error, found.interval(), found.p, found.p_equivalent(1.0), found.detectable] == [None] * 5
    assert randomisation_test(np.zeros((3, 60)), names, draws=99) == seed_sign_test(np.zeros((3, 60))) == 1
    assert list(variance_components(np.full((3, 60), 0.1), names).values()) == pytest.approx([0] * 4, abs=1e-20)


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
    weights = np.array(range(2, 17)) / len(names)
    expected = 14 / 15 * ((left_out - one_seed.mean()) ** 2).sum()
    assert crossed_standard_error(one_seed, names) == pytest.approx((math.sqrt(expected), 1 / (weights**2).sum() - 1))


def test_an_effect_of_the_seed_widens_the_primary_interval_and_leaves_the_models_interval():
    names, rng = articles([5] * 20), np.random.default_rng(0)
    values = rng.normal(0, 1, 100) + rng.normal(0, 0.1, (3, 100))
    apart = values + np.array([[-1.0], [0.0], [1.0]])
    assert estimate(apart, names).error > 4 * estimate(values, names).error
    assert estimate(apart, names, "articles").error == pytest.approx(estimate(values, names, "articles").error)


def test_the_interval_excludes_0_exactly_where_the_test_rejects(uneven):
    values, names = uneven
    rejected = []
    for shift in np.linspace(-12, 12, 49):
        found = estimate(values + shift, names)
        low, high = found.interval()
        rejected.append(found.p < 0.05)
        assert rejected[-1] == (not low <= 0 <= high)
    assert 0 < sum(rejected) < 49


def test_intervals_keep_the_unit_and_do_not_depend_on_order(uneven):
    values, names = uneven
    low, high = estimate(values, names).interval()
    assert estimate(100 * values, names).interval() == pytest.approx((100 * low, 100 * high))
    order = np.random.default_rng(0).permutation(len(names))
    assert estimate(values[:, order], names[order]).interval() == pytest.approx((low, high))
    assert low < values.mean() < high
    inner = estimate(values, names).interval(level=0.5)
    assert low < inner[0] < inner[1] < high


def test_many_articles_are_redrawn_in_blocks_that_fit_in_memory():
    import tracemalloc

    values, names = np.random.default_rng(0).random((2, 20_000)) - 0.5, [str(i) for i in range(20_000)]
    tracemalloc.start()
    redrawn = redrawn_standard_error(values[0], names, samples=1000)
    p = randomisation_test(values, names, draws=1000)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert redrawn == pytest.approx(stats.sem(values[0]), rel=0.1) and 0 < p <= 1
    assert most < 250 << 20  # all redraws at once take 480 MiB, and signs as numbers 160


def test_randomisation_agrees_with_scipys_over_all_signs(uneven):
    values, names = uneven
    sums = np.array([values[:, names == name].sum() for name in np.unique(names)])
    exact = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=40_000).pvalue  # all 2^15
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
    assert jackknife == pytest.approx(robust, rel=0.05)
    assert redrawn_standard_error(values, names) == pytest.approx(robust, rel=0.05)


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
    assert randomisation_test(wins[None], names) > 0.3 and estimate(wins[None], names).p > 0.1


def test_holm_is_statsmodels():
    from statsmodels.stats.multitest import multipletests

    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 30):
        p = rng.random(size) ** 3
        theirs = multipletests(p, method="holm")[1]
        assert list(holm({str(i): value for i, value in enumerate(p)}).values()) == pytest.approx(theirs)


def test_holm_multiplies_the_smallest_by_how_many_there_are():
    """The example that Wikipedia's article "Holm-Bonferroni method" works through: H1 and H4 are rejected at .05."""
    found = holm({"H1": 0.01, "H2": 0.04, "H3": 0.03, "H4": 0.005})
    assert found == pytest.approx({"H1": 0.03, "H2": 0.06, "H3": 0.06, "H4": 0.02})
    assert holm({"b": 0.04, "a": 0.01, "c": 0.03}) == pytest.approx({"b": 0.06, "a": 0.03, "c": 0.06})
    assert list(holm({"b": 0.04, "a": 0.01})) == ["b", "a"]
    assert holm({}) == {}


def test_equivalence_is_statsmodels_where_questions_are_independent():
    from statsmodels.stats.weightstats import ttost_paired

    for seed, margin in ((0, 0.3), (1, 0.1), (2, 0.02)):
        a, b = np.random.default_rng(seed).normal(0, 1, (2, 300))
        theirs = ttost_paired(a, b, -margin, margin)[0]
        assert equivalence_test((a - b).mean(), stats.sem(a - b), margin, 299) == pytest.approx(theirs)


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


def test_a_true_null_with_effects_of_seed_and_article_is_rejected_about_as_often_as_the_level_says():
    rng, names = np.random.default_rng(0), np.repeat(np.arange(40), 10)
    p, models_only = [], []
    for _ in range(400):
        values = rng.normal(0, 3, (4, 1)) + rng.normal(0, 10, 40)[names] + rng.normal(0, 30, (400))
        values = values + rng.normal(0, 20, (4, 400))
        p.append(estimate(values, names).p)
        models_only.append(randomisation_test(values, names, draws=199))
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.08
    assert np.mean(np.array(models_only) <= 0.05) > 0.1, "which is why it is not the primary test"
