"""A whole decode step, compiled for a card that need not be there: one program that changes its cache in place."""

import dataclasses
import re

import jax
import jax.numpy as jnp

from kvcascade.cache.spec import parse
from kvcascade.eval.records import Record
from kvcascade.kernels import aot, traffic
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig

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


SMOLLM2 = ModelConfig(
    layers=30, width=576, heads=9, kv_heads=3, mlp=1536, vocab=49152, context=8192, activation="swiglu", rope_base=100_000.0,
    weights="bfloat16", dtype="bfloat16",
)  # fmt: skip
LLAMA3_8B = ModelConfig(
    layers=32, width=4096, heads=32, kv_heads=8, mlp=14336, vocab=128256, context=8192, activation="swiglu", rope_base=500_000.0,
    tied=False, weights="bfloat16", dtype="bfloat16",
)  # fmt: skip
STEPS = {each.name: each for each in (Step("SmolLM2-135M", SMOLLM2, 64), Step("Llama-3-8B", LLAMA3_8B, 32))}


def measure(step: Step, card: aot.GPU) -> Record:
    """Bytes of the cache, those aliased by its donation, temporaries, copies of K and V, launches; from the compiled program."""
    model, spec = step.model, parse(step.cache)
    params = gpt.graph(model)[1]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    cache = jax.eval_shape(lambda: spec.init(step.batch, model.layers, model.kv_heads, model.head_dim, step.context))
    each_row = jax.ShapeDtypeStruct((step.batch,), jnp.int32)

    def decode_step(params, cache, token_B, position_B):
        return generate.decode_step(model, params, cache, token_B, position_B)

    compiled = aot.compile_for(decode_step, (params, cache, each_row, each_row), card, donate=(1,))
    memory, program = compiled.memory_analysis(), compiled.as_text() or ""
    assert memory
    held = [leaf for layer in cache for slots in layer.slots for leaf in jax.tree.leaves((slots.k, slots.v))]
    launches = traffic.launches(program)
    cache_bytes = spec.nbytes(model.layers, model.kv_heads, model.head_dim, step.context) * step.batch
    return {
        "kind": "step", "case": f"decode step, {step.name}", "gpu": card.name, "cache": step.cache, "batch": step.batch,
        "context": step.context, "cache_bytes": cache_bytes, "aliased": memory.alias_size_in_bytes,
        "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
        "copies": copies(program, held), "launches": len(launches),
        "kernels": sum(launch.operation == "custom-call" for launch in launches),
    }  # fmt: skip


def copies(program: str, held: list) -> int:
    """How often a program writes an array with the shape and type of one of these, other than by a kernel that changes it in place."""
    short = {
        "bfloat16": "bf16",
        "float8_e4m3fn": "f8e4m3fn",
        "float32": "f32",
        "int8": "s8",
        "uint8": "u8",
        "int32": "s32",
    }
    kinds = {f"{short[leaf.dtype.name]}[{','.join(map(str, leaf.shape))}]" for leaf in held}
    entry = program[program.index("ENTRY ") :]
    written = re.findall(r"^\s+(?:ROOT )?%?\S+ = (\w+\[[\d,]*\])\S* (\S+?)\(", entry, re.MULTILINE)
    return sum(kind in kinds and not re.match("parameter|bitcast|get-tuple-element", how) for kind, how in written)
