"""How sure a score is, when questions come in articles and models from seeds.

Three estimands, each a mean over questions (micro), in the unit of the scores that are passed:
- this procedure, on new seeds and new articles: `crossed_interval`, `crossed_test`, `crossed_bootstrap`. Primary.
- these trained models, on new articles: `cluster_bootstrap`, `cluster_standard_error`, `randomisation_test`.
- these trained models, on questions each independent of the others: `mcnemar`. Naive, since an article's are alike.
A contrast passes the differences (S, N) of two arms that share seeds and questions; the null is a mean of 0.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import optimize, stats

_BLOCK = 1 << 22  # most numbers drawn at once: 32 MiB


def cluster_bootstrap(
    values: np.ndarray, clusters: Sequence[str], *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile interval of the mean when whole clusters are drawn with replacement.

    Questions about one article are alike, so a sample's size is its number of articles. It stays between the least and
    the greatest score; with 30 to 48 articles it covers 93 to 94 %, where `crossed_interval` of one seed covers 95 %.

    Args:
        values: (N,) float.
        clusters: N names.
        samples: Redraws.
        level: Share of the redraws inside the interval.
        seed: Of the redraws.

    Ref: Field and Welsh 2007, cluster bootstrap.
    """
    sums, counts = _article_sums(values[None], clusters)
    means = _redrawn_means(sums[0], counts, samples, np.random.default_rng(seed))
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def crossed_bootstrap(
    values: np.ndarray, clusters: Sequence[str], *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Returns the interval of the mean when seeds and articles are redrawn independently of each other.

    The redraws give the shape. As they stand, 3 to 6 redrawn seeds vary too little, by (S - 1) / S, have no tails, and
    what is peculiar to a seed in an article is counted with the seeds and again with the articles. So the seeds'
    deviations are widened by sqrt(S / (S - 1)), and all deviations scaled to the standard error and the Student
    quantile of `crossed_interval`, whose coverage this shares; it differs where scores are skewed.

    Args:
        values: (S, N) float, a row per seed.
        clusters: N names.
        samples: Redraws.
        level: Coverage.
        seed: Of the redraws.

    Ref: Owen 2007, the pigeonhole bootstrap.
    """
    sums, counts = _article_sums(values, clusters)
    rng = np.random.default_rng(seed)
    seeds, mean = sums.sum(1) / counts.sum(), sums.mean(0).sum() / counts.sum()  # (S,), ()
    deviations = _redrawn_means(sums.mean(0), counts, samples, rng) - mean  # (samples,)
    if len(seeds) > 1:
        widened = (seeds - mean) * math.sqrt(len(seeds) / (len(seeds) - 1))
        deviations += widened[rng.integers(len(seeds), size=(samples, len(seeds)))].mean(1)
    error, df = crossed_standard_error(values, clusters)
    tail = (1 - level) / 2
    if not 0 < error < math.inf or deviations.std() < 1e-9 * error:  # the redraws have no shape
        return crossed_interval(values, clusters, level=level)
    scale = error * stats.t.isf(tail, df) / (deviations.std() * stats.norm.isf(tail))
    low, high = mean + scale * np.quantile(deviations, [tail, 1 - tail])
    return float(low), float(high)


def crossed_standard_error(values: np.ndarray, clusters: Sequence[str]) -> tuple[float, float]:
    """Returns the standard error of the mean over seeds and articles, and its degrees of freedom.

    The variance is that between seeds, plus that between articles, less what both count: the part peculiar to a seed in
    an article, which is also its lower bound. Articles are left out one at a time, so their sizes may differ.

    Degrees of freedom interpolate between S - 1 and the effective number of articles less one, 1 / sum(share^2) - 1, as
    Satterthwaite's do, but with the components' shares to the power 1.5 in place of 2, which is what keeps 5 % at
    5 % for few seeds: with 2, and 3 seeds that make most of the variance, a test at .05 rejects 7 %.

    With one seed only articles count; with one article the error is infinite.

    Args:
        values: (S, N) float.
        clusters: N names.

    Ref: Cameron, Gelbach and Miller 2011 (two-way clustering); Satterthwaite 1946.
    """
    sums, counts = _article_sums(values - values[0, 0], clusters)  # so that equal scores are 0 and not rounded
    n_seeds, n_articles = sums.shape
    if n_articles == 1:
        return math.inf, 1.0
    share = counts / counts.sum()  # (C,)
    cells = sums / counts  # (S, C)
    seeds, articles = cells @ share, cells.mean(0)  # (S,), (C,)
    mean = seeds.mean()
    left_out = share / (1 - share) * math.sqrt((n_articles - 1) / n_articles)  # (C,) weights of the jackknife
    between_articles = ((left_out * (articles - mean)) ** 2).sum()
    between_seeds = both = 0.0
    if n_seeds > 1:
        between_seeds = seeds.var(ddof=1) / n_seeds
        peculiar = cells - seeds[:, None] - articles + mean  # (S, C)
        both = ((left_out * peculiar) ** 2).sum() / (n_seeds * (n_seeds - 1))
    return _crossed_error(between_seeds, between_articles, both, n_seeds, share)


def crossed_interval(values: np.ndarray, clusters: Sequence[str], *, level: float = 0.95) -> tuple[float, float]:
    """Returns the primary interval: the mean of this procedure, over new seeds and new articles.

    Student's interval of `crossed_standard_error`; it excludes 0 exactly where `crossed_test` is below 1 - level.

    By simulation, with 3 to 6 seeds and 30 to 48 articles of unequal size, it covers 94 to 96 %, whether or not seeds
    matter. It is off in two corners: 93.5 % with 3 seeds that make nearly all of the variance, and up to 98 % where
    arms differ by nothing but each question's noise. Two seeds are too few (89 % where they make most of the variance).
    With one seed it is an interval for that trained model.

    Args:
        values: (S, N) float, a row per seed.
        clusters: N names.
        level: Coverage.
    """
    error, df = crossed_standard_error(values, clusters)
    mean, reach = float(values.mean()), float(stats.t.isf((1 - level) / 2, df)) * error
    return mean - reach, mean + reach


def crossed_test(differences: np.ndarray, clusters: Sequence[str]) -> float:
    """Returns the primary p: would this procedure differ by 0 on average, over new seeds and new articles?

    Two-sided. Its null holds both kinds of chance, a seed's effect on every article at once and an article's effect on
    every seed; `randomisation_test` knows the second alone, and rejects too often where seeds differ.

    Args:
        differences: (S, N) float, a row per seed of paired arms.
        clusters: N names.
    """
    error, df = crossed_standard_error(differences, clusters)
    return _two_sided(float(differences.mean()), error, df)


def randomisation_test(
    differences: np.ndarray, clusters: Sequence[str], *, draws: int = 100_000, seed: int = 0
) -> float:
    """Returns the p of these trained models: are the arms' labels exchangeable within each article?

    Two-sided; the sign of an article's differences is flipped for all its questions and all seeds together, and the
    observed labels count as one of the draws, so p is at least 1 / (draws + 1).

    Args:
        differences: (S, N) float.
        clusters: N names.
        draws: Of all signs.
        seed: Of the draws.

    Ref: Noreen 1989, approximate randomisation; Phipson and Smyth 2010 (add one).
    """
    sums = _article_sums(differences, clusters)[0].sum(0)  # (C,)
    rng = np.random.default_rng(seed)
    reached, observed = 1, abs(sums.sum()) - _rounding(sums)
    for size in _block_sizes(draws, len(sums)):
        bits = np.unpackbits(np.frombuffer(rng.bytes(size * -(-len(sums) // 8)), np.uint8).reshape(size, -1), axis=1)
        flipped = 2.0 * (bits[:, : len(sums)] @ sums) - sums.sum()  # (size,)
        reached += int((np.abs(flipped) >= observed).sum())
    return reached / (draws + 1)


def seed_sign_test(differences: np.ndarray) -> float:
    """Returns the p of the seeds alone, on these questions: are the arms' labels exchangeable within each seed?

    Two-sided and exact over all 2^S signs; it cannot be below 2 / 2^S, which is .25 for 3 seeds and .03 for 6.

    Args:
        differences: (S, N) float.
    """
    means = differences.mean(1)  # (S,)
    signs = 1 - 2 * ((np.arange(2 ** len(means))[:, None] >> np.arange(len(means))) & 1)  # (2^S, S)
    return float((np.abs(signs @ means) >= abs(means.sum()) - _rounding(means)).mean())


def cluster_standard_error(values: np.ndarray, clusters: Sequence[str]) -> float:
    """Returns the cluster-robust standard error of the mean; infinite for one cluster.

    That of an ordinary regression on a constant with clustered errors, G / (G - 1) correction included.

    Args:
        values: (N,) float.
        clusters: N names.

    Ref: Liang and Zeger 1986; Miller 2024, "Adding error bars to evals".
    """
    sums, counts = _article_sums((values - values.mean())[None], clusters)
    if len(counts) == 1:
        return math.inf
    return float(np.sqrt(len(counts) / (len(counts) - 1) * (sums**2).sum()) / len(values))


def variance_components(values: np.ndarray, clusters: Sequence[str]) -> dict[str, float]:
    """Returns the variances of a single score: of seed, article, question in its article, and the residual.

    By the method of moments, seeds crossed with questions and questions nested in articles; an estimate below 0 is 0.
    The residual holds whatever a seed does to some questions and not to others. With one seed it cannot be told from
    the question's part and is 0, as the seed's is.

    Args:
        values: (S, N) float.
        clusters: N names.

    Ref: Searle, Casella and McCulloch 1992, "Variance components".
    """
    n_seeds, n_questions = values.shape
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.bincount(member)  # (C,)
    seeds, questions, mean = values.mean(1), values.mean(0), values.mean()
    articles = np.bincount(member, questions) / counts
    residual = values - seeds[:, None] - questions + mean  # (S, N)
    # Mean squares; what each is expected to be follows in the comments (s: seed, a: article, q: question, e: residual).
    ms_residual = _ratio((residual**2).sum(), (n_seeds - 1) * (n_questions - 1))  # e
    ms_seed = _ratio(n_questions * ((seeds - mean) ** 2).sum(), n_seeds - 1)  # e + N s
    ms_question = _ratio(n_seeds * ((questions - articles[member]) ** 2).sum(), n_questions - len(counts))  # e + S q
    ms_article = _ratio(n_seeds * (counts * (articles - mean) ** 2).sum(), len(counts) - 1)  # e + S q + S size a
    size = _ratio(n_questions - (counts**2).sum() / n_questions, len(counts) - 1)
    parts = {
        "seed": (ms_seed - ms_residual) / n_questions,
        "article": _ratio(ms_article - ms_question, n_seeds * size),
        "question": (ms_question - ms_residual) / n_seeds,
        "residual": ms_residual,
    }
    return {name: max(float(part), 0.0) for name, part in parts.items()}


def expected_standard_error(
    components: Mapping[str, float], seeds: int, article_sizes: Sequence[int]
) -> tuple[float, float]:
    """Returns what `crossed_standard_error` is going to be for so many seeds and such articles: error and degrees.

    Args:
        components: Of `variance_components`.
        seeds: S.
        article_sizes: Questions of each article.
    """
    questions = sum(article_sizes)
    share = np.asarray(article_sizes) / questions  # (C,)
    both = components["residual"] / (seeds * questions)
    between_seeds = components["seed"] / seeds + both
    between_articles = components["article"] * float((share**2).sum()) + components["question"] / questions + both
    return _crossed_error(between_seeds, between_articles, both, seeds, share)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the exact two-sided p of McNemar's test, naive: it takes questions of an article for independent.

    Args:
        a: (N,) right or wrong; of other scores, which is greater is all that counts (the sign test).
        b: (N,), of the same questions.
    """
    wins, losses = int((a > b).sum()), int((a < b).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Returns the p values adjusted for being several, in the order given.

    Ref: Holm 1979.
    """
    from statsmodels.stats.multitest import multipletests  # a second of imports that one table needs

    return dict(zip(p, map(float, multipletests(list(p.values()), method="holm")[1]), strict=True)) if p else {}


def equivalence_test(difference: float, standard_error: float, margin: float, df: float) -> float:
    """Returns the p of two one-sided t tests: small where the difference is shown to lie within +- margin.

    Args:
        difference: Estimate.
        standard_error: Of the estimate.
        margin: Above 0, named before the data were seen.
        df: Of the standard error, as `crossed_standard_error` returns it.

    Ref: Schuirmann 1987.
    """
    if standard_error == 0:
        return float(abs(difference) >= margin)
    return float(stats.t.sf((margin - abs(difference)) / standard_error, df))


def power(effect: float, standard_error: float, level: float = 0.05, df: float = math.inf) -> float:
    """Returns the probability that a two-sided test at this level finds a true effect of that size.

    Args:
        effect: True difference.
        standard_error: That the estimate is going to have, as `expected_standard_error` returns it.
        level: Of the test.
        df: Of the standard error; infinite where it is known.
    """
    return _power(effect / standard_error, level, df)


def minimal_detectable_effect(
    standard_error: float, power: float = 0.8, level: float = 0.05, df: float = math.inf
) -> float:
    """Returns the smallest true difference that a two-sided test at this level finds with this probability.

    Args:
        standard_error: Of the difference.
        power: Probability of finding it, above the level.
        level: Of the test.
        df: Of the standard error; infinite where it is known.
    """
    if standard_error == 0 or math.isinf(standard_error):
        return standard_error
    most = 2 * (stats.t.isf(level / 2, df) + stats.t.isf(1 - power, df))  # finds all but a hair
    return standard_error * float(optimize.brentq(lambda shift: _power(shift, level, df) - power, 0, most))


def _power(shift: float, level: float, df: float) -> float:
    """Returns the power against an effect of so many standard errors: t squared is F, z squared is chi squared."""
    shift_squared = max(shift**2, 1e-12)  # scipy's noncentral F is wrong at 0 itself
    if math.isinf(df):
        return float(stats.ncx2.sf(stats.norm.isf(level / 2) ** 2, 1, shift_squared))
    return float(stats.ncf.sf(stats.t.isf(level / 2, df) ** 2, 1, df, shift_squared))


def _crossed_error(
    between_seeds: float, between_articles: float, both: float, seeds: int, share: np.ndarray
) -> tuple[float, float]:
    """Returns standard error and degrees of freedom from the parts of a mean's variance; share: (C,) of questions."""
    df_articles = max(1 / float((share**2).sum()) - 1, 1.0)
    if seeds == 1:
        return math.sqrt(between_articles), df_articles
    variance, least = max(between_seeds + between_articles - both, both), min(seeds - 1.0, df_articles)
    if between_seeds + between_articles == 0:
        return math.sqrt(variance), least
    shares = between_seeds / variance, between_articles / variance
    df = 1 / (shares[0] ** 1.5 / (seeds - 1) + shares[1] ** 1.5 / df_articles)
    return math.sqrt(variance), max(df, least)


def _article_sums(values: np.ndarray, clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns each seed's sum over the questions of each article, (S, C), and the questions of each article, (C,)."""
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    return np.stack([np.bincount(member, row) for row in values]), np.bincount(member)


def _redrawn_means(sums: np.ndarray, counts: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the mean over questions, (samples,), when articles are drawn with replacement."""
    means = []
    for size in _block_sizes(samples, len(sums)):
        drawn = rng.integers(len(sums), size=(size, len(sums)))  # (size, C)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def _block_sizes(samples: int, width: int) -> Iterator[int]:
    """Yields numbers that sum to `samples`, each so small that as many rows of that width fit in memory."""
    most = max(1, _BLOCK // width)
    for start in range(0, samples, most):
        yield min(most, samples - start)


def _two_sided(estimate: float, error: float, df: float) -> float:
    if error == 0:
        return float(estimate == 0)
    return float(2 * stats.t.sf(abs(estimate) / error, df))


def _rounding(terms: np.ndarray) -> float:
    """Returns by how much sums of these terms may differ through rounding alone."""
    return 1e-12 * float(np.abs(terms).sum())


def _ratio(value: float, degrees: float) -> float:
    """Returns a mean square, 0 where there is nothing to estimate it from."""
    return value / degrees if degrees > 0 else 0.0
