"""A calibration: what a model makes of a text, in moments of each head's queries, keys and values."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvcascade.cache.calibration import Calibration, Moments
from kvcascade.cache.prompt import Prompt
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import attend, times
from kvcascade.kernels.prefill import observed_attention
from kvcascade.model import generate
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params

ROWS = 4
"""Windows that go through the model together."""
SKIP = 4
"""The first tokens of a window, which are unlike all others: a cache that knows them keeps them in full."""

NEAR = 64
"""Positions back that count as recent, and twice as many that a query must have before it to count."""
TOP = 0.25
"""Of a layer's tokens and heads, those that attention goes to most."""

type Sums = dict[str, Float[Array, "K ..."]]
"""Of a layer's tokens: of keys and values the sum and that of outer products, of queries the latter, of values also as often as attended to."""


def calibrate(
    config: ModelConfig,
    params: Params,
    rows_BT: Int[np.ndarray, "B T"],
    about: dict[str, Any],
    tell: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Put windows through a model, a few at a time; the first tokens of each do not count."""
    windows, T = rows_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (ROWS, T))
    sums: list[dict[str, np.ndarray]] = [{} for _ in config.layer_heads]
    for first in range(0, windows, ROWS):
        rows = rows_BT[first : first + ROWS]
        there_BT = np.arange(ROWS)[:, None] < np.full((1, T), len(rows))
        there_BT = jnp.asarray(there_BT & (np.arange(T) >= SKIP))
        prompt = Prompt(config.layer_heads, T)
        padded = np.concatenate([rows, np.zeros((ROWS - len(rows), T), rows.dtype)])
        _, prompt = generate.prefill_step(config, params, prompt, jnp.asarray(padded), positions_BT)
        for layer, ((q, k, v, _), heads) in enumerate(zip(prompt.parts, config.layer_heads, strict=True)):
            for name, found in _sums(q, k, v, there_BT, heads).items():
                # In float64: what is left of sums of squares without the mean is small.
                sums[layer][name] = sums[layer].get(name, 0) + np.asarray(found, np.float64)
        tell(min(first + ROWS, windows))
    pairs = [*map(_moments, sums)]
    gates, shares = ([(each[name] / each["rows"]).astype(np.float32) for each in sums] for name in ("gate", "share"))
    return Calibration(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), tuple(gates), tuple(shares), about)


@functools.partial(jax.jit, static_argnames="heads")
def _sums(q_BTNH, k_BTKH, v_BTKW, there_BT, heads: Heads) -> Sums:
    B, T, K, _ = k_BTKH.shape
    _, mass_BKT = observed_attention(q_BTNH, k_BTKH, v_BTKW, jnp.full(B, T), heads)
    q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BTKH, v_BTKW))
    q_BTKGH = q.reshape(B, T, K, -1, heads.width)
    weight_BTK = jnp.broadcast_to(there_BT[..., None].astype(jnp.float32), (B, T, K))
    outer = functools.partial(jnp.einsum, "BTK,BTKH,BTKJ->KHJ", precision="highest")
    asked = jnp.einsum("BT,BTKGH,BTKGJ->KHJ", weight_BTK[..., 0], q_BTKGH, q_BTKGH, precision="highest")
    total = lambda x: jnp.einsum("BTK,BTKH->KH", weight_BTK, x, precision="highest")
    return {
        "count": weight_BTK.sum((0, 1)),
        "q2": asked,
        "k": total(k),
        "k2": outer(weight_BTK, k, k),
        "v": total(v),
        "v2": outer(weight_BTK, v, v),
        "read": outer(weight_BTK * mass_BKT.swapaxes(1, 2), v, v),
        "rows": there_BT.any(-1).sum() * jnp.ones(K),
        "gate": _far(q, k, heads, there_BT),
        "share": _among_most(mass_BKT * there_BT[:, None], there_BT),
    }


def _far(q_BTNH, k_BTKH, heads: Heads, there_BT) -> Float[Array, " K"]:
    """Of each head, summed over rows: the share of attention, a query's mean, that goes neither to the first tokens nor to recent ones."""
    B, T = there_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    k = k_BTKH.swapaxes(1, 2)
    part, weights_BKGTS = attend(
        q_BTNH, k, k, positions_BT, jnp.broadcast_to(positions_BT[:, None], k.shape[:3]), heads
    )
    share_BKGTS = times(weights_BKGTS, 1 / jnp.maximum(part.sum_BTN, 1e-30))
    old_TS = (jnp.arange(T)[:, None] - jnp.arange(T) >= NEAR) & (jnp.arange(T) >= SKIP)
    far_BKT = (share_BKGTS * old_TS).sum(-1).mean(2)
    asks_BT = there_BT & (jnp.arange(T) >= 2 * NEAR)
    return (far_BKT * asks_BT[:, None]).sum((0, 2)) / jnp.maximum(asks_BT[0].sum(), 1)


def _among_most(mass_BKT, there_BT) -> Float[Array, " K"]:
    """Of each head, summed over rows: its share of the tokens that attention goes to most, of all heads of the layer together."""
    B, K, T = mass_BKT.shape
    least_B = jnp.sort(mass_BKT.reshape(B, -1))[:, -max(1, round(TOP * K * T))]
    most_BKT = (mass_BKT >= least_B[:, None, None]) & there_BT[:, None]
    return (most_BKT.sum(-1) / jnp.maximum(most_BKT.sum((1, 2)), 1)[:, None]).sum(0)


def _moments(sums: dict[str, np.ndarray]) -> tuple[Moments, Moments]:
    count = sums["count"][:, None]

    def moments(name: str, read: np.ndarray) -> Moments:
        mean_KH = sums[name] / count
        covariance_KHH = sums[f"{name}2"] / count[..., None] - mean_KH[:, :, None] * mean_KH[:, None]
        return Moments(*(np.asarray(x, np.float32) for x in (mean_KH, covariance_KHH, read)))

    return moments("k", sums["q2"] / count[..., None]), moments("v", sums["read"] / count[..., None])
