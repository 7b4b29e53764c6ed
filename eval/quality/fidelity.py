"""How far a cache moves the distribution of the next token from the one that the full cache gives."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from kvcascade.cache.spec import CacheSpec, parse
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params


class Fidelity(NamedTuple):
    """Per window and scored position."""

    kl_BT: Float[np.ndarray, "B T"]
    """Kullback-Leibler divergence of the cache's next-token distribution from the full cache's, KL(full ‖ cache), in nats."""
    same_BT: Bool[np.ndarray, "B T"]
    """Whether both find the same token likeliest."""


def fidelity(
    config: ModelConfig,
    params: Params,
    specs: list[CacheSpec],
    rows: Int[np.ndarray, "B T"],
    batch: int,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> list[Fidelity]:
    """Compare caches with `full` after tokens 0…T-2 of each row, teacher-forced, one token at a time.

    All caches go through a window together, so the full one's distributions are computed once and none is stored.
    `report` is told the steps done and how many there are. BadInput where logits are not numbers.
    """
    windows, T = rows.shape
    batch = min(batch, windows)
    step = jax.jit(functools.partial(_step, config), donate_argnames="cache")
    compare = jax.jit(_compare, donate_argnames=("kl_BT", "same_BT"))
    found: list[list[Fidelity]] = [[] for _ in specs]
    total = -(-windows // batch) * (T - 1)
    for first in range(0, windows, batch):
        rows_BT = jnp.asarray(np.resize(rows[first : first + batch], (batch, T)))
        caches = [generate.empty_cache(config, spec, batch, T) for spec in (parse("full"), *specs)]
        marks = [(jnp.zeros((batch, T - 1)), jnp.zeros((batch, T - 1), bool)) for _ in specs]
        for t in range(T - 1):
            at = jnp.asarray(t)
            exact, caches[0] = step(params, caches[0], rows_BT, at)
            for index in range(len(specs)):
                logits, caches[index + 1] = step(params, caches[index + 1], rows_BT, at)
                marks[index] = compare(exact, logits, *marks[index], at)
            if t % 16 == 0:
                jax.block_until_ready(marks)  # or dispatch runs ahead, and holds the logits of every step
                report(first // batch * (T - 1) + t, total)
        for mine, (kl_BT, same_BT) in zip(found, marks, strict=True):
            kept = min(batch, windows - first)
            mine.append(Fidelity(np.asarray(kl_BT)[:kept], np.asarray(same_BT)[:kept]))
            generate.check_numbers(~np.isfinite(mine[-1].kl_BT), np.ones(kept, int), first)
    return [Fidelity(*map(np.concatenate, zip(*parts, strict=True))) for parts in found]


def _step(config, params, cache, rows_BT, t):
    positions = jnp.full((rows_BT.shape[0], 1), t)
    logits_BTV, cache = gpt.step(config, params, cache, jnp.take(rows_BT, t, 1)[:, None], positions)
    return logits_BTV[:, 0].astype(jnp.float32), cache


def _compare(exact_BV, logits_BV, kl_BT, same_BT, t):
    p, q = jax.nn.log_softmax(exact_BV), jax.nn.log_softmax(logits_BV)
    kl_B = jnp.maximum((jnp.exp(p) * (p - q)).sum(-1), 0)  # rounding alone makes it negative
    same_B = exact_BV.argmax(-1) == logits_BV.argmax(-1)
    return kl_BT.at[:, t].set(kl_B), same_BT.at[:, t].set(same_B)
