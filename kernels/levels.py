"""The levels that codes stand for which are not spread evenly."""

import functools
import itertools
import math

import ml_dtypes
import numpy as np


@functools.lru_cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels of least mean square error for a standard normal number: each the mean of what is nearer to it than to the others; in
    bf16, so that a kernel has them exactly."""
    density = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    below = lambda x: (1 + math.erf(x / math.sqrt(2))) / 2
    levels = np.linspace(-2, 2, 2**bits)
    for _ in range(2000):
        edges = [-math.inf, *(levels[1:] + levels[:-1]) / 2, math.inf]
        mean = lambda low, high: (density(low) - density(high)) / (below(high) - below(low))
        levels = np.array([mean(*each) for each in itertools.pairwise(edges)])
    return tuple(((levels - levels[::-1]) / 2).astype(ml_dtypes.bfloat16).astype(float).tolist())
