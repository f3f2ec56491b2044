"""What scores are worth when a model may keep silent: calibration, risk against coverage, and fitted thresholds.

A question is answered where the confidence in its answer reaches a threshold, so no threshold parts questions of equal
confidence: they enter together, and no figure here depends on the order of the questions. A threshold that is
reported is fitted on other articles than it is applied to; what is fitted on the very questions it is applied to is
called `oracle_*`.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from babl.errors import UserError

BINS = 15
PRECISION = 0.9  # of the answers given, where coverage is compared
CURVE_POINTS = 101  # of a curve in a report


def risk_coverage(correct: np.ndarray, confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the share of questions answered, and the share of wrong ones among them, at each threshold.

    Args:
        correct: (N,) 0 or 1.
        confidence: (N,), higher where surer, of any scale.

    Returns:
        Coverage, rising to 1, and risk, each (G,) for the G values that confidence takes.

    Ref: El-Yaniv and Wiener 2010, risk-coverage curves.
    """
    _, answered, right = _steps(correct, confidence)
    return answered / len(correct), 1 - right / answered


def area_under_risk(correct: np.ndarray, confidence: np.ndarray) -> float:
    """Returns the mean risk (AURC) over 1, 2, ..., N questions answered, the surest first.

    Among questions of equal confidence, it is what a random order gives on average.

    Ref: Geifman, Uziel and El-Yaniv 2019, AURC.
    """
    shared = _shared(correct, confidence)[np.argsort(-confidence, kind="stable")]
    return float(np.mean(1 - shared.cumsum() / np.arange(1, len(shared) + 1)))


def precision_threshold(correct: np.ndarray, confidence: np.ndarray, precision: float = PRECISION) -> float:
    """Returns the confidence from which on most questions are answered with that precision; infinity for none."""
    levels, answered, right = _steps(correct, confidence)
    enough = np.flatnonzero(right / answered >= precision)
    return float(levels[enough[-1]]) if len(enough) else float("inf")


def coverage_at_precision(correct: np.ndarray, confidence: np.ndarray, precision: float = PRECISION) -> float:
    """Returns the largest share of questions that one threshold answers with that precision."""
    return float(np.mean(confidence >= precision_threshold(correct, confidence, precision)))


def tie_safe_best(scores: np.ndarray, na_prob: np.ndarray, has_answer: np.ndarray) -> tuple[float, float]:
    """Returns the best mean score that the rule "abstain where na_prob > threshold" can reach, and its threshold.

    The official best_* walk through questions of equal probability one by one, and then report what no threshold
    reaches. Of several best thresholds the lowest is returned; where abstaining always is best, it lies just below all
    probabilities.

    Args:
        scores: (N,) of answering, in [0, 1].
        na_prob: (N,) probability that there is no answer.
        has_answer: (N,) bool; abstaining scores 1 where there is none, else 0.
    """
    abstaining = 1.0 - np.asarray(has_answer, float)
    levels, _, gained = _steps(scores - abstaining, -na_prob)
    thresholds = np.concatenate(([np.nextafter(na_prob.min(), -np.inf)], -levels))
    threshold = thresholds[np.concatenate(([0.0], gained)).argmax()]
    return float(np.where(na_prob > threshold, abstaining, scores).mean()), float(threshold)


def calibration(correct: np.ndarray, probability: np.ndarray, bins: int = BINS) -> dict[str, float | None]:
    """Returns how far probabilities are those of being right: ece, brier and auroc.

    The expected calibration error is over bins of equal mass. AUROC is None where all answers are right, or none is.

    Args:
        correct: (N,) 0 or 1.
        probability: (N,) in [0, 1].
        bins: Of the calibration error.

    Ref: Guo et al. 2017, calibration; Nguyen and O'Connor 2015, bins of equal mass.
    """
    from sklearn.metrics import roc_auc_score  # a second's import, which thresholds alone do without

    _, said, was, share = _reliability(correct, probability, bins)
    return {
        "ece": float(np.sum(share * np.abs(said - was))),
        "brier": float(np.mean((probability - correct) ** 2)),
        "auroc": float(roc_auc_score(correct, probability)) if 0 < np.sum(correct) < len(correct) else None,
    }


def article_halves(titles: Sequence[str], seed: int = 0) -> np.ndarray:
    """Returns, (N,) bool, which questions are in the second of two halves that share no article.

    Articles come in the order of a hash of their title, each to the half that has fewer questions so far.
    """
    names, member, counts = np.unique(np.asarray(titles), return_inverse=True, return_counts=True)
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(f"{seed}/{names[i]}".encode()).digest())
    second = np.zeros(len(names), bool)
    sizes = [0, 0]
    for i in order:
        second[i] = sizes[1] < sizes[0]
        sizes[int(second[i])] += int(counts[i])
    return second[member]


def cross_fitted(
    fit: Callable[[np.ndarray], float], confidence: np.ndarray, titles: Sequence[str], seed: int = 0
) -> np.ndarray:
    """Returns, (N,) bool, which questions are answered with each half's threshold fitted on the other half's articles.

    Args:
        fit: Gives the threshold fitted on the questions of a mask (N,).
        confidence: (N,); a question is answered where it reaches the threshold.
        titles: Of the N questions' articles, two different ones at least.
        seed: Of the halves.

    Raises:
        UserError: All questions are about one article.
    """
    second = article_halves(titles, seed)
    if not second.any():
        raise UserError(f"a threshold is fitted on other articles than it is used on; all are of {titles[0]!r}")
    return confidence >= np.where(second, fit(~second), fit(second))


def selective_report(
    exact: np.ndarray,
    confidence: np.ndarray,
    titles: Sequence[str],
    has_answer: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns what the confidence in a set of predictions is worth, as JSON can hold it; every share is in [0, 1].

    `ece`, `brier`, `auroc`, `aurc`; `reliability`, the bins of the first, and `curve`, risk over coverage, thinned;
    `coverage` and `precision`, reached with thresholds meant for `PRECISION`, each fitted on the other half's articles,
    beside `oracle_coverage`. Where questions without an answer are among them, and confidences differ, also
    `thresholded_exact`, with abstention fitted in the same way, beside `oracle_best_exact` and its
    `oracle_best_exact_thresh`, below which the model abstains. None stands for what is undefined, such as anything
    fitted on other articles where there is only one.

    Args:
        exact: (N,) 0 or 1.
        confidence: (N,) in [0, 1]: the probability of the answer, or one minus that of there being no answer.
        titles: Of the N questions' articles.
        has_answer: (N,) bool; None where all have one.
        seed: Of the halves.

    Raises:
        UserError: A confidence is no probability.
    """
    exact, confidence = np.asarray(exact, float), np.asarray(confidence, float)
    wrong = confidence[~((confidence >= 0) & (confidence <= 1))]
    if len(wrong):
        raise UserError(f"a confidence is {wrong[0]:g}, expected a probability in [0, 1] (exp of a log-probability)")
    has_answer = np.ones(len(exact), bool) if has_answer is None else np.asarray(has_answer, bool)
    several = len(set(titles)) > 1
    low, said, was, share = _reliability(exact, confidence, BINS)
    coverage, risk = risk_coverage(exact, confidence)
    kept = np.unique(np.linspace(0, len(coverage) - 1, CURVE_POINTS).round().astype(int))
    report: dict[str, Any] = calibration(exact, confidence) | {
        "aurc": area_under_risk(exact, confidence),
        "reliability": {"low": low.tolist(), "said": said.tolist(), "was": was.tolist(), "share": share.tolist()},
        "curve": {"coverage": coverage[kept].tolist(), "risk": risk[kept].tolist()},
        "coverage": None,
        "precision": None,
        "oracle_coverage": coverage_at_precision(exact, confidence),
    }
    if several:
        answered = cross_fitted(lambda m: precision_threshold(exact[m], confidence[m]), confidence, titles, seed)
        report["coverage"] = float(answered.mean())
        report["precision"] = float(exact[answered].mean()) if answered.any() else None
    if has_answer.all() or confidence.min() == confidence.max():
        return report

    def best(mask: np.ndarray) -> tuple[float, float]:
        score, threshold = tie_safe_best(exact[mask], -confidence[mask], has_answer[mask])
        return score, -threshold

    report["oracle_best_exact"], report["oracle_best_exact_thresh"] = best(np.ones(len(exact), bool))
    report["thresholded_exact"] = None
    if several:
        answered = cross_fitted(lambda mask: best(mask)[1], confidence, titles, seed)
        report["thresholded_exact"] = float(np.where(answered, exact, ~has_answer).mean())
    return report


def _steps(values: np.ndarray, confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the levels of confidence, falling, how many questions reach each, and their summed values, all (G,)."""
    levels, member, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    return -levels, counts.cumsum(), np.bincount(member, values).cumsum()


def _shared(values: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Returns, (N,), the mean value of all questions of a question's own confidence."""
    _, member, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    return (np.bincount(member, values) / counts)[member]


def _reliability(
    correct: np.ndarray, probability: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns lower edge, mean probability, share of right answers and share of questions of bins of equal mass."""
    order = np.argsort(probability, kind="stable")
    shared = _shared(correct, probability)[order]  # so that it does not matter which of equals fall into which bin
    parts = [part for part in np.array_split(np.arange(len(order)), bins) if len(part)]
    sorted_probability = probability[order]
    return (
        np.array([sorted_probability[part[0]] for part in parts]),
        np.array([sorted_probability[part].mean() for part in parts]),
        np.array([shared[part].mean() for part in parts]),
        np.array([len(part) / len(order) for part in parts]),
    )
