"""Where a decode step spends its time and its bytes, by component: from the compiled program, and from traces of real steps."""

import collections
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.whole import Cache, nbytes
from kvcascade.eval.measure import Job
from kvcascade.eval.memory import buffers
from kvcascade.eval.records import Profile
from kvcascade.eval.speed import bench
from kvcascade.eval.speed.trace import trace
from kvcascade.kernels import native, processor, traffic
from kvcascade.kernels.decode import decode
from kvcascade.model import generate, sampling
from kvcascade.model.config import ModelConfig
from kvcascade.model.pretrained import Model

COMPONENTS = {
    "qkv": "one product for queries, keys and values",
    "output": "attention's projection back to the model's width",
    "mlp": "the products of the MLP",
    "activation": "of the MLP",
    "head": "the logits",
    "attention": "one query over the slots of all tiers, decoding them",
    "priority": "how much each slot deserves to stay",
    "exchange": "append and evict: the codes of what goes in and out",
    "scores": "attention mass added to that of the slots",
    "norm": "norms, and the sums of the residual stream",
    "rope": "turning queries and keys",
    "embedding": "the token's vector",
    "sampling": "the likeliest token",
    "other": "everything else",
}
"""The scopes that a model is traced in, and what is done there."""
TOLERANCE = 0.1
"""By how much the profiled steps may differ from the others for their shares to be trusted."""
ROUNDS, EACH = 6, 2  # stretches without and with the profiler, in turns, and the dispatches of each
TIMED = 2 * ROUNDS * EACH * generate.DISPATCH  # steps
WATCHED = 48  # dispatches at most, over which nothing may grow, before those that are timed
LEAST = 256
"""The shortest context that has room for the steps of a profile."""


def check(config: ModelConfig, specs: list[CacheSpec], context: int) -> None:
    """BadInput if the context is too short for a profile or longer than the model's, or a cache does not suit the model."""
    if context < LEAST:
        raise BadInput(f"a profile needs a context of at least {LEAST} tokens, not {context}")
    generate.check_context(config, context)
    for spec in specs:
        spec.groups(config.layer_heads)
        spec.check_in_rows("a profile")


class _Program(NamedTuple):
    name: str
    text: str
    compiled: jax.stages.Compiled
    launches: list[traffic.Launch]


def job(model: Model, spec: CacheSpec, batch: int, context: int) -> Job:
    """The measurement of one cache: its step, and how its memory grows with the context."""
    about = {
        "kind": "profile", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint, "cache": str(spec),
        "batch": batch, "context": context, "seed": model.seed, "processor": processor.name(),
    }  # fmt: skip

    def run() -> list[Profile]:
        bandwidth = bench.bandwidth()
        found = about | profile(model, spec, batch, context)
        return [Profile(**found, bandwidth=bandwidth, growth=buffers.measured(model, spec, batch, context))]

    return Job(about, "eval/speed", run, str(spec))


def profile(model: Model, spec: CacheSpec, batch: int, context: int) -> dict[str, Any]:
    """What is found of one cache: a step's time and bytes by component, its buffers, and whether anything grows from step to step.

    Rows of random tokens are prefilled, then decoded greedily by `generate.generate` up to `context`, DISPATCH steps at a time. The shares
    are means over the fastest quarter of the profiled dispatches, so they add up to `profiled_ms`; `step_ms` is the same without the profiler.
    """
    config = model.config
    watched = min(WATCHED, (context - TIMED) * 3 // 4 // generate.DISPATCH)
    count = 1 + watched * generate.DISPATCH + TIMED
    prompts = np.random.default_rng(model.seed).integers(0, model.encoding.n_vocab, (batch, context - count)).tolist()
    cache = generate.empty_cache(config, spec, batch, context)
    program = _program(model, cache, batch)
    tokens = generate.generate(config, model.params, cache, prompts, count)
    latest: list = []

    def dispatch():
        latest[:] = jax.block_until_ready(next(tokens))

    del cache  # the first dispatch takes it
    watch = buffers.steady(dispatch, 1 + watched)
    plain, traced = [], []
    for _ in range(ROUNDS):
        plain += [bench.seconds(dispatch) for _ in range(EACH)]
        traced += trace(dispatch, EACH)
    cache = latest[1]
    fastest = _fastest(traced, lambda each: each.total)
    mean = lambda values: statistics.fmean(values) / 1e6 / generate.DISPATCH
    places = {(program.name, launch.name): component(launch.scope) for launch in program.launches}
    times: dict[str, float] = collections.defaultdict(float)
    calls: collections.Counter[str] = collections.Counter()
    for key in {key for each in fastest for key in each.instructions}:
        times[places.get(key, "other")] += mean(each.instructions.get(key, 0.0) for each in fastest)
        calls[places.get(key, "other")] += 1
    moved = _moved(program, cache)
    return {
        "steps": len(traced) * generate.DISPATCH,
        "step_ms": mean(_fastest(plain, float)) * 1e9,
        "profiled_ms": mean(each.total for each in fastest),
        "components": [
            {"name": name, "calls": calls[name], "ms": times[name], "bytes": moved[name]}
            for name in COMPONENTS
            if calls[name]
        ],
        "between_ms": mean(each.between for each in fastest),
        "around_ms": mean(each.around for each in fastest),
        "tiers": _tiers(model, cache, batch, context, times["attention"]),
        "operations": _operations(model, program, cache, batch),
        "kv_bytes": nbytes(cache) // batch,
        "buffers": buffers.of_step(program.compiled, cache, component),
        "watched": watch | {"steps": watch["steps"] * generate.DISPATCH},
    }


def component(scope: str) -> str:
    """The innermost of COMPONENTS in the names of the scopes that an instruction was traced in."""
    return next((name for name in reversed(scope.split("/")) if name in COMPONENTS), "other")


def _program(model: Model, cache: Cache, batch: int) -> _Program:
    """What `generate.generate` dispatches; the loop over its steps is counted once, so all that it says is of one step."""
    each_row, seen_BV = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, model.config.vocab), bool)
    state = generate.State(cache, each_row, each_row, sampling.settings(sampling.GREEDY, batch), seen_BV)
    traced = generate.decode_steps.trace(model.config, model.params, state, generate.DISPATCH, most=generate.DISPATCH)
    compiled = traced.lower().compile()
    text = compiled.as_text() or ""
    return _Program(text.split(",", 1)[0].split()[-1], text, compiled, traffic.launches(text))


def _moved(program: _Program, cache: Cache) -> collections.Counter[str]:
    """Bytes that each component reads and writes in a step: what the operands and results of its instructions take.

    But of what the C++ kernels are given, `kvcascade_decode` reads the slots that hold a token, `kvcascade_exchange` one of each KV head.
    """
    moved: collections.Counter[str] = collections.Counter()
    targets = set()
    for launch in program.launches:
        moved[component(launch.scope)] += launch.moved
        targets.add(launch.target)
    size = lambda *parts: sum(leaf.nbytes for leaf in jax.tree.leaves(parts))
    for slots in (slots for layer in cache.layers for slots in layer.slots):
        if "kvcascade_decode" in targets:
            moved["attention"] -= round(float((slots.pos_BKS < 0).mean()) * size(slots.k, slots.v, slots.pos_BKS))
        if "kvcascade_exchange" in targets and not native.unread(slots):
            moved["exchange"] -= round(2 * size(slots) * (1 - 1 / slots.pos_BKS.shape[-1]))
    return moved


def _operations(model: Model, program: _Program, cache: Cache, batch: int) -> float:
    """Floating-point operations of a decode step: those that XLA counts, and those of the C++ kernels, which it does not."""
    config, targets = model.config, {launch.target for launch in program.launches}
    count = float((program.compiled.cost_analysis() or {}).get("flops", 0.0))
    if "kvcascade_product" in targets:
        count += 2 * batch * sum(leaf.size for leaf in bench.read_whole(config, model.params) if leaf.ndim == 2)
    if "kvcascade_decode" in targets:
        for layer in cache.layers:
            per_slot = 2 * (layer.heads.width + layer.heads.value_width) * layer.heads.queries // layer.heads.kv
            count += per_slot * sum(int((slots.pos_BKS >= 0).sum()) for slots in layer.slots)
    return count


def _tiers(model: Model, cache: Cache, batch: int, context: int, attention_ms: float) -> list[dict]:
    """Attention's part of a step by tier: bytes of the slots that hold a token, and time.

    All tiers are one call, so its time is divided as are the times that attention over each tier alone takes, of all layers, one after the other.
    """
    texts = dict.fromkeys((i, str(tier)) for layer in cache.layers for i, tier in enumerate(layer.cascade.tiers))
    q_pos_B = jnp.full(batch, context - 1)
    found = []
    for index, text in texts:
        layers = [e for e in cache.layers if len(e.slots) > index and str(e.cascade.tiers[index]) == text]
        codecs = layers[0].cascade.tiers[index].codecs

        @jax.jit
        def alone(layers, index=index, codecs=codecs):
            after = 0.0  # so that one layer comes after the other, as in a step
            for layer in layers:
                q_BNH = jnp.full((batch, layer.heads.queries, layer.heads.width), 1 + 0 * after)
                held = [(layer.slots[index], codecs)]
                part, _ = decode(q_BNH, q_pos_B, held, layer.heads, layer.cascade.observed)
                after = part.sum_BTN[0, 0, 0]
            return after

        slots = [layer.slots[index] for layer in layers]
        jax.block_until_ready(alone(layers))
        times = [bench.seconds(lambda: alone(layers)) for _ in range(20)]  # noqa: B023
        size = sum(
            float((one.pos_BKS >= 0).mean()) * sum(leaf.nbytes for leaf in jax.tree.leaves((one.k, one.v, one.pos_BKS)))
            for one in slots
        )
        found.append({"tier": text, "bytes": round(size), "alone_ms": statistics.median(times) * 1e3})
    total = sum(each["alone_ms"] for each in found)
    return [each | {"ms": attention_ms * each["alone_ms"] / total} for each in found]


def _fastest[T](values: list[T], key: Callable[[T], float]) -> list[T]:
    """The quarter of them that the rest of the machine disturbed least."""
    return sorted(values, key=key)[: max(1, len(values) // 4)]
