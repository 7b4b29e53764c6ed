"""Decoding on and on through a bounded cache: whether time and memory per token stay as they were."""

import dataclasses
import functools
import itertools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.whole import nbytes
from kvcascade.eval.measure import Job
from kvcascade.eval.memory.buffers import resident
from kvcascade.eval.records import Stream
from kvcascade.eval.table import CACHE, Column, Table
from kvcascade.kernels import processor
from kvcascade.kernels.write import argmin
from kvcascade.model import generate, gpt
from kvcascade.model.known import stretch
from kvcascade.model.pretrained import Model

DISPATCH = 64  # tokens that are decoded between two looks at the clock
STRETCH = 1024  # tokens of a point of the curve


def job(model: Model, spec: CacheSpec, batch: int, tokens: int) -> Job:
    """The measurement of one cache."""
    about = {
        "kind": "stream", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint, "cache": str(spec), "batch": batch,
        "tokens": tokens, "seed": model.seed, "processor": processor.name(),
    }  # fmt: skip
    return Job(about, "eval/speed", lambda: [Stream(**about | stream(model, spec, batch, tokens))], str(spec))


def stream(model: Model, spec: CacheSpec, batch: int, tokens: int) -> dict[str, Any]:
    """Decode so many tokens greedily, also past the model's own context; a point of time and memory per STRETCH.

    A point is [tokens so far, milliseconds per token (the median over its dispatches), resident bytes]. `traces` counts the step's.
    BadInput once logits are not finite.
    """
    config = stretch(model.config, tokens)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params, state, finite):
        traces.append(1)

        def body(_, carry):
            state, finite = carry
            logits_BTV, cache = gpt.step(config, params, state.cache, state.token_B[:, None], state.position_B[:, None])
            token_B, position_B = argmin(-logits_BTV[:, 0]), state.position_B + 1
            state = dataclasses.replace(state, cache=cache, token_B=token_B, position_B=position_B)
            return state, finite & jnp.isfinite(logits_BTV).all()

        return jax.lax.fori_loop(0, DISPATCH, body, (state, finite))

    state, finite = generate.start(config, spec, batch, tokens), jnp.asarray(True)
    kv_bytes = nbytes(state.cache) // batch
    points, times = [], []
    for done in range(DISPATCH, tokens + 1, DISPATCH):
        start = time.perf_counter()
        state, finite = jax.block_until_ready(decode(model.params, state, finite))
        if not finite:
            raise BadInput(f"the model's logits are not numbers within its first {done} tokens")
        if done > DISPATCH:  # the first one compiles
            times.append((time.perf_counter() - start) / DISPATCH * 1e3)
        if done % STRETCH == 0:
            points.append([done, statistics.median(times), resident()])
            times = []
    return {"points": points, "finite": bool(finite), "traces": len(traces), "kv_bytes": kv_bytes}


def table(found: list[Stream]) -> Table:
    """Milliseconds per token by tokens generated, and how far the process grew after the first stretch."""
    last = max(r.points[-1][0] for r in found)
    marks = [mark for mark in (1024 * 2**n for n in range(20)) if mark <= last]
    marks += [last] if last > marks[-1] else []

    def since(before: int, mark: int) -> Column:
        """The median of the points since the mark before."""
        part = lambda r: [ms for done, ms, _ in r.points if before < done <= mark]
        there = lambda r: any(done == mark for done, *_ in r.points)
        return Column(f"…{mark:,}", lambda r: statistics.median(part(r)) if there(r) else None, "{:.2f}")

    grown = lambda r: f"{(r.points[-1][2] - r.points[0][2]) / 2**20:+.1f} of {r.points[0][2] / 2**20:,.0f}"
    columns = [
        CACHE, Column("model", "name"), Column("weights", "weights"), Column("tokens", "tokens", "{:,}"),
        Column("cache, MiB", lambda r: r.kv_bytes / 2**20, "{:.2f}"), *(since(*pair) for pair in itertools.pairwise([0, *marks])),
        Column("process, MiB", grown), Column("logits", lambda r: "finite" if r.finite else "NOT FINITE"), Column("traces", "traces"),
    ]  # fmt: skip
    return Table.of("Milliseconds per token, by tokens generated", columns, found)
