"""Bytes where they matter: what each layer and head gets, as a spec. Allocation is arithmetic on specs and knows nothing of what runs."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Bool, Float, Int

from kvcascade.cache.cascade import Cascade
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec, Part

type Template = Callable[[int], Cascade]
"""A cascade for a number of slots."""


def by_heads(cascades: Sequence[Sequence[Cascade]], calibration: str = "") -> CacheSpec:
    """The spec that gives each KV head of each layer its cascade; neighbouring layers that are alike are one part."""
    parts, start = [], 0
    for row, some in itertools.groupby(cascades, tuple):
        stop = start + len([*some])
        for cascade in dict.fromkeys(row):
            chosen = tuple(head for head, each in enumerate(row) if each == cascade)
            parts.append(Part(start, stop, cascade, None if len(chosen) == len(row) else chosen))
        start = stop
    return CacheSpec(tuple(parts), calibration)


def pyramid(template: Template, slots: int, layers: int, window: int = 8, beta: float = 20.0) -> CacheSpec:
    """Fewer slots from layer to layer, `slots` on the mean (PyramidKV, Cai et al. 2024, arXiv 2406.02069, eq. 9-11: the last layer has
    1/beta of them behind the window, the first what that leaves). BadInput for fewer slots than the window has."""
    if slots <= window:
        raise BadInput(f"a pyramid of {slots} slots a layer has none behind a window of {window}")
    least = (slots - window) / beta
    most = 2 * (slots - window) - least
    counts = [window + round(most - (most - least) * layer / max(1, layers - 1)) for layer in range(layers)]
    return by_heads([[template(count)] for count in counts])


def duo(gates_LK: Float[np.ndarray, "L K"], share: float, retrieval: Cascade, streaming: Cascade) -> CacheSpec:
    """The heads with the largest gates keep what `retrieval` says, the others what `streaming` does (DuoAttention, Xiao et al. 2024, arXiv
    2410.10819): so large a share of all heads."""
    count = round(share * gates_LK.size)
    order = np.argsort(-gates_LK, axis=None, kind="stable")
    keeps = np.zeros(gates_LK.size, bool)
    keeps[order[:count]] = True
    return by_heads([[retrieval if each else streaming for each in row] for row in keeps.reshape(gates_LK.shape)])


def shared(template: Template, shares_LK: Float[np.ndarray, "L K"], slots: int, floor: float = 0.2) -> CacheSpec:
    """Of a layer's slots, `slots` a head, each head has a floor for itself, and of the others as large a share as it has of what its layer
    attends to most (Ada-KV, Feng et al. 2024, arXiv 2407.11550, algorithm 1 with its safeguard; the shares are of a calibration, since the
    size of an array cannot depend on what is in it)."""
    parts_LK = shares_LK / shares_LK.sum(1, keepdims=True)
    counts_LK = floor * slots + (1 - floor) * slots * shares_LK.shape[1] * parts_LK
    return by_heads([[template(max(1, round(float(count)))) for count in row] for row in counts_LK])


def by_curves(
    errors_LKO: Float[np.ndarray, "L K O"],
    sizes_LKO: Int[np.ndarray, "L K O"],
    budget: int,
    allowed_O: Bool[np.ndarray, " O"] | None = None,
    distinct: int = 3,
    seconds: float = 60.0,
) -> Int[np.ndarray, "L K"]:
    """Which of several options each head gets, so that the errors' sum is least and the sizes' at most the budget; a layer has at most so
    many distinct ones. Exact, by mixed-integer programming (HiGHS, Huangfu & Hall 2018), unless that takes longer than so many seconds.

    BadInput where nothing fits.
    """
    L, K, O = errors_LKO.shape
    index = np.arange(L * K * O).reshape(L, K, O)
    rows, limits = [], []

    def constrain(places, values, low: float, high: float) -> None:
        rows.append((np.asarray(places).ravel(), np.asarray(values, float).ravel()))
        limits.append((low, high))

    for layer, head in np.ndindex(L, K):
        constrain(index[layer, head], np.ones(O), 1.0, 1.0)
    constrain(index, sizes_LKO / budget, 0.0, 1.0)
    variables = L * K * O
    if distinct < min(K, O):
        # Whether a layer has an option at all.
        has = variables + np.arange(L * O).reshape(L, O)
        variables += L * O
        for layer, option in np.ndindex(L, O):
            places = [*index[layer, :, option], has[layer, option]]
            constrain(places, [1.0] * K + [-float(K)], -np.inf, 0.0)
        for layer in range(L):
            constrain(has[layer], np.ones(O), 0.0, float(distinct))
    at = np.repeat(np.arange(len(rows)), [len(places) for places, _ in rows])
    places, values = (np.concatenate(each) for each in zip(*rows, strict=True))
    matrix = scipy.sparse.csr_array((values, (at, places)), shape=(len(rows), variables))
    highest = np.ones(variables)
    if allowed_O is not None:
        highest[index[..., ~allowed_O]] = 0
    cost = np.zeros(variables)
    cost[: errors_LKO.size] = errors_LKO.ravel() / max(float(errors_LKO.mean()), 1e-30)
    found = scipy.optimize.milp(
        cost,
        integrality=np.ones(variables),
        bounds=scipy.optimize.Bounds(np.zeros(variables), highest),  # pyright: ignore
        constraints=scipy.optimize.LinearConstraint(matrix, *np.array(limits).T),
        options={"time_limit": seconds, "mip_rel_gap": 1e-4},
    )
    if found.x is None:
        least = (
            np.where(np.ones(O, bool) if allowed_O is None else allowed_O, sizes_LKO, np.iinfo(np.int64).max)
            .min(-1)
            .sum()
        )
        raise BadInput(f"nothing fits into {budget:,} bytes; the smallest of the options takes {least:,}")
    return found.x[: errors_LKO.size].reshape(L, K, O).argmax(-1)
