"""A trace of requests served by the engine, or by `generate` in batches as they come: latency, throughput, waste."""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvcascade.cache.spec import CacheSpec, parse
from kvcascade.eval.measure import Job
from kvcascade.eval.records import Served
from kvcascade.eval.table import CACHE, Column, Table
from kvcascade.kernels import processor
from kvcascade.model import generate
from kvcascade.model.pretrained import Model
from kvcascade.serve.device import Device
from kvcascade.serve.engine import Engine, Request
from kvcascade.serve.plan import Limits
from kvcascade.serve.trace import Arrival, tokens


class Clock:
    """Seconds of work, and of waiting for a request that is to come, which is not waited for."""

    def __init__(self, source: Callable[[], float]):
        self._source, self._skipped = source, -source()

    def __call__(self) -> float:
        """Seconds since the trace began."""
        return self._source() + self._skipped

    def skip_to(self, when: float) -> None:
        """Let nothing happen until then."""
        self._skipped += max(0.0, when - self())


@dataclasses.dataclass
class Times:
    """When a request came, and when each of its tokens."""

    at: float
    tokens: list[float] = dataclasses.field(default_factory=list)


def engine(
    model: Model, spec: CacheSpec, arrivals: Sequence[Arrival], prompts, blocks: int, limits: Limits, clock
) -> dict[str, Any]:
    """Serve a trace by the engine; requests of which the pool cannot hold one are BadInput before anything runs."""
    context = max(each.prompt + each.output for each in arrivals)
    device = Device(model.config, model.params, spec, blocks, limits, context, fingerprint=model.fingerprint)
    warm, now = device.warm(), Clock(clock)
    compiled = len(device.programs)
    ours = Engine(device, clock=now)
    rows, coming, seen = {}, collections.deque(zip(arrivals, prompts, strict=True)), []
    wasted = []
    while coming or ours.busy:
        if coming and not ours.busy:
            now.skip_to(coming[0][0].at)
        while coming and coming[0][0].at <= now():
            each, prompt = coming.popleft()
            (number,) = ours.submit(Request(prompt, each.output))
            rows[number] = Times(each.at)
            seen.append(rows[number])
        events, after = ours.run_step(), now()
        for event in events:
            rows[event.id].tokens.append(after)
        held = sum(len(row.table.blocks) for row in ours.queue.running) * ours.blocks.size
        inside = sum(min(len(row.tokens), len(row.table.blocks) * ours.blocks.size) for row in ours.queue.running)
        wasted += [1 - inside / held] if held else []
    stats = ours.stats
    return _summary(seen, now()) | {
        "blocks": blocks, "rows": limits.rows, "step_tokens": limits.tokens, "warm_seconds": warm, "compiles": len(device.programs) - compiled,
        "steps": stats["steps"], "useful": stats["tokens"] / max(1, stats["tokens"] + stats["padded"]), "found": stats["found"],
        "stopped": stats["stopped"], "copied": stats["copied"], "evicted": ours.blocks.evictions, "waste": float(np.mean(wasted or [0.0])),
        "kv_bytes": sum(x.nbytes for pool in device.cache.pools for part in (pool.k, pool.v) for x in part.values()),
    }  # fmt: skip


def batches(model: Model, spec: CacheSpec, arrivals: Sequence[Arrival], prompts, size: int, clock) -> dict[str, Any]:
    """Serve a trace by `generate`: up to so many requests that have come, filled up with rows that mean nothing, and the next when the longest is over."""
    context = min(max(each.prompt + each.output for each in arrivals) + generate.DISPATCH, model.config.context)
    lengths = [1 << (each.prompt - 1).bit_length() for each in arrivals]  # as `generate` pads them
    config, params = model.config, model.params

    def answers(texts: list[list[int]], count: int):
        cache = generate.empty_cache(config, spec, size, context)
        texts = texts + [[1]] * (size - len(texts))
        return generate.generate(config, params, cache, texts, count)

    start = time.perf_counter()
    for length in {*lengths}:
        for _ in answers([[1] * (length // 2 + 1)], 1 + generate.DISPATCH):
            pass
    warm, now = time.perf_counter() - start, Clock(clock)
    seen, coming = [Times(each.at) for each in arrivals], collections.deque(range(len(arrivals)))
    steps = useful = done = 0
    while coming:
        now.skip_to(arrivals[coming[0]].at)
        mine = []
        while coming and len(mine) < size and arrivals[coming[0]].at <= now():
            mine.append(coming.popleft())
        count = max(arrivals[index].output for index in mine)
        for new_nB, _ in answers([prompts[index] for index in mine], count):
            after = now()
            for index in mine:
                left = arrivals[index].output - len(seen[index].tokens)
                seen[index].tokens += [after] * min(left, len(new_nB))
        steps += count
        done += size * (max(lengths[index] for index in mine) + count)
        useful += sum(arrivals[index].prompt + arrivals[index].output for index in mine)
    return _summary(seen, now()) | {
        "rows": size, "warm_seconds": warm, "steps": steps, "useful": useful / done,
        "kv_bytes": size * spec.nbytes(config.layer_heads, context),
    }  # fmt: skip


def _summary(seen: list[Times], seconds: float) -> dict[str, Any]:
    made = sum(len(each.tokens) for each in seen)
    first = [each.tokens[0] - each.at for each in seen]
    between = [gap for each in seen for gap in np.diff(each.tokens)] or [0.0]
    whole = [(each.tokens[-1] - each.at) / len(each.tokens) for each in seen]
    ms = lambda values: (np.quantile(values, [0.5, 0.95]) * 1e3).tolist()
    return {
        "output_tokens": made, "serving_seconds": seconds, "tokens_per_second": made / seconds, "first_ms_50_95": ms(first),
        "between_ms_50_95": ms(between), "per_token_ms_50_95": ms(whole),
    }  # fmt: skip


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def job(
    model: Model,
    spec: CacheSpec,
    trace: str,
    arrivals: Sequence[Arrival],
    shorten: int,
    blocks: int,
    limits: Limits,
    size: int,
    clock: str,
) -> Job:
    """The measurement of one trace: by the engine, and, with a `size`, in batches of so many with a full cache in rows."""
    about = {
        "kind": "simulate", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint, "cache": str(spec),
        "trace": trace, "shorten": shorten, "requests": len(arrivals), "prompt_tokens": sum(each.prompt for each in arrivals),
        "clock": clock, "seed": model.seed, "processor": processor.name(), "threads": processor.count(),
    }  # fmt: skip
    plan = {"pool": blocks, "most": dataclasses.astuple(limits), "batch": size}

    def run() -> list[Served]:
        prompts = tokens(arrivals, shorten, min(model.encoding.n_vocab, model.config.vocab), model.seed)
        found = [Served(**about, way="engine", **engine(model, spec, arrivals, prompts, blocks, limits, CLOCKS[clock]))]
        if size:
            rows = parse("full")
            served = batches(model, rows, arrivals, prompts, size, CLOCKS[clock])
            found.append(Served(**about | {"cache": str(rows)}, way=f"batches of {size}", **served))
        return found

    return Job(about | plan, "eval/speed", run, f"{spec}, {trace}")


def table(found: Sequence[Served]) -> Table:
    """Ways to serve one trace, side by side."""
    pair = lambda values: f"{values[0]:,.0f}, {values[1]:,.0f}"
    columns = [
        Column("way", "way"), CACHE, Column("tok/s", "tokens_per_second", "{:,.1f}"),
        Column("first token, ms (50, 95 %)", lambda r: pair(r.first_ms_50_95)), Column("between, ms", lambda r: pair(r.between_ms_50_95)),
        Column("ms per token", lambda r: pair(r.per_token_ms_50_95)), Column("useful", "useful", "{:.0%}"), Column("steps", "steps"),
        Column("found", "found"), Column("stopped", "stopped"), Column("waste", "waste", "{:.1%}"), Column("compiles", "compiles"),
        Column("KV, MB", lambda r: f"{r.kv_bytes / 1e6:,.1f}"),
    ]  # fmt: skip
    first = found[0]
    length = f"{first.prompt_tokens:,} tokens of prompts, {first.output_tokens:,} generated"
    title = f"{first.name}, {first.trace}: {first.requests} requests, {length}, {first.clock} clock"
    return Table.of(title, columns, found)
