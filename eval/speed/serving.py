"""A trace of requests served by the engine, by what an engine's steps are known to take, or by `generate` in batches as they come."""

import collections
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from kvcascade.cache.blocks import Blocks
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec, parse
from kvcascade.cache.tier import BLOCK
from kvcascade.eval.measure import Job
from kvcascade.eval.records import Served
from kvcascade.eval.speed.server import Server
from kvcascade.eval.table import CACHE, Column, Table
from kvcascade.kernels import processor
from kvcascade.model import generate
from kvcascade.model.pretrained import Model
from kvcascade.model.programs import kept
from kvcascade.serve.costs import Costs, Replay, attended
from kvcascade.serve.draft import Draft
from kvcascade.serve.engine import Engine
from kvcascade.serve.plan import Limits, Row, check
from kvcascade.serve.propose import Propose, proposer
from kvcascade.serve.request import Request, Runs
from kvcascade.serve.rows import device_for
from kvcascade.serve.trace import Arrival, tokens

VOCAB = 2**15
"""Tokens that prompts are drawn from where there is no model."""


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
    model: Model,
    spec: CacheSpec,
    arrivals: Sequence[Arrival],
    prompts,
    blocks: int,
    limits: Limits,
    clock,
    propose: Propose | None = None,
    draft: Draft | None = None,
) -> dict[str, Any]:
    """Serve a trace by the engine; BadInput, before anything is compiled, for a request that the pool cannot hold."""
    steps: list[tuple[int, int, float]] = []

    context = max(each.tokens for each in arrivals)
    device = device_for(
        model.config,
        model.params,
        spec,
        blocks,
        limits,
        context,
        fingerprint=model.fingerprint,
        compiled=kept,
        draft=draft,
    )
    check_longest(arrivals, device.pool(), limits)
    run = device.run

    def timed(found, draws, tell):
        start = clock()
        drawn = run(found, draws, tell)
        steps.append((drawn.size, attended(found), clock() - start))
        return drawn

    device.run = timed  # pyright: ignore[reportAttributeAccessIssue]
    warm = device.warm()
    compiled = device.compiled()
    found = serve(device, arrivals, prompts, clock, propose)
    costs = Costs.of(steps)
    return found | {
        "warm_seconds": warm, "compiles": device.compiled() - compiled, "programs": tuple(costs.programs.items()), "attended": costs.attended,
        "kv_bytes": device.nbytes,
    }  # fmt: skip


def check_longest(arrivals: Sequence[Arrival], blocks: Blocks, limits: Limits) -> None:
    """BadInput for a request that the engine would refuse in the middle of a trace."""
    longest = max(arrivals, key=lambda each: each.tokens)
    check(Row(0, [0] * longest.prompt, longest.tokens), blocks, limits)


def replay(served: Served, arrivals: Sequence[Arrival], prompts, blocks: int, limits: Limits) -> dict[str, Any]:
    """Serve a trace by what the steps of an engine took; BadInput for steps of more tokens than it had."""
    costs = Costs(dict(served.programs or ()), served.attended or 0.0)
    if not costs.programs or limits.tokens > (served.step_tokens or 0):
        raise BadInput(f"what is known is what steps of up to {served.step_tokens} tokens take, not of {limits.tokens}")
    if not all(each.shared and not each.own for each in parse(served.cache).cascades):
        raise BadInput(f"what steps take is known of caches wholly on blocks alone, not of {served.cache}")
    context = max(each.tokens for each in arrivals)
    device = Replay(costs, blocks, BLOCK, VOCAB, context, limits)
    check_longest(arrivals, device.pool(), limits)
    kv_bytes = (served.kv_bytes or 0) // (served.blocks or 1) * blocks
    return serve(device, arrivals, prompts, device.clock) | {"warm_seconds": 0.0, "kv_bytes": kv_bytes}


def serve(
    device: Runs, arrivals: Sequence[Arrival], prompts: Iterable[list[int]], clock, propose: Propose | None = None
) -> dict[str, Any]:
    """Let an engine take a trace's requests in as they come, until all are over; `clock` is what its steps take time of."""
    now = Clock(clock)
    ours = Engine(device, clock=now, propose=propose)
    rows, coming, seen = {}, collections.deque(arrivals), []
    texts, wasted, users = iter(prompts), [], 0
    while coming or ours.busy:
        if coming and not ours.busy:
            now.skip_to(coming[0].at)
        while coming and coming[0].at <= now():
            each = coming.popleft()
            (number,) = ours.submit(Request(next(texts), each.output))
            rows[number] = Times(each.at)
            seen.append(rows[number])
        events, after = ours.run_step(), now()
        for event in events:
            if event.finished == "error":
                raise BadInput(
                    "the logits of a request are not numbers: something is wrong with the model, or its cache"
                )
            rows[event.id].tokens.append(after)
            if event.finished:
                del rows[event.id]
        users = max(users, len(ours.queue.running))
        held, inside = ours.filled()
        wasted += [1 - inside / held] if held else []
    stats, accepted = ours.stats, sum(ours.accepted)
    again = stats["again"] + stats["drafted"] - accepted
    return _summary(seen, now()) | {
        "blocks": ours.blocks.count, "rows": device.limits.rows, "step_tokens": device.limits.tokens, "steps": stats["steps"], "users": users,
        "useful": (stats["tokens"] - again) / max(1, stats["tokens"] + stats["padded"]), "found": stats["found"],
        "stopped": stats["stopped"], "aside": device.limits.aside, "put_aside": stats["put_aside"], "copied": stats["copied"],
        "evicted": ours.blocks.evictions, "waste": float(np.mean(wasted or [0.0])),
    } | ({"drafted": stats["drafted"], "accepted": tuple(ours.accepted)} if ours.accepted else {})  # fmt: skip


def batches(model: Model, spec: CacheSpec, arrivals: Sequence[Arrival], prompts, size: int, clock) -> dict[str, Any]:
    """Serve a trace by `generate`: up to so many requests that have come, filled up with rows that mean nothing, and the next when the longest is over."""
    context = min(max(each.tokens for each in arrivals) + generate.DISPATCH, model.config.context)
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
        useful += sum(arrivals[index].tokens for index in mine)
    return _summary(seen, now()) | {
        "rows": size, "warm_seconds": warm, "steps": steps, "useful": useful / done,
        "kv_bytes": size * spec.nbytes(config.layer_heads, context),
    }  # fmt: skip


def _summary(seen: list[Times], seconds: float) -> dict[str, Any]:
    made = sum(len(each.tokens) for each in seen)
    first = [each.tokens[0] - each.at for each in seen]
    between = [gap for each in seen for gap in np.diff(each.tokens)] or [0.0]
    whole = [(each.tokens[-1] - each.at) / len(each.tokens) for each in seen]
    ms = lambda values: tuple((np.quantile(values, np.linspace(0, 1, 21)) * 1e3).tolist())
    return {
        "output_tokens": made, "serving_seconds": seconds, "tokens_per_second": made / seconds, "first_ms": ms(first),
        "between_ms": ms(between), "per_token_ms": ms(whole),
    }  # fmt: skip


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True)
class Trace:
    """Requests, and what tells them from others."""

    name: str
    arrivals: Sequence[Arrival]
    shorten: int
    seed: int

    def prompts(self, vocab: int) -> Iterator[list[int]]:
        """The tokens of each prompt, made when they are asked for."""
        return tokens(self.arrivals, self.shorten, vocab, self.seed)

    @property
    def about(self) -> dict[str, Any]:
        """What a record says of it."""
        total = sum(each.prompt for each in self.arrivals)
        key = hashlib.sha256(repr([dataclasses.astuple(each) for each in self.arrivals]).encode()).hexdigest()[:16]
        return {
            "trace": self.name,
            "trace_key": key,
            "shorten": self.shorten,
            "requests": len(self.arrivals),
            "prompt_tokens": total,
            "seed": self.seed,
        }


def job(
    model: Model,
    spec: CacheSpec,
    trace: Trace,
    blocks: int,
    limits: Limits,
    size: int,
    clock: str,
    speculate: str = "none",
    draft: Draft | None = None,
) -> Job:
    """The measurement of one trace: by the engine, and, with a `size`, in batches of so many with a full cache in rows."""
    about = trace.about | {
        "kind": "simulate", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint, "cache": str(spec),
        "clock": clock, "processor": processor.name(), "threads": processor.count(),
    }  # fmt: skip
    plan = {"pool": blocks, "most": [limits.tokens, limits.rows, limits.aside], "batch": size}
    plan |= {"speculate": speculate, "ahead": limits.ahead} if limits.ahead else {}
    plan |= {"draft": draft.fingerprint} if draft else {}

    def run() -> list[Served]:
        vocab = min(model.encoding.n_vocab, model.config.vocab)
        propose = proposer(speculate)
        how = CLOCKS[clock], propose, draft
        made = engine(model, spec, trace.arrivals, trace.prompts(vocab), blocks, limits, *how)
        way = "engine" if propose is None else f"engine, {speculate} {limits.ahead}"
        found = [Served(**about, way=way, **made)]
        if size:
            rows = parse("full")
            served = batches(model, rows, trace.arrivals, [*trace.prompts(vocab)], size, CLOCKS[clock])
            found.append(Served(**about | {"cache": str(rows)}, way=f"batches of {size}", **served))
        return found

    return Job(about | plan, "eval/speed", run, f"{spec}, {trace.name}", also=("serve",))


def server_job(model: Model, server: Server, trace: Trace, clients: int = 0) -> Job:
    """The same trace, by a server that has the same model and is asked as requests come; it uses the processors of this machine, or its own."""
    about = trace.about | {
        "kind": "simulate", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint, "cache": server.name,
        "clock": "wall", "processor": processor.name(), "threads": processor.count(),
    }  # fmt: skip

    about |= {"clients": clients} if clients else {}

    def run() -> list[Served]:
        prompts = [*trace.prompts(min(model.encoding.n_vocab, model.config.vocab))]
        answers = server.serve(trace.arrivals, prompts, clients)
        seen = [Times(got.sent, got.tokens) for got in answers]
        made = about | _summary(seen, max(got.tokens[-1] for got in answers))
        if known := [got.found for got in answers if got.found is not None]:
            made |= {"found": sum(known)}
        return [Served(way="server", **made)]

    return Job(about | {"url": server.url}, "eval/speed", run, f"{server.name}, {trace.name}")


def replay_job(served: Served, trace: Trace, blocks: int, limits: Limits) -> Job:
    """What a trace would come to on the machine of a record, by the costs that it has."""
    kept = ("model", "weights", "weights_key", "cache", "clock")
    costs = f"{served.given.get('processor')}, {served.given.get('threads')} threads"
    about = trace.about | {"kind": "simulate", "costs": costs}
    about |= {name: served.given[name] for name in kept if name in served.given}
    plan = {
        "pool": blocks,
        "most": [limits.tokens, limits.rows],
        "took": [served.programs, served.attended, served.kv_bytes],
    }

    def run() -> list[Served]:
        made = replay(served, trace.arrivals, trace.prompts(VOCAB), blocks, limits)
        return [Served(**about, way="costs", **made)]

    return Job(about | plan, "eval/speed", run, f"{served.cache}, {trace.name}", also=("serve",))


def table(found: Sequence[Served]) -> Table:
    """Ways to serve one trace, side by side."""
    pair = lambda values: f"{values[10]:,.0f}, {values[19]:,.0f}"
    columns = [
        Column("way", "way"), CACHE, Column("tok/s", "tokens_per_second", "{:,.1f}"),
        Column("first token, ms (50, 95 %)", lambda r: pair(r.first_ms)), Column("between, ms", lambda r: pair(r.between_ms)),
        Column("ms per token", lambda r: pair(r.per_token_ms)), Column("useful", "useful", "{:.0%}"), Column("steps", "steps"),
        Column("accepted", lambda r: r.drafted and sum(r.accepted or ()) / r.drafted, "{:.0%}"), Column("found", "found"),
        Column("stopped", "stopped"), Column("put aside", "put_aside"), Column("waste", "waste", "{:.1%}"),
        Column("compiles", "compiles"), Column("users at once", "users"), Column("rows", "rows"), Column("blocks", "blocks"),
        Column("KV, MB", lambda r: r.kv_bytes and r.kv_bytes / 1e6, "{:,.1f}"),
    ]  # fmt: skip
    first = found[0]
    length = f"{first.prompt_tokens:,} tokens of prompts, {first.output_tokens:,} generated"
    clients = f", {first.clients} clients" if first.clients else ""
    title = f"{first.name}, {first.trace}: {first.requests} requests, {length}, {first.clock} clock{clients}"
    return Table.of(title, columns, found)
