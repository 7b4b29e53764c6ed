"""How sure a figure is: intervals of means over windows of documents, and of shares."""

import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

DRAWS = 2000


def interval(
    values: Sequence[float] | np.ndarray, clusters: Sequence[int] | np.ndarray | None = None
) -> tuple[float, float]:
    """95 % interval of the mean of values, which may come in clusters that resemble one another, as windows of one document do.

    On each side the wider of Student's t, which is short where values are skewed, and of the studentised bootstrap over clusters (Efron and
    Tibshirani 1993, §12.5), which is short where tails are heavy on both sides, by the standard error of a ratio, sum over count. Together
    they cover from 93 to 97 % from 30 clusters on (`tests/test_stats.py`). From one cluster nothing can be said: NaN.
    """
    values = np.asarray(values, np.float64)
    _, index = np.unique(np.arange(len(values)) if clusters is None else np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    k, mean = len(sums), sums.sum() / counts.sum()
    if k < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    error = _error(sums, counts, mean)
    if error <= 1e-12 * max(np.abs(values).max(), 1e-300):  # all alike
        return float(mean), float(mean)
    picks = np.random.default_rng(0).integers(0, k, (DRAWS, k))
    drawn_sums, drawn_counts = sums[picks], counts[picks]
    means = drawn_sums.sum(1) / drawn_counts.sum(1)
    errors = _error(drawn_sums, drawn_counts, means[:, None])
    # A draw of one cluster k times has no spread of its own, and tells nothing.
    some = errors > 1e-9 * error
    low, high = np.quantile((means[some] - mean) / errors[some], [0.025, 0.975], method="inverted_cdf")
    t = scipy.stats.t.ppf(0.975, k - 1)
    return float(mean - max(high, t) * error), float(mean - min(low, -t) * error)


def _error(sums, counts, mean):
    """The standard error of a mean over clusters, along the last axis (Cochran 1977, eq. 6.13)."""
    k = sums.shape[-1]
    return np.sqrt(k / (k - 1) * np.square(sums - mean * counts).sum(-1)) / counts.sum(-1)


def wilson(hits: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): unlike the normal one it is right for few samples and shares near 0 and 1."""
    z = 1.959964
    centre, spread = hits + z * z / 2, z * math.sqrt(hits * (of - hits) / of + z * z / 4)
    return max(0.0, (centre - spread) / (of + z * z)), min(1.0, (centre + spread) / (of + z * z))
