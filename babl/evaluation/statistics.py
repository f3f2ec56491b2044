"""How sure a score is, when questions come in articles and models from seeds.

`estimate` is what reports print: a mean over questions (micro) in the unit of the scores, with a standard error over
- new seeds and new articles, "this procedure", where there are 3 seeds and 15 articles or more;
- new articles alone, "these trained models", else. Nothing is said of other seeds then.
Where the data cannot tell how far off the mean is, there is no interval and no p, but a reason.
Beside it stand tests of other nulls: `randomisation_test` (labels exchanged by article), `seed_sign_test` (by seed) and
`mcnemar` (by question; naive, since an article's questions are alike).
A contrast passes the differences (S, N) of two arms that share seeds and questions; the null is a mean of 0.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy

FEWEST_ARTICLES, LARGEST_SHARE = 5, 1 / 3  # beyond these, intervals over articles miss the 95 % they name
FEWEST_SEEDS, FEWEST_ARTICLES_WITH_SEEDS = 3, 15  # likewise, intervals over seeds and articles
FEWEST_ANSWERS = 5  # right, and wrong; below, the interval of a score covers as little as 80 %
_BLOCK = 1 << 22  # most numbers drawn at once: 32 MiB
_AGREE = 1e-9  # a standard error below this share of the greatest score is rounding

Scope = Literal["articles", "seeds and articles"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean, and how far it may be off.

    Attributes:
        mean: In the unit of the scores.
        error: Standard error; None where it cannot be told.
        df: Degrees of freedom of the error.
        scope: What is drawn anew: with "articles", the statement is about these trained models alone.
        unknown: Why there is no error; empty where there is one.
    """

    mean: float
    error: float | None
    df: float
    scope: Scope
    unknown: str

    def interval(self, level: float = 0.95) -> Interval | None:
        """Returns Student's interval, for differences; it excludes 0 exactly where `p` is below 1 - level."""
        if self.error is None:
            return None
        reach = float(scipy.stats.t.isf((1 - level) / 2, self.df)) * self.error
        return self.mean - reach, self.mean + reach

    def score_interval(self, level: float = 0.95) -> Interval | None:
        """Returns Wilson's interval with Student's quantile, for an estimate of `estimate_score`.

        Student's own interval misses means near 0 and 100, where few answers are right or few are wrong: with 10
        articles of 20 questions and 2 % right it covers 92 %, this one 97 %, and it stays between 0 and 100. The
        effective number of questions is that which would have this standard error if all were independent.

        Ref: Wilson 1927; Dean and Pagano 2015 (proportions in clustered surveys).
        """
        if self.error is None:
            return None
        share, t = self.mean / 100, float(scipy.stats.t.isf((1 - level) / 2, self.df))
        spread = share * (1 - share)
        widening = (t * self.error / 100) ** 2 / spread  # t^2 / effective number of questions
        centre = (share + widening / 2) / (1 + widening)
        reach = math.sqrt(widening * spread + widening**2 / 4) / (1 + widening)
        return 100 * (centre - reach), 100 * (centre + reach)

    @property
    def p(self) -> float | None:
        """The two-sided p of a mean of 0; None where it cannot be told."""
        return None if self.error is None else float(2 * scipy.stats.t.sf(abs(self.mean) / self.error, self.df))

    def p_equivalent(self, margin: float) -> float | None:
        """Returns `equivalence_test` of the mean; None where it cannot be told."""
        return None if self.error is None else equivalence_test(self.mean, self.error, margin, self.df)

    @property
    def detectable(self) -> float | None:
        """The true mean that such data find with power .8 at level .05; None where it cannot be told."""
        return None if self.error is None else minimal_detectable_effect(self.error, df=self.df)


def estimate(values: np.ndarray, clusters: Sequence[str], scope: Scope | None = None) -> Estimate:
    """Returns the mean and its `crossed_standard_error`, or why there is none.

    By simulation (tests/evaluation/test_calibration.py) intervals cover 93 to 97 %: of one model, of a difference and
    of the mean of several seeds, from 5 articles up and however unequal they are as long as none holds more than a
    third of the questions; over seeds, from 3 seeds and 15 articles up. They are wider than they need be (98 to 99 %)
    where arms differ by nothing but each question's noise.

    Args:
        values: (S, N) float, a row per seed.
        clusters: N names.
        scope: What is drawn anew; None for the widest that these data bear, see `widest_scope`.
    """
    _, sizes = np.unique(np.asarray(clusters), return_counts=True)
    scope = scope or widest_scope(len(values), len(sizes))
    unknown = too_few(sizes)
    error, df = crossed_standard_error(values if scope != "articles" else values.mean(0, keepdims=True), clusters)
    if not unknown and error <= _AGREE * np.abs(values).max():
        unknown = "all articles agree exactly, so nothing shows how far others would differ"
    return Estimate(float(values.mean()), None if unknown else error, df, scope, unknown)


def estimate_score(values: np.ndarray, clusters: Sequence[str]) -> Estimate:
    """Returns `estimate` of scores from 0 to 100, without an error where too few answers are right, or wrong.

    With fewer than `FEWEST_ANSWERS` of either, a model's rate of rare answers is anybody's guess: of 30 articles with
    one question each and 3 % right, 90 % of the intervals would hold the truth, of 48 and 1 % right, 79 %. A question
    counts as right that some seed answers so, in F1 with the best credit, and likewise as wrong.

    Args:
        values: (S, N) percent, a row per seed.
        clusters: N names.
    """
    found = estimate(values, clusters)
    right, wrong = float(values.max(0).sum() / 100), float((100 - values.min(0)).sum() / 100)
    if found.unknown or min(right, wrong) > FEWEST_ANSWERS - 1e-9:
        return found
    few = f"{right:.3g} right" if right < wrong else f"{wrong:.3g} wrong"
    unknown = f"{few} of {values.shape[1]} answers, and an interval needs {FEWEST_ANSWERS}"
    return replace(found, error=None, unknown=unknown)


def widest_scope(seeds: int, articles: int) -> Scope:
    """Returns what conclusions from so many seeds and articles can be about."""
    return "seeds and articles" if seeds >= FEWEST_SEEDS and articles >= FEWEST_ARTICLES_WITH_SEEDS else "articles"


def too_few(article_sizes: Sequence[int] | np.ndarray) -> str:
    """Returns why articles of these numbers of questions bear no interval; empty where they do."""
    articles, largest = len(article_sizes), max(article_sizes) / sum(article_sizes)
    if articles < FEWEST_ARTICLES:
        return f"{articles} article{'s' if articles > 1 else ''}, and an interval needs {FEWEST_ARTICLES}"
    if largest > LARGEST_SHARE + 1e-9:
        return f"one article holds {largest:.0%} of the questions, and an interval needs all to hold at most a third"
    return ""


def crossed_standard_error(values: np.ndarray, clusters: Sequence[str]) -> tuple[float, float]:
    """Returns the standard error of the mean over seeds and articles, and its degrees of freedom.

    The variance is that between seeds, plus that between articles, less what both count: the part peculiar to a seed in
    an article, which is also its lower bound. Articles are left out one at a time, so their sizes may differ.

    Degrees of freedom interpolate between S - 1 and the effective number of articles less one, 1 / sum(share^2) - 1, as
    Satterthwaite's do, but with the components' shares to the power 1.5 in place of 2, which is what keeps 5 % at
    5 % for few seeds: with 2, and 3 seeds that make most of the variance, a test at .05 rejects 7 %.

    With one seed only articles count; with one article the error is infinite. Two seeds are too few (an interval
    covers 89 % where they make most of the variance), and so are few articles; `estimate` knows when.

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


def redrawn_standard_error(
    values: np.ndarray, clusters: Sequence[str], *, samples: int = 10_000, seed: int = 0
) -> float:
    """Returns the standard error of the mean when whole clusters are drawn with replacement: a check of the other two.

    Of C clusters the redraws vary too little, by (C - 1) / C; that is made up for.

    Args:
        values: (N,) float.
        clusters: N names, at least two different ones.
        samples: Redraws.
        seed: Of the redraws.

    Ref: Field and Welsh 2007, cluster bootstrap.
    """
    sums, counts = _article_sums(values[None], clusters)
    rng, means = np.random.default_rng(seed), []
    for size in _block_sizes(samples, len(counts)):
        drawn = rng.integers(len(counts), size=(size, len(counts)))  # (size, C)
        means.append(sums[0, drawn].sum(1) / counts[drawn].sum(1))
    return float(np.concatenate(means).std() * math.sqrt(len(counts) / (len(counts) - 1)))


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
    """Returns what the error of `estimate` is going to be for so many seeds and such articles: error and degrees.

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
    counted = 1 if widest_scope(seeds, len(share)) == "articles" else seeds
    return _crossed_error(between_seeds, between_articles, both, counted, share)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the exact two-sided p of McNemar's test, naive: it takes questions of an article for independent.

    Args:
        a: (N,) right or wrong; of other scores, which is greater is all that counts (the sign test).
        b: (N,), of the same questions.
    """
    wins, losses = int((a > b).sum()), int((a < b).sum())
    return float(scipy.stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Returns the p values adjusted for being several, in the order given.

    Ref: Holm 1979.
    """
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        least = max(least, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p}


def equivalence_test(difference: float, standard_error: float, margin: float, df: float) -> float:
    """Returns the p of two one-sided t tests: small where the difference is shown to lie within +- margin.

    Args:
        difference: Estimate.
        standard_error: Of the estimate, above 0.
        margin: Above 0, named before the data were seen.
        df: Of the standard error, as `crossed_standard_error` returns it.

    Ref: Schuirmann 1987.
    """
    return float(scipy.stats.t.sf((margin - abs(difference)) / standard_error, df))


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
        standard_error: Of the difference, above 0.
        power: Probability of finding it, above the level.
        level: Of the test.
        df: Of the standard error; infinite where it is known.
    """
    most = 2 * (scipy.stats.t.isf(level / 2, df) + scipy.stats.t.isf(1 - power, df))  # finds all but a hair
    return standard_error * float(scipy.optimize.brentq(lambda shift: _power(shift, level, df) - power, 0, most))


def _power(shift: float, level: float, df: float) -> float:
    """Returns the power against an effect of so many standard errors: t squared is F, z squared is chi squared."""
    shift_squared = max(shift**2, 1e-12)  # scipy's noncentral F is wrong at 0 itself
    if math.isinf(df):
        return float(scipy.stats.ncx2.sf(scipy.stats.norm.isf(level / 2) ** 2, 1, shift_squared))
    return float(scipy.stats.ncf.sf(scipy.stats.t.isf(level / 2, df) ** 2, 1, df, shift_squared))


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


def _block_sizes(samples: int, width: int) -> Iterator[int]:
    """Yields numbers that sum to `samples`, each so small that as many rows of that width fit in memory."""
    most = max(1, _BLOCK // width)
    for start in range(0, samples, most):
        yield min(most, samples - start)


def _rounding(terms: np.ndarray) -> float:
    """Returns by how much sums of these terms may differ through rounding alone."""
    return 1e-12 * float(np.abs(terms).sum())


def _ratio(value: float, degrees: float) -> float:
    """Returns a mean square, 0 where there is nothing to estimate it from."""
    return value / degrees if degrees > 0 else 0.0
