"""Perplexity of a model behind a cache, one token at a time, so that an eviction is felt by every later token; and how far from another cache it is."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int

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
    """Tokens decoded per second, all rows together, compilation left out; of both caches where two are compared."""
    traces: int
    """How often the decode step of this model shape, cache and batch has been traced, over all batches and models so far."""
    compile_seconds: float
    kl_BT: Float[np.ndarray, "B T"] | None = None
    """Kullback-Leibler divergence of the cache's next-token distribution from the other's, KL(other ‖ cache), in nats."""
    same_BT: Bool[np.ndarray, "B T"] | None = None
    """Whether both find the same token likeliest."""


def check(config: ModelConfig, specs: list[CacheSpec], context: int, prefix: int, batch: int = 1) -> None:
    """BadInput for what `score` could not do, told before anything is compiled or taken from memory."""
    if batch < 1 or context < 2:
        raise BadInput(f"{batch} windows of {context} tokens at once have nothing to score")
    if not 0 <= prefix < context:
        raise BadInput(f"a prefix of {prefix} tokens leaves nothing to score in a context of {context}")
    generate.check_context(config, context)
    for spec in specs:
        if spec.rereads:
            if not prefix:
                raise BadInput(f"{spec} reads a prompt twice: give it one, a prefix of the window's tokens")
            generate.check_rereading(config, spec.rereads, prefix)
        generate.check_memory(config, spec, batch, context)


class _Step:
    """Scoring steps in one dispatch, which count their traces. The rows and the results stay on the device."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.traces = 0
        self.run = jax.jit(self._run, donate_argnames=("caches", "found"))

    def _run(self, params, rows_BT, caches, t, stop, found):
        self.traces += 1

        def body(t, carry):
            caches, found = carry
            positions_BT = jnp.full((rows_BT.shape[0], 1), t)
            logits, after = [], []
            for cache in caches:
                each_BTV, cache = gpt.step(self.config, params, cache, jnp.take(rows_BT, t, 1)[:, None], positions_BT)
                logits.append(each_BTV[:, 0].astype(jnp.float32))
                after.append(cache)
            return tuple(after), _mark(found, t, jnp.take(rows_BT, t + 1, 1), *logits)

        return jax.lax.fori_loop(t, stop, body, (caches, found))


def _mark(found, t, next_B, logits_BV, exact_BV=None):
    """What is found with the logits after token `t`."""
    new = {"nll": optax.softmax_cross_entropy_with_integer_labels(logits_BV, next_B)}
    if exact_BV is not None:
        p, q = jax.nn.log_softmax(exact_BV), jax.nn.log_softmax(logits_BV)
        new["kl"] = jnp.maximum((jnp.exp(p) * (p - q)).sum(-1), 0)  # rounding alone makes it negative
        new["same"] = exact_BV.argmax(-1) == logits_BV.argmax(-1)
    return {name: found[name].at[:, t].set(value) for name, value in new.items()}


@functools.lru_cache(maxsize=64)
def _compiled(config: ModelConfig, specs: tuple[CacheSpec, ...], batch: int, context: int) -> _Step:
    """One step per model shape, caches and batch: two models of one shape share it."""
    return _Step(config)


def score(
    config: ModelConfig,
    params: Params,
    spec: CacheSpec,
    rows: Int[np.ndarray, "B T"],
    batch: int,
    prefix: int = 0,
    other: CacheSpec | None = None,
    chunk: int = 0,
) -> Scores:
    """Score tokens max(prefix, 1)…T-1 of each row, teacher-forced: the first `prefix` enter in one prefill, the others one by one.

    With a `chunk` so many tokens of the prefix enter at once.

    With another cache, which goes through the same rows beside it, the distributions of the next token are compared as well. Rows go
    through in batches, the last one filled up with repeats that are not counted. BadInput where logits are not numbers.
    """
    windows, T = rows.shape
    specs = (spec,) if other is None else (spec, other)
    check(config, [*specs], T, prefix, min(batch, windows))
    batch = min(batch, windows)
    step = _compiled(config, specs, batch, T)
    scored, seconds, steps, compile_seconds, kv_bytes = [], 0.0, 0, 0.0, 0
    for first in range(0, windows, batch):
        rows_BT = jnp.asarray(np.resize(rows[first : first + batch], (batch, T)))
        caches = tuple(generate.empty_cache(config, each, batch, T) for each in specs)
        found = {"nll": jnp.zeros((batch, T))}
        if other is not None:
            found |= {"kl": jnp.zeros((batch, T)), "same": jnp.zeros((batch, T), bool)}
        if prefix:
            positions = jnp.broadcast_to(jnp.arange(prefix), (batch, prefix))
            logits, caches = zip(
                *(generate.prefill(config, params, cache, rows_BT[:, :prefix], positions, chunk) for cache in caches),
                strict=True,
            )
            found = _mark(found, prefix - 1, rows_BT[:, prefix], *(each.astype(jnp.float32) for each in logits))
        start = time.perf_counter()
        if prefix < T - 1:
            caches, found = jax.block_until_ready(step.run(params, rows_BT, caches, prefix, prefix + 1, found))
        if not first:
            compile_seconds, start = time.perf_counter() - start, time.perf_counter()
        for t in range(prefix + 1, T - 1, DISPATCH):
            caches, found = step.run(params, rows_BT, caches, t, min(t + DISPATCH, T - 1), found)
        ours = {name: np.asarray(value)[: windows - first, max(prefix, 1) - 1 : T - 1] for name, value in found.items()}
        scored.append(ours)
        wrong = ~np.isfinite(ours["nll"]) | ~np.isfinite(ours.get("kl", 0.0))
        generate.check_numbers(wrong, np.full(len(wrong), max(prefix, 1)), first)
        seconds += time.perf_counter() - start
        steps += T - 2 - prefix + bool(first)
        kv_bytes = nbytes(caches[0]) // batch
    rate = steps * batch / seconds if steps > 0 else 0.0
    whole = {name: np.concatenate([each[name] for each in scored]) for name in scored[0]}
    return Scores(whole["nll"], kv_bytes, rate, step.traces, compile_seconds, whole.get("kl"), whole.get("same"))
