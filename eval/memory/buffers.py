"""How the memory of a decode step grows with the context, which buffers a step has, and whether anything grows from step to step."""

import collections
import dataclasses
import gc
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvcascade.cache.layer import LayerCache
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.whole import Cache, nbytes
from kvcascade.eval.kernels import whole_step
from kvcascade.eval.records import Growth, StepGrowth
from kvcascade.eval.speed import bench
from kvcascade.kernels import traffic
from kvcascade.model import generate
from kvcascade.model.config import ModelConfig
from kvcascade.model.pretrained import Model


def allocated(config: ModelConfig, spec: CacheSpec, context: int) -> int:
    """Bytes of one row's cache, by allocating it and adding up its buffers."""
    return nbytes(generate.empty_cache(dataclasses.replace(config, context=context), spec, 1, context))


def growth(model: str, config: ModelConfig, specs: list[CacheSpec]) -> list[Growth]:
    """Bytes of one row's cache at contexts from 64 tokens to 8 times the model's, by allocation."""
    contexts = _doubling(8 * config.context)
    sizes = lambda spec: [allocated(config, spec, context) for context in contexts]
    return [Growth(model=model, cache=str(spec), contexts=contexts, kv_bytes=sizes(spec)) for spec in specs]


def _doubling(longest: int) -> list[int]:
    """Powers of two from 64 to a context, and that context."""
    return sorted({*(2**n for n in range(6, longest.bit_length()) if 2**n <= longest), longest})


def measured(model: Model, spec: CacheSpec, batch: int, context: int) -> StepGrowth:
    """What `growth` says, up to a context, of caches that are filled: per length, random keys and values and then a decode step.

    `kv_bytes` is of one row; the others of all rows. `held_bytes` are those of slots with a token; `live_bytes` what the arrays that
    the process has grew by, the step's logits among it; `temporary_bytes` what the step takes while it runs, by the compiled program.
    """
    found: dict[str, Any] = {"cache": str(spec), "contexts": _doubling(context)}
    columns = collections.defaultdict(list)
    for length in found["contexts"]:
        before = _live()[1]
        cache = generate.empty_cache(model.config, spec, batch, length)
        layers = tuple(_fill(layer, length - 1) for layer in cache.layers)
        cache = dataclasses.replace(cache, layers=layers)
        token_B, position_B = jnp.zeros(batch, jnp.int32), jnp.full(batch, length - 1)
        step = generate.decode_step.trace(model.config, model.params, cache, token_B, position_B).lower().compile()
        logits_BV, cache = jax.block_until_ready(step(model.params, cache, token_B, position_B))
        del token_B, position_B
        columns["kv_bytes"].append(nbytes(cache) // batch)
        columns["held_bytes"].append(bench.occupied_bytes(cache, length))
        columns["live_bytes"].append(_live()[1] - before)
        columns["output_bytes"].append(logits_BV.nbytes)
        columns["temporary_bytes"].append(_analysis(step).temp_size_in_bytes)
        del logits_BV, cache
    return StepGrowth(**found, **columns)


CHUNK = 64


def _fill(layer: LayerCache, count: int) -> LayerCache:
    """Put so many tokens into an empty layer, in pieces of one length, so that not every count is compiled anew."""
    heads, batch = layer.heads, layer.slots[0].pos_BKS.shape[0]
    normal = np.random.default_rng(0).standard_normal
    shapes = (heads.queries, heads.width), (heads.kv, heads.width), (heads.kv, heads.value_width)
    tokens = [jnp.asarray(normal((batch, CHUNK, *shape), np.float32)) for shape in shapes]
    for start in range(0, count, CHUNK):
        pos_T = np.arange(start, start + CHUNK, dtype=np.int32)
        positions_BT = jnp.asarray(np.broadcast_to(np.where(pos_T < count, pos_T, -1), (batch, CHUNK)))
        _, layer = _step(layer, *tokens, positions_BT)
    return layer


_step = jax.jit(LayerCache.step, donate_argnums=0)


def of_step(
    compiled: jax.stages.Compiled, cache: Cache, component: Callable[[str], str], most: int = 6
) -> dict[str, Any]:
    """Which buffers a compiled decode step has, and which instructions have the largest temporaries.

    What instructions of the same kind and size write, mostly one of each layer, is one line; they share memory, so the lines add up to
    more than `temporaries`. A `copies` of anything but 0 says that the program writes a whole K or V buffer of the cache.
    """
    memory, program = _analysis(compiled), compiled.as_text() or ""
    held = jax.tree.leaves([(slots.k, slots.v) for layer in cache.layers for slots in layer.slots])
    in_place = whole_step.kinds(jax.tree.leaves(cache))
    outputs = traffic.returned(program)
    found: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for launch in traffic.launches(program):
        parts = traffic.kinds(launch.result)
        kept = [part for part in parts if not (launch.target and part in in_place)]
        if kept and launch.name not in outputs:
            found[re.sub(r"\.\d+$", "", launch.name), component(launch.scope), ", ".join(kept)] += 1
    lines = [
        {"instruction": name, "component": part, "type": kind, "count": count, "bytes": traffic.size(kind)}
        for (name, part, kind), count in found.items()
    ]
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "cache": nbytes(cache),
        "copies": whole_step.copies(program, held),
        "largest": sorted(lines, key=lambda line: -line["bytes"])[:most],
    }


def _analysis(compiled: jax.stages.Compiled):
    found = compiled.memory_analysis()
    assert found  # on a CPU and on GPUs there always is one
    return found


def steady(step: Callable[[], object], count: int) -> dict[str, Any]:
    """Take so many steps; by how much live arrays, their bytes and the process's memory grew over all but the first few."""
    warm = min(4, count // 2)
    for _ in range(warm):
        step()
    before = *_live(), resident()
    for _ in range(count - warm):
        step()
    after = *_live(), resident()
    return {
        "steps": count - warm,
        "arrays": after[0] - before[0],
        "bytes": after[1] - before[1],
        "resident": after[2] - before[2],
    }


def _live() -> tuple[int, int]:
    """How many arrays this process has on its devices, and their bytes."""
    gc.collect()
    every = jax.live_arrays()
    return len(every), sum(each.nbytes for each in every)


def resident() -> int:
    """Bytes of this process that are in memory; where the system does not tell, the most that there have been."""
    if (statm := Path("/proc/self/statm")).exists():
        return int(statm.read_text("utf-8").split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
