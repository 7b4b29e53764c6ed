"""One size of a crash test, in a process that may die: a model, a cache whose every slot is written, real decode steps. See `crash.py`."""

import dataclasses
import gc
import re
import time
from pathlib import Path

from kvcascade.cache.errors import BadInput
from kvcascade.eval import worker

LONGEST = 2048  # tokens per user where nobody says how many


def main(wanted: dict) -> None:
    """Load, compile, fill, decode; say after each stage what comes next, and at last what was measured."""
    # Imported here: the parent's death must end this process from its first moment on.
    import jax
    import jax.numpy as jnp

    from kvcascade.cache.spec import parse
    from kvcascade.cache.whole import nbytes
    from kvcascade.eval.memory.occupied import lengths_of, occupied, predicted, room
    from kvcascade.kernels.write import argmin
    from kvcascade.model import generate, sampling

    device = jax.devices()[0]
    worker.say(stage="loading the weights", platform=device.platform)
    config, params = load(wanted["model"], wanted["weights"], wanted["context"])
    spec, batch, steps = parse(wanted["cache"]), wanted["users"], wanted["steps"]
    context = wanted["context"] or min(config.context, LONGEST)
    generate.check_context(config, context)
    if steps >= context:
        raise BadInput(f"{steps} decode steps need a context longer than {context} tokens")
    lengths = lengths_of(wanted["lengths"], batch, context, steps)
    wanted_bytes = predicted(spec, config, context, lengths)

    worker.say(stage="compiling")
    # A prefill of the context would take memory that a step does not: the slots are written where they are.
    fill = jax.jit(lambda: occupied(spec, config, context, lengths, steps))
    of_row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = generate.decode_step.lower(config, params, jax.eval_shape(fill), of_row, of_row).compile()
    greedy, seen_BV = sampling.settings(sampling.GREEDY, batch), jnp.zeros((batch, config.vocab), bool)
    # Of the likeliest token alone: XLA plans memory also for draws that nobody makes, but it is never touched.
    likeliest = jax.jit(lambda logits_BV, seen_BV: argmin(-sampling.penalised(logits_BV, greedy, seen_BV)))
    sample = likeliest.lower(step.out_info[0], seen_BV).compile()
    fill = fill.lower().compile()
    gc.collect()

    worker.say(stage="filling the cache")
    if device.platform == "cpu":
        Path("/proc/self/clear_refs").write_text("5", "utf-8")  # VmHWM starts anew: loading and compiling are over
    cache = jax.block_until_ready(fill())
    held, most, has_room = nbytes(cache), cache.kept, room(cache, batch)
    worker.say(stage="decoding")
    token_B, times = jnp.zeros(batch, jnp.int32), []
    for left in range(steps, 0, -1):
        start = time.perf_counter()
        logits_BV, cache = step(params, cache, token_B, jnp.asarray(lengths) - left)
        token_B = jax.block_until_ready(sample(logits_BV, seen_BV))
        del logits_BV  # else they would be there during the next step too
        times.append(time.perf_counter() - start)
    worker.say(
        context=context,
        weights=config.weights,
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        cache_bytes=held,
        cache_bytes_predicted=wanted_bytes,
        tokens=sum(min(length, most) for length in lengths),
        room=has_room,
        workspace=workspace(step, sample) + sum(leaf.nbytes for leaf in jax.tree.leaves((greedy, seen_BV))),
        step_seconds=min(times),
        **(on_device(device) if device.platform != "cpu" else in_memory()),
    )


def load(name: str, weights: str | None, context: int):
    """A model's shape and parameters: a run's, a pretrained one's, or one known by its shape alone, whose weights are made up."""
    import jax
    import jax.numpy as jnp

    from kvcascade.model import gpt, pretrained
    from kvcascade.model.known import KNOWN, stretch
    from kvcascade.train import checkpoint  # not `run`, which imports Arrow: seconds, and a gigabyte of addresses

    if name in KNOWN and not Path(name).exists():
        config = stretch(dataclasses.replace(KNOWN[name], weights=weights or KNOWN[name].weights), context)
        wave = lambda leaf: (0.02 * jnp.sin(jnp.arange(leaf.size))).reshape(leaf.shape).astype(leaf.dtype)
        shapes = gpt.graph(config)[1]
        return config, jax.block_until_ready(jax.jit(lambda: jax.tree.map(wave, shapes))())
    if pretrained.is_pretrained(name):
        model = pretrained.load(name, weights=weights or "float32")
        return model.config, jax.block_until_ready(model.params)
    if weights not in (None, "float32"):
        raise BadInput(f"{name} is a run, whose weights are float32; --weights {weights} is for pretrained models")
    trained = checkpoint.load_run(Path(name))
    return trained.config.model, jax.block_until_ready(jax.tree.map(jnp.asarray, trained.params))


def workspace(step, sample) -> int:
    """Bytes that a step takes beyond its arguments: results that replace no argument, and the larger of its temporaries and its sampling's."""
    first, second = step.memory_analysis(), sample.memory_analysis()
    own = second.temp_size_in_bytes + second.output_size_in_bytes
    return first.output_size_in_bytes - first.alias_size_in_bytes + max(first.temp_size_in_bytes, own)


def in_memory() -> dict:
    """What this process has taken since VmHWM was set back: `peak` as a cgroup counts it, `reserved` what RLIMIT_DATA counts on top."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
    status = {name: 1024 * int(size) for name, size in lines}
    peak = status["VmHWM"] - status["RssFile"] + status["VmPTE"]
    return {"peak_rss": status["VmHWM"], "peak": peak, "reserved": status["VmData"] - status["RssAnon"]}


def on_device(device) -> dict:
    """What the accelerator's allocator has given out at most, and how much it has."""
    stats = device.memory_stats()
    return {"peak": stats["peak_bytes_in_use"], "limit": stats["bytes_limit"]}


if __name__ == "__main__":
    worker.serve(main)
