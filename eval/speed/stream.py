"""Decoding on and on through a bounded cache: whether time and memory per token stay as they were."""

import dataclasses
import functools
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.whole import nbytes
from kvcascade.eval.measure import Job
from kvcascade.eval.memory.buffers import resident
from kvcascade.eval.records import Record
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
    return Job(about, "eval/speed", lambda: [about | stream(model, spec, batch, tokens)], str(spec))


def stream(model: Model, spec: CacheSpec, batch: int, tokens: int) -> Record:
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


def table(found: list[Record]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: milliseconds per token by tokens generated, and how far the process grew after the first stretch."""
    marks = [mark for mark in (1024 * 2**n for n in range(20)) if any(r["points"][-1][0] >= mark for r in found)]
    last = max(r["points"][-1][0] for r in found)
    marks += [last] if last > marks[-1] else []
    rows = []
    for r in found:
        at = {point[0]: point for point in r["points"]}
        # A mark's figure is the median of the points since the mark before it.
        cells = []
        for before, mark in zip([0, *marks], marks, strict=False):
            part = [ms for done, ms, _ in r["points"] if before < done <= mark]
            cells.append(f"{statistics.median(part):.2f}" if mark in at else "")
        grown = r["points"][-1][2] - r["points"][0][2]
        rows.append([
            r["cache"], Path(r["model"]).name, r["weights"], f"{r['tokens']:,}", f"{r['kv_bytes'] / 2**20:.2f}", *cells,
            f"{grown / 2**20:+.1f} of {r['points'][0][2] / 2**20:,.0f}", "finite" if r["finite"] else "NOT FINITE", str(r["traces"]),
        ])  # fmt: skip
    columns = [
        "cache", "model", "weights", "tokens", "cache, MiB", *(f"…{mark:,}" for mark in marks), "process, MiB", "logits", "traces",
    ]  # fmt: skip
    return "Milliseconds per token, by tokens generated", columns, rows
