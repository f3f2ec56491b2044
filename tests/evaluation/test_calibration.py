"""The primary test and interval do what they say, by simulation: articles, questions and seeds all have effects."""

import math

import numpy as np
import pytest
from scipy import stats

from babl.evaluation.statistics import (
    crossed_bootstrap,
    crossed_interval,
    crossed_test,
    expected_standard_error,
    minimal_detectable_effect,
    power,
    randomisation_test,
    variance_components,
)

TRIALS = 2000
ARTICLE, QUESTION, RESIDUAL = 10.0, 40.0, 20.0  # standard deviations of a paired difference, in points


def scores(rng, seeds, sizes, seed_sd, effect=0.0):
    """Differences (S, N) with normal effects of seed, article, question and the rest."""
    articles = np.repeat(np.arange(len(sizes)), sizes)
    by_article, by_question = rng.normal(0, ARTICLE, len(sizes))[articles], rng.normal(0, QUESTION, len(articles))
    by_seed, rest = rng.normal(0, seed_sd, (seeds, 1)), rng.normal(0, RESIDUAL, (seeds, len(articles)))
    return effect + by_seed + by_article + by_question + rest, articles


def exact_matches(rng, seeds, sizes, seed_sd, shift=0.0):
    """Differences (S, N) in exact match, -100, 0 or 100, of two arms that find much the same questions hard.

    About half of the answers are right and a quarter of the pairs differ; each arm has its own way with an article.
    """
    articles = np.repeat(np.arange(len(sizes)), sizes)
    n = len(articles)
    hardness = rng.normal(0, 0.5, len(sizes))[articles] + rng.normal(0, 1.0, n)
    own = rng.normal(0, 0.3, (2, 1, len(sizes)))[..., articles] + rng.normal(0, 0.6, (2, 1, n))
    ability = rng.normal(0, seed_sd, (2, seeds, 1)) + rng.normal(0, 0.4, (2, seeds, n))
    ability[1] += shift
    right = hardness + own + ability > 0  # (2, S, N)
    return 100.0 * right[1] - 100.0 * right[0], articles


def article_sizes(articles):
    """As unequal as those of SQuAD's dev set, where the largest has many times the questions of the smallest."""
    return np.random.default_rng(articles).lognormal(3, 0.5, articles).astype(int) + 3


def within(share, expected, trials=TRIALS, errors=2.0):
    return abs(share - expected) <= errors * math.sqrt(expected * (1 - expected) / trials)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [scores, exact_matches])
@pytest.mark.parametrize(("seeds", "articles", "seed_sd"), [(3, 48, 1.5), (4, 30, 0.0), (5, 48, 3.0), (6, 30, 1.5)])
def test_no_true_difference_is_rejected_as_often_as_the_level_says_and_covered(draw, seeds, articles, seed_sd):
    rng, sizes = np.random.default_rng([seeds, articles]), article_sizes(articles)
    seed_sd = seed_sd if draw is scores else seed_sd / 30  # a thirtieth of the hardness moves about a point
    p, covered = [], np.zeros(2)
    for trial in range(TRIALS):
        values, names = draw(rng, seeds, sizes, seed_sd)
        p.append(crossed_test(values, names))
        intervals = crossed_interval(values, names), crossed_bootstrap(values, names, samples=2000, seed=trial)
        covered += [low <= 0 <= high for low, high in intervals]
    assert within(np.mean(np.array(p) < 0.05), 0.05)
    assert within(covered[0] / TRIALS, 0.95) and within(covered[1] / TRIALS, 0.95), covered / TRIALS
    assert stats.kstest(p, "uniform").statistic < 0.05  # p is about uniform: nowhere off by 5 points


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 6])
def test_models_that_differ_by_noise_alone_are_not_told_apart_too_often(seeds):
    """The same arm twice, with other seeds: the differences have no effect of article or question, only the rest."""
    rng, sizes, rejected = np.random.default_rng(seeds), article_sizes(48), 0
    for _ in range(TRIALS):
        articles = np.repeat(np.arange(48), sizes)
        hardness = rng.normal(0, 0.5, 48)[articles] + rng.normal(0, 1.0, len(articles))
        ability = rng.normal(0, 0.05, (2, seeds, 1)) + rng.normal(0, 0.4, (2, seeds, len(articles)))
        right = hardness + ability > 0
        rejected += crossed_test(100.0 * right[1] - 100.0 * right[0], articles) < 0.05
    assert rejected / TRIALS <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / TRIALS)


@pytest.mark.slow
def test_few_seeds_that_make_most_of_the_variance_are_still_taken_for_what_they_are():
    rng, sizes = np.random.default_rng(2), article_sizes(48)
    rejected = [crossed_test(*scores(rng, 3, sizes, 6.0)) < 0.05 for _ in range(3 * TRIALS)]
    assert 0.05 < np.mean(rejected) < 0.07  # Satterthwaite's own degrees of freedom pass 7 %


@pytest.mark.slow
def test_these_trained_models_are_tested_at_the_level_where_only_articles_are_drawn_anew():
    """With no effect of seeds the randomisation test holds its level; with one it does not, and is not the primary."""
    rejected = {}
    for seed_sd in (0.0, 3.0):
        rng, sizes = np.random.default_rng(1), article_sizes(48)
        p = [randomisation_test(*scores(rng, 3, sizes, seed_sd), draws=999, seed=i) for i in range(TRIALS)]
        rejected[seed_sd] = np.mean(np.array(p) <= 0.05)
    assert within(rejected[0.0], 0.05)
    assert rejected[3.0] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "articles", "seed_sd"), [(3, 48, 0.5), (5, 48, 1.5), (6, 30, 3.0)])
def test_an_effect_is_found_as_often_as_was_predicted(seeds, articles, seed_sd):
    sizes, rng = article_sizes(articles), np.random.default_rng([seeds, articles])
    components = {"seed": seed_sd**2, "article": ARTICLE**2, "question": QUESTION**2, "residual": RESIDUAL**2}
    error, df = expected_standard_error(components, seeds, sizes)
    effect = minimal_detectable_effect(error, 0.8, df=df)
    found = [crossed_test(*scores(rng, seeds, sizes, seed_sd, effect)) < 0.05 for _ in range(3 * TRIALS)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.02)


@pytest.mark.slow
def test_a_pilot_predicts_the_power_of_an_experiment_in_exact_match():
    rng, sizes = np.random.default_rng(0), article_sizes(48)
    pilot, names = exact_matches(rng, 60, article_sizes(400), 0.05, 0.2)
    error, df = expected_standard_error(variance_components(pilot, names), 5, sizes)
    drawn = [exact_matches(rng, 5, sizes, 0.05, 0.2) for _ in range(TRIALS)]
    effect = np.mean([values.mean() for values, _ in drawn])
    found = np.mean([crossed_test(values, names) < 0.05 for values, names in drawn])
    assert 0.5 < found < 0.95
    assert found == pytest.approx(power(effect, error, df=df), abs=0.03)
