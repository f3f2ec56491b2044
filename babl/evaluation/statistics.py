"""How sure a score is, when questions come in articles."""

from collections.abc import Sequence

import numpy as np


def cluster_bootstrap(
    values: np.ndarray, clusters: Sequence[str], *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile interval of the mean when whole clusters are drawn with replacement.

    Questions about one article are alike, so a sample's size is its number of articles.

    Args:
        values: (N,) float.
        clusters: N names.
        samples: Redraws.
        level: Share of the redraws inside the interval.
        seed: Of the redraws.

    Ref: Field and Welsh 2007, cluster bootstrap.
    """
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(member, values), np.bincount(member)  # (C,)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(samples, len(sums)))  # (samples, C)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
