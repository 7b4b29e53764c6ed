"""A whole decode step, compiled for a card that need not be there: one program that changes its cache in place."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kvcascade.cache.spec import CacheSpec, parse
from kvcascade.cache.whole import Cache
from kvcascade.eval.table import Column, Table
from kvcascade.kernels import aot, traffic
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.known import KNOWN

SPEC = "sink 4 | recent 60 | heavy 64@int8 | heavy 3968@int4h"
"""Four tiers of three formats, 4,096 tokens in all."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A model by its shape, a cache, and how many rows it has."""

    name: str
    model: ModelConfig
    batch: int
    cache: str = SPEC
    context: int = 4096


type Record = dict[str, Any]
"""What was found of one case on one card, or why nothing was: `refused`, `failed`."""

STEPS = {
    each.name: each
    for each in (
        Step("decode step of SmolLM2-135M, 64 rows", KNOWN["smollm2-135m"], 64),
        Step("decode step of Llama-3-8B, 32 rows", KNOWN["llama3-8b"], 32),
    )
}
SPARE = 0.05
"""Temporaries that a step may have, as a share of its cache."""


def compile_step(
    model: ModelConfig, spec: CacheSpec, batch: int, context: int, card: aot.GPU
) -> tuple[jax.stages.Compiled, Any, Cache]:
    """A decode step with its cache donated, compiled for a card; also XLA's analysis of its memory, and the cache's shapes."""
    params = gpt.graph(model)[1]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    cache = jax.eval_shape(lambda: spec.init(batch, model.layer_heads, context))
    each_row = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def decode_step(params, cache, token_B, position_B):
        return generate.decode_step(model, params, cache, token_B, position_B)

    compiled = aot.compile_for(decode_step, (params, cache, each_row, each_row), card, donate=(1,))
    return compiled, compiled.memory_analysis(), cache


def measure(step: Step, card: aot.GPU) -> Record:
    """Bytes of the cache, those aliased by its donation, temporaries, copies of K and V, launches: all from the compiled program."""
    model, spec = step.model, parse(step.cache)
    compiled, memory, cache = compile_step(model, spec, step.batch, step.context, card)
    program = compiled.as_text() or ""
    held = [leaf for layer in cache.layers for slots in layer.slots for leaf in jax.tree.leaves((slots.k, slots.v))]
    launches = traffic.launches(program)
    cache_bytes = spec.nbytes(model.layer_heads, step.context) * step.batch
    return {
        "cache": step.cache,
        "batch": step.batch,
        "context": step.context,
        "cache_bytes": cache_bytes,
        "aliased": memory.alias_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "copies": copies(program, held),
        "launches": len(launches),
    }


def faults(found: Record, baseline: Record | None) -> list[str]:
    """What is wrong with a step by itself, and worse than in the baseline."""
    if "failed" in found:
        return [found["failed"]]
    wrong = []
    if found["aliased"] != found["cache_bytes"]:
        wrong.append(f"{found['aliased']} of the cache's {found['cache_bytes']} bytes are aliased")
    if found["copies"]:
        wrong.append(f"copies keys or values {found['copies']} times")
    if found["temporaries"] > SPARE * found["cache_bytes"]:
        wrong.append(f"temporaries of {found['temporaries']} bytes, above {SPARE:.0%} of the cache")
    for what in ("temporaries", "launches"):
        if baseline and "failed" not in baseline and found[what] > 1.05 * baseline[what]:
            wrong.append(f"{what} {found[what]}, where it was {baseline[what]}")
    return wrong


def table(found: Sequence[Record]) -> Table:
    """A row per step and card."""
    share = lambda of: lambda one: one[of] / one["cache_bytes"] if of in one else None
    size = lambda one: f"failed: {one['failed']}"[:60] if "failed" in one else f"{one['cache_bytes'] / 2**20:,.0f}"
    columns = [
        Column("program", "case"), Column("GPU", "gpu"), Column("cache, MiB", size), Column("aliased", share("aliased"), "{:.0%}"),
        Column("copies of K and V", "copies"), Column("temporaries, MiB", lambda one: one["temporaries"] / 2**20 if "temporaries" in one else None, "{:.1f}"),
        Column("of the cache", share("temporaries"), "{:.1%}"), Column("launches", "launches", "{:,}"),
    ]  # fmt: skip
    return Table.of("whole decode steps", columns, found)


def copies(program: str, held: list) -> int:
    """How often a program writes an array with the shape and type of one of these, other than by a kernel that changes it in place."""
    wanted = kinds(held)
    written = (launch.result for launch in traffic.launches(program) if launch.operation != "custom-call")
    return sum(bool(wanted & set(traffic.kinds(result))) for result in written)


def kinds(held: list) -> set[str]:
    """The types of arrays as a program has them."""
    short = {
        "bfloat16": "bf16",
        "float8_e4m3fn": "f8e4m3fn",
        "float32": "f32",
        "int8": "s8",
        "uint8": "u8",
        "int32": "s32",
    }
    return {f"{short[leaf.dtype.name]}[{','.join(map(str, leaf.shape))}]" for leaf in held}
