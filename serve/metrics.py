"""What Prometheus is told: vLLM's names and meanings, and what only we have, all under `kvcascade:`."""

import collections
import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from kvcascade.serve.engine import Engine
from kvcascade.serve.request import Event

FIRST = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024)


class Metrics:
    """Counters of one server; those of engines are labelled by their cache."""

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        make = lambda kind: (
            lambda name, about, labels=(), **more: kind(
                f"kvcascade:{name}", about, ("model_name", "cache", *labels), registry=self.registry, **more
            )
        )
        gauge, counter, histogram = make(Gauge), make(Counter), make(Histogram)
        self._model = model
        self.running = gauge("num_requests_running", "Rows that have begun and are not over.")
        self.waiting = gauge("num_requests_waiting", "Rows that wait for their turn.")
        self.usage = gauge("kv_cache_usage_perc", "Share of the blocks that rows use, from 0 to 1.")
        self.blocks = gauge("kv_blocks", "Blocks by state: free, used, or idle (nobody's, but known).", ("state",))
        self.bytes = gauge("kv_bytes_per_tier", "Bytes of a row's keys and values that there is room for.", ("tier",))
        self.compiled = gauge("programs", "Compiled programs.")
        self.compiles = counter("jit_compiles", "Programs that were compiled after warming up.")
        self.queries = counter("prefix_cache_queries", "Tokens of prompts that were looked for.")
        self.hits = counter("prefix_cache_hits", "Tokens of prompts that were found.")
        self.preempted = counter("num_preemptions", "Times that a row had to stop for others.")
        self.moved = counter("preemptions", "The same by what became of its keys and values.", ("mode", "reason"))
        self.copies = counter("kv_cow_copies", "Blocks that were copied before they were written.")
        self.evicted = counter("kv_evicted_blocks", "Known blocks whose room was needed.")
        self.drafted = counter("spec_decode_num_draft_tokens", "Tokens that were foreseen, and computed along.")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Those that were drawn.")
        self.placed = counter(
            "spec_decode_num_accepted_tokens_per_pos", "The same by their places in their drafts.", ("position",)
        )
        self.prompted = counter("prompt_tokens", "Tokens of prompts.")
        self.generated = counter("generation_tokens", "Tokens that were generated.")
        self.over = counter("request_success", "Rows that are over, by why.", ("finished_reason",))
        self.refused = counter("refusals", "Requests that were not taken in, by why.", ("reason",))
        self.step = histogram("iteration_tokens_total", "Tokens of a step.", buckets=SIZES)
        self.first = histogram("time_to_first_token_seconds", "From a request's arrival.", buckets=FIRST)
        self.between = histogram("inter_token_latency_seconds", "Between two tokens of a row.", buckets=BETWEEN)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", buckets=WHOLE)
        self.queued = histogram("request_queue_time_seconds", "From arrival until its turn comes.", buckets=WHOLE)
        self.prefill = histogram("request_prefill_time_seconds", "From its turn to its first token.", buckets=WHOLE)
        self.decode = histogram("request_decode_time_seconds", "From its first token to its last.", buckets=WHOLE)
        self.config = Info("kvcascade:cache_config", "What is served.", ("model_name", "cache"), registry=self.registry)
        self.sharing: set[str] = set()
        """Caches whose prompts are looked for."""
        self._before: dict[str, collections.Counter] = {}
        self._programs: dict[str, int] = {}

    def text(self) -> bytes:
        """What /metrics answers."""
        return generate_latest(self.registry)

    def serving(self, name: str, engine: Engine, tiers: Mapping[str, int], about: Mapping[str, str]) -> None:
        """An engine is ready: its tiers' bytes, and that nothing has happened yet."""
        mine = self._model, name
        self.config.labels(*mine).info(dict(about))
        for tier, size in tiers.items():
            self.bytes.labels(*mine, tier).set(size)
        counters = (
            self.compiles,
            self.queries,
            self.hits,
            self.preempted,
            self.copies,
            self.evicted,
            self.drafted,
            self.accepted,
            self.prompted,
            self.generated,
        )
        for each in counters:
            each.labels(*mine)
        for mode in ("recompute", "aside"):
            self.moved.labels(*mine, mode, "blocks")
        for reason in ("stop", "length", "error", "cancelled"):
            self.over.labels(*mine, reason)
        for reason in REFUSALS:
            self.refused.labels(self._model, "", reason)
        if engine.blocks.enough or engine.limits.snapshots:
            self.sharing.add(name)

    def warm(self, engines: Mapping[str, Engine]) -> None:
        """All engines are: whatever is compiled from now on was not to be."""
        self._programs = {name: _compiled(engine) for name, engine in engines.items()}
        self.after(engines)

    def after(self, engines: Mapping[str, Engine]) -> None:
        """Take over what engines have counted since the last time."""
        for name, engine in engines.items():
            mine, stats = (self._model, name), engine.stats
            before = self._before.setdefault(name, collections.Counter())
            new = {key: stats[key] - before[key] for key in stats if stats[key] != before[key]}
            self._before[name] = collections.Counter(stats)
            self.running.labels(*mine).set(len(engine.queue.running))
            self.waiting.labels(*mine).set(len(engine.queue.waiting))
            self.hits.labels(*mine).inc(new.get("found", 0))
            aside = new.get("put_aside", 0)
            self.preempted.labels(*mine).inc(new.get("stopped", 0))
            self.moved.labels(*mine, "aside", "blocks").inc(aside)
            self.moved.labels(*mine, "recompute", "blocks").inc(max(0, new.get("stopped", 0) - aside))
            self.copies.labels(*mine).inc(new.get("copied", 0))
            self.drafted.labels(*mine).inc(new.get("drafted", 0))
            for place, count in enumerate(engine.accepted):
                more = count - before["accepted", place]
                self.placed.labels(*mine, str(place)).inc(more)
                self.accepted.labels(*mine).inc(more)
                self._before[name]["accepted", place] = count
            if new.get("steps"):
                self.step.labels(*mine).observe(new.get("tokens", 0))
            if engine.blocks.limit:
                states = engine.blocks.states()
                for state, count in states.items():
                    self.blocks.labels(*mine, state).set(count)
                self.usage.labels(*mine).set(states["used"] / (engine.blocks.count - 1))
                self.evicted.labels(*mine).inc(engine.blocks.evictions - before["evicted"])
                self._before[name]["evicted"] = engine.blocks.evictions
            programs = _compiled(engine)
            self.compiled.labels(*mine).set(programs)
            self.compiles.labels(*mine).inc(max(0, programs - self._programs[name]))
            self._programs[name] = max(programs, self._programs[name])

    def heard(self, name: str, arrival: float, prompt: int, clock: Callable[[], float] = time.monotonic) -> "Heard":
        """What hears the events of a row of a request that came then; `prompt`: its tokens, 0 for all rows of one prompt but the first."""
        return Heard(self, (self._model, name), arrival, prompt, clock)

    def refuse(self, reason: str) -> None:
        """A request was not taken in; REFUSALS has the reasons."""
        self.refused.labels(self._model, "", reason).inc()


class Heard:
    """A row, from its arrival to its end."""

    def __init__(
        self, metrics: Metrics, labels: tuple[str, str], arrival: float, prompt: int, clock: Callable[[], float]
    ):
        self._metrics, self._labels, self._prompt, self._clock = metrics, labels, prompt, clock
        self._arrival, self._first, self._last, self._over = arrival, 0.0, 0.0, False

    def __call__(self, event: Event) -> None:
        """A token, or the end."""
        metrics, mine, now = self._metrics, self._labels, self._clock()
        if event.token is not None and not self._over:
            metrics.generated.labels(*mine).inc()
            if self._first:
                metrics.between.labels(*mine).observe(now - self._last)
            else:
                self._first = now
                metrics.first.labels(*mine).observe(now - self._arrival)
                metrics.queued.labels(*mine).observe(max(0.0, event.began - self._arrival))
                metrics.prefill.labels(*mine).observe(now - event.began)
                metrics.prompted.labels(*mine).inc(self._prompt)
                if mine[1] in metrics.sharing:
                    metrics.queries.labels(*mine).inc(self._prompt)
            self._last = now
        if event.finished:
            self.end(event.finished)

    def end(self, reason: str) -> None:
        """It is over, for this reason; once."""
        if self._over:
            return
        self._over = True
        self._metrics.over.labels(*self._labels, reason).inc()
        self._metrics.whole.labels(*self._labels).observe(self._clock() - self._arrival)
        if self._first:
            self._metrics.decode.labels(*self._labels).observe(self._last - self._first)


REFUSALS = ("invalid", "key", "body", "queue", "per_key", "draining", "timeout")


def _compiled(engine: Engine) -> int:
    return engine.device.compiled() if hasattr(engine.device, "compiled") else 0  # pyright: ignore[reportAttributeAccessIssue]
