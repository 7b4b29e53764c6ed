"""Perplexity of a model behind a cache, one token at a time, so that an eviction is felt by every later token."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.whole import nbytes
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params

DISPATCH = 64  # tokens that are scored between two moments at which the user can stop


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one pass over the windows gave; bytes are of one row."""

    nll_BT: Float[np.ndarray, "B T"]
    """Nats of each scored token."""
    kv_bytes: int
    tokens_per_second: float
    """Tokens decoded per second, all rows together, compilation left out."""
    traces: int
    """How often the decode step of this model shape, cache and batch has been traced, over all batches and models so far."""
    compile_seconds: float


def check(config: ModelConfig, specs: list[CacheSpec], context: int, prefix: int, batch: int = 1) -> None:
    """BadInput for what `score` could not do, told before anything is compiled or taken from memory."""
    if batch < 1 or context < 2:
        raise BadInput(f"{batch} windows of {context} tokens at once have nothing to score")
    if not 0 <= prefix < context:
        raise BadInput(f"a prefix of {prefix} tokens leaves nothing to score in a context of {context}")
    generate.check_context(config, context)
    for spec in specs:
        generate.check_memory(config, spec, batch, context)


class _Step:
    """Scoring steps in one dispatch, which count their traces. The rows and the results stay on the device."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.traces = 0
        self.run = jax.jit(self._run, donate_argnames=("cache", "nll_BT"))

    def _run(self, params, rows_BT, cache, t, stop, nll_BT):
        self.traces += 1

        def body(t, carry):
            cache, nll_BT = carry
            token_B, next_B = jnp.take(rows_BT, t, 1), jnp.take(rows_BT, t + 1, 1)
            positions_BT = jnp.full((rows_BT.shape[0], 1), t)
            logits_BTV, cache = gpt.step(self.config, params, cache, token_B[:, None], positions_BT)
            nll_B = optax.softmax_cross_entropy_with_integer_labels(logits_BTV[:, 0].astype(jnp.float32), next_B)
            return cache, nll_BT.at[:, t].set(nll_B)

        return jax.lax.fori_loop(t, stop, body, (cache, nll_BT))


@functools.lru_cache(maxsize=64)
def _compiled(config: ModelConfig, spec: CacheSpec, batch: int, context: int) -> _Step:
    """One step per model shape, cache and batch: two models of one shape share it."""
    return _Step(config)


def score(
    config: ModelConfig, params: Params, spec: CacheSpec, rows: Int[np.ndarray, "B T"], batch: int, prefix: int = 0
) -> Scores:
    """Score tokens max(prefix, 1)…T-1 of each row, teacher-forced: the first `prefix` enter in one prefill, the others one by one.

    Rows go through in batches, the last one filled up with repeats that are not counted. BadInput where logits are not numbers.
    """
    windows, T = rows.shape
    check(config, [spec], T, prefix, min(batch, windows))
    batch = min(batch, windows)
    step = _compiled(config, spec, batch, T)
    scored, seconds, steps, compile_seconds, kv_bytes = [], 0.0, 0, 0.0, 0
    for first in range(0, windows, batch):
        rows_BT = jnp.asarray(np.resize(rows[first : first + batch], (batch, T)))
        cache = generate.empty_cache(config, spec, batch, T)
        nll_BT = jnp.zeros((batch, T))
        if prefix:
            positions = jnp.broadcast_to(jnp.arange(prefix), (batch, prefix))
            logits_BV, cache = generate.prefill(config, params, cache, rows_BT[:, :prefix], positions)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits_BV.astype(jnp.float32), rows_BT[:, prefix])
            nll_BT = nll_BT.at[:, prefix - 1].set(loss)
        start = time.perf_counter()
        if prefix < T - 1:
            cache, nll_BT = jax.block_until_ready(step.run(params, rows_BT, cache, prefix, prefix + 1, nll_BT))
        if not first:
            compile_seconds, start = time.perf_counter() - start, time.perf_counter()
        for t in range(prefix + 1, T - 1, DISPATCH):
            cache, nll_BT = step.run(params, rows_BT, cache, t, min(t + DISPATCH, T - 1), nll_BT)
        scored.append(np.asarray(nll_BT)[: windows - first, max(prefix, 1) - 1 : T - 1])
        generate.check_numbers(~np.isfinite(scored[-1]), np.full(len(scored[-1]), max(prefix, 1)), first)
        seconds += time.perf_counter() - start
        steps += T - 2 - prefix + bool(first)
        kv_bytes = nbytes(cache) // batch
    rate = steps * batch / seconds if steps > 0 else 0.0
    return Scores(np.concatenate(scored), kv_bytes, rate, step.traces, compile_seconds)
