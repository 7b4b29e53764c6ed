"""One prompt's way into a cache, in a process of its own: what the program takes beside its arguments, and what the process grew by. See `prompt.py`."""

import gc
import time
from pathlib import Path

from kvcascade.eval import worker
from kvcascade.eval.memory.crash_child import in_memory, load, on_device


def main(wanted: dict) -> None:
    """Load, compile, put the prompts in; say what was measured."""
    # Imported here: the parent's death must end this process from its first moment on.
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kvcascade.cache.spec import parse
    from kvcascade.cache.whole import nbytes
    from kvcascade.model import generate

    device = jax.devices()[0]
    config, params = load(wanted["model"], wanted["weights"], wanted["tokens"] + 1)
    spec, batch, tokens = parse(wanted["cache"]), wanted["batch"], wanted["tokens"]
    cache = generate.empty_cache(config, spec, batch, tokens + 1)
    held = nbytes(cache)
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab, (batch, tokens)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens), prompts.shape)
    lowered = generate.prefill_step.lower(
        config, params, jax.eval_shape(lambda: cache), prompts, positions, chunk=wanted["chunk"]
    )
    enter = lowered.compile()
    gc.collect()
    jax.block_until_ready((params, cache, prompts))
    on_cpu = device.platform == "cpu"
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")  # VmHWM starts anew: loading and compiling are over
    before = in_memory()["peak"] if on_cpu else device.memory_stats()["bytes_in_use"]
    start = time.perf_counter()
    jax.block_until_ready(enter(params, cache, prompts, positions))
    seconds = time.perf_counter() - start
    memory = enter.memory_analysis()
    assert memory is not None
    peak = (in_memory() if on_cpu else on_device(device))["peak"]
    worker.say(
        weights=config.weights,
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        kv_bytes=held // batch,
        kv_bytes_predicted=spec.nbytes(config.layer_heads, tokens + 1),
        temporaries=memory.temp_size_in_bytes,
        peak=peak,
        grown=peak - before,
        prefill_seconds=seconds,
    )


if __name__ == "__main__":
    worker.serve(main)
