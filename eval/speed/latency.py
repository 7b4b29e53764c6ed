"""How long a decode step takes, next to the matrix products that it cannot do without."""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from kvcascade.cache.spec import CacheSpec
from kvcascade.kernels.nonlinear import GATED
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params

STEPS = 60  # per timed stretch: many milliseconds, so that dispatch and the clock do not count


def decode_step(config: ModelConfig, params: Params, specs: list[CacheSpec], batch: int) -> list[dict]:
    """Milliseconds of a greedy decode step behind each cache, from position 0 to the model's context, and of its products alone.

    The step and the products take turns in stretches of 60, so that noise of the machine hits both; each figure is a median of
    the stretches, `first_ms` and `last_ms` those of the first and last third, when the cache fills and when it is full.
    """
    steps = min(STEPS, config.context // 8)
    products = jax.jit(functools.partial(_products, config))
    x_BM = jnp.ones((batch, config.width), config.dtype)
    jax.block_until_ready(products(params, x_BM))
    found = []
    for spec in specs:
        state = generate.start(config, spec, batch, config.context)
        compiled = time.perf_counter()
        state = [jax.block_until_ready(generate.decode_steps(config, params, state)[1])]
        compiled = time.perf_counter() - compiled

        def once(state=state):
            state[0] = generate.decode_steps(config, params, state[0])[1]
            return state[0]

        ours, theirs = [], []
        for _ in range((config.context - 1) // steps):
            ours.append(_stretch(once, steps))
            theirs.append(_stretch(lambda: products(params, x_BM), steps))
        third = len(ours) // 3
        found.append({
            "kind": "latency", "cache": str(spec), "batch": batch, "context": config.context, "steps": len(ours) * steps,
            "step_ms": statistics.median(ours), "first_ms": statistics.median(ours[:third]), "last_ms": statistics.median(ours[-third:]),
            "products_ms": statistics.median(theirs), "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
            "compile_seconds": compiled,
        })  # fmt: skip
    return found


def _products(config: ModelConfig, params: Params, x_BM):
    """Each of the model's matrices times one vector per row, in the order of a decode step and with nothing between them."""
    model, kept = nnx.merge(gpt.graph(config)[0], params), []
    for block in model.layers:
        attention = block.attention
        kept += [attention.k(x_BM), attention.v(x_BM)]
        # Values may be of another width than queries: numbers are repeated or left out.
        width = attention.heads.queries * attention.heads.value_width
        x_BM = attention.o(jnp.resize(attention.q(x_BM), (len(x_BM), width)))
        hidden = block.up(x_BM)
        if config.activation in GATED:
            hidden = hidden + block.gate(x_BM)
        x_BM = block.down(hidden)
    return model.logits(x_BM), kept


def _stretch(call: Callable, steps: int) -> float:
    start = time.perf_counter()
    results = [None]
    for _ in range(steps):
        results[0] = call()
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / steps * 1e3
