"""How fast a model prefills and decodes behind a cache, what a step must read from memory, and peers timed in turns with it."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvcascade.cache.block_cache import BlockCache
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.whole import Cache
from kvcascade.eval.measure import Job
from kvcascade.eval.memory.arithmetic import full_bytes
from kvcascade.eval.records import Bench, BenchFailed, BenchRow, grouped, of
from kvcascade.eval.speed.peers import Peer, PeerFailed
from kvcascade.eval.table import CACHE, Column, Table
from kvcascade.kernels import processor
from kvcascade.kernels.slots import payload
from kvcascade.model import generate
from kvcascade.model.config import ModelConfig
from kvcascade.model.generate import DISPATCH, State
from kvcascade.model.gpt import Params
from kvcascade.model.pretrained import Model

WARM = DISPATCH  # decode steps before those that are timed
APART = 0.1
"""How far measurements of the memory's bandwidth may be apart, as a share of the largest."""


def bandwidth() -> float:
    """Bytes per second that this device reads from its memory: the median of seven sums over 512 MiB, after a first one."""
    x = jnp.arange(2**27, dtype=jnp.float32).reshape(4096, -1)
    jax.block_until_ready(_total(x))
    return x.nbytes / statistics.median(seconds(lambda: _total(x)) for _ in range(7))


_total = jax.jit(lambda x: x.sum(-1))


class Ours:
    """A model behind a cache at one batch and context, compiled and warm; it decodes on until it is prefilled anew."""

    loop = f"generate, {DISPATCH} tokens to a dispatch"

    def __init__(self, model: Model, spec: CacheSpec, prompts: list[list[int]], room: int, steps: int):
        self._model, self._spec, self._prompts, self._room = model, spec, prompts, room
        self._state: State | None = None
        before = _traces()
        self.first_seconds = self.prefill() + sum(self.decode(WARM + steps, True))
        self.decode(1, False)
        self.traces = _traces() - before

    def prefill(self) -> float:
        """Seconds from the prompts to each row's first token."""
        config, params = self._model.config, self._model.params
        self._state = None  # two caches would be held otherwise
        cache = jax.block_until_ready(generate.empty_cache(config, self._spec, len(self._prompts), self._room))
        start = time.perf_counter()
        self._state = jax.block_until_ready(generate.begin(config, params, cache, self._prompts))
        return time.perf_counter() - start

    def decode(self, steps: int, loop: bool) -> list[float]:
        """Seconds of each greedy step, going on where the last one ended.

        In the `loop` of `generate`, where those of a dispatch share its time; else one by one, each of whose tokens is waited for.
        """
        config, params = self._model.config, self._model.params
        seconds, start = [], time.perf_counter()
        assert self._state is not None
        if loop:
            for new_nB, state in generate.go_on(config, params, self._state, steps):
                now, self._state = time.perf_counter(), state
                seconds, start = [*seconds, *[(now - start) / len(new_nB)] * len(new_nB)], now
            return seconds
        for _ in range(steps):
            start = time.perf_counter()
            tokens_nB, self._state = generate.decode_steps(config, params, self._state, 1, most=DISPATCH)
            np.asarray(tokens_nB)
            seconds.append(time.perf_counter() - start)
        return seconds

    def about(self) -> dict[str, Any]:
        """What is known of it besides its times; the bytes are those of its cache as it is now."""
        config, params = self._model.config, self._model.params
        read = weight_bytes(config, params)
        assert self._state is not None
        if int(self._state.token_B.min()) < 0:
            raise BadInput(f"{self._model.name}: the model's logits are not numbers")
        return {
            "weights": config.weights,
            "cache": str(self._spec),
            "kv_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self._state.cache)) // len(self._prompts),
            "kv_bytes_full": full_bytes(config, self._room),
            "weight_bytes": read,
            "step_bytes": read + occupied_bytes(self._state.cache, int(self._state.position_B.min())),
            "traces": self.traces,
        }


def weight_bytes(config: ModelConfig, params: Params) -> int:
    """Bytes of the parameters that each decode step reads whole: all but tables of which it takes a row per token."""
    return sum(leaf.nbytes for leaf in read_whole(config, params))


def read_whole(config: ModelConfig, params: Params) -> list:
    """The parameters that each decode step reads whole."""
    tables = ("position",) if config.tied else ("position", "embed")
    return [leaf for name, part in params.items() if name not in tables for leaf in jax.tree.leaves(part)]


def occupied_bytes(cache: Cache, tokens: int) -> int:
    """Bytes of a cache's slots that hold a token, all rows together, which have so many behind them."""
    total = 0.0
    if isinstance(cache, BlockCache):
        for shared in (each for each in cache.shared if each):
            pool = cache.pools[shared.pool]
            blocks, layers, _, size = payload(pool.k).shape[:4]
            one = sum(leaf.nbytes for leaf in jax.tree.leaves(pool)) / (blocks * layers * size)
            total += len(cache.table_RW) * min(tokens, shared.limit) * one
    for slots in (slots for layer in cache.layers for slots in layer.slots):
        held = float((slots.pos_BKS >= 0).mean())
        total += held * sum(leaf.nbytes for leaf in jax.tree.leaves(slots))
    return round(total)


@dataclasses.dataclass
class Round:
    """Seconds of a prefill, where the round began with one, and of the steps in a library's own loop and one by one."""

    prefill: list[float]
    loop: list[float]
    alone: list[float]


@dataclasses.dataclass
class Timed:
    """One of ours or a peer, with its rounds so far, or with why it has none."""

    who: Ours | Peer
    rounds: list[Round] = dataclasses.field(default_factory=list)
    reason: str = ""

    def attempt(self, call: Callable, *arguments: object) -> None:
        """Call unless it failed before; a peer's failure is kept."""
        try:
            if not self.reason:
                call(*arguments)
        except PeerFailed as failed:
            self.reason = str(failed)

    def turn(self, prefill: bool, steps: int) -> None:
        """A round: the prompts where they are due, and steps both ways, of which the first few are not kept."""
        first = [self.who.prefill()] if prefill else []
        self.rounds.append(Round(first, self.who.decode(WARM + steps, True)[WARM:], self.who.decode(steps, False)))

    def record(self, batch: int, context: int, kept: list[int]) -> dict[str, Any]:
        """What it is and how fast in the rounds that are kept."""
        known = self.who.about()
        if self.reason:
            return known | {"reason": self.reason}
        rounds = [self.rounds[index] for index in kept]
        prefill, loop, alone = (sum((getattr(r, part) for r in rounds), []) for part in ("prefill", "loop", "alone"))
        first, step = statistics.median(prefill), statistics.median(loop)
        if isinstance(self.who, Ours):
            steps = WARM + len(rounds[0].loop)
            known |= {
                "loop": Ours.loop,
                "compile_seconds": round(max(0.0, self.who.first_seconds - first - steps * step), 2),
            }
        return known | {
            "first_token_ms": first * 1e3,
            "first_token_ms_range": [min(prefill) * 1e3, max(prefill) * 1e3],
            "prefill_tokens_per_second": batch * context / first,
            "step_ms": step * 1e3,
            "step_ms_mean": statistics.mean(loop) * 1e3,
            "step_ms_5_95": (np.quantile(loop, [0.05, 0.95]) * 1e3).tolist(),
            "alone_ms": statistics.median(alone) * 1e3,
            "alone_ms_5_95": (np.quantile(alone, [0.05, 0.95]) * 1e3).tolist(),
            "decode_tokens_per_second": batch / step,
        }


def job(
    models: list[Model],
    specs: list[CacheSpec],
    peers: list[Peer],
    batch: int,
    context: int,
    steps: int,
    repeats: int,
    prefills: int,
) -> Job:
    """The measurement of all caches and peers at one batch and context."""
    about = {
        "kind": "bench", "model": models[0].name, "weights_keys": [model.fingerprint for model in models],
        "caches": [str(spec) for spec in specs], "peers": [peer.name for peer in peers], "batch": batch, "context": context, "steps": steps,
        "repeats": repeats, "prefills": prefills, "processor": processor.name(), "threads": processor.count(),
    }  # fmt: skip
    run = lambda: bench(models, specs, peers, batch, context, steps, repeats, prefills)
    return Job(about, "eval/speed", run, f"batch {batch}, context {context}")


def bench(
    models: list[Model],
    specs: list[CacheSpec],
    peers: list[Peer],
    batch: int,
    context: int,
    steps: int,
    repeats: int,
    prefills: int,
) -> list[BenchRow]:
    """Records of each cache at one batch and context, and of each peer: rounds in turns, so that noise of the machine hits all.

    A round is `WARM` steps and `steps` that are timed in each library's own loop, and as many one by one. The first `prefills` of the
    `repeats` rounds begin with the prompts, the others go on where the round before ended. The memory's bandwidth is measured before and
    after each: there are more rounds, with prompts, until `repeats` of them are `agreeing`, but at most twice as many in all; where that is
    not enough, all are kept and the records are not `steady`. `models` are one model with its weights in several formats; all get the same
    prompts, and whoever begins a round ends the next. A peer that cannot do this has a `reason` in its record instead of times.
    """
    length, prompts = room(context, steps, repeats, prefills), random_prompts(models[0], batch, context)
    ours = [Ours(model, spec, prompts, length, steps) for model in models for spec in specs]
    entries = [Timed(who) for who in (*ours, *peers)]
    for entry in entries[len(ours) :]:
        entry.attempt(entry.who.prepare, prompts, length, max(one.first_seconds for one in ours))  # pyright: ignore
    rates, kept, steady = [], [], False
    before = bandwidth()
    while not steady and len(rates) < 2 * repeats:
        index = len(rates)
        turn = index % len(entries)
        for entry in entries[turn:] + entries[:turn]:
            entry.attempt(entry.turn, index < prefills or index >= repeats, steps)
        after = bandwidth()
        rates.append((before, after))
        before, kept = after, agreeing(rates)
        begun = sum(index < prefills or index >= repeats for index in kept)
        steady = len(kept) >= repeats and begun >= min(prefills, repeats)
    kept = kept if steady else [*range(len(rates))]
    measured = [rate for index in kept for rate in rates[index]]
    shared: dict[str, Any] = {
        "model": models[0].name, "batch": batch, "context": context, "last_position": length - 1, "steps": steps,
        "repeats": repeats, "prefills": sum(index < prefills or index >= repeats for index in kept), "rounds": len(rates), "kept": len(kept),
        "steady": steady, "seed": models[0].seed, "bandwidth": statistics.median(measured), "bandwidth_range": [min(measured), max(measured)],
    }  # fmt: skip
    kind = lambda entry: BenchFailed if entry.reason else Bench
    return [kind(entry)(**shared | entry.record(batch, context, kept)) for entry in entries]


def random_prompts(model: Model, batch: int, context: int) -> list[list[int]]:
    """Tokens from the model's seed that the tokeniser and the embedding both have."""
    draw = np.random.default_rng(model.seed)
    return draw.integers(0, min(model.encoding.n_vocab, model.config.vocab), (batch, context)).tolist()


def agreeing(rates: list[tuple[float, float]]) -> list[int]:
    """The most rounds whose bandwidths, before and after them, are all within APART of the largest."""
    within = lambda most: [i for i, each in enumerate(rates) if (1 - APART) * most <= min(each) and max(each) <= most]
    return max((within(max(each)) for each in rates), key=len)


def room(context: int, steps: int, repeats: int, prefills: int) -> int:
    """Tokens per row that a cache must take: the prompt and the steps of as many rounds as go on from one prefill."""
    return context + (2 * steps + WARM) * max(1, repeats - prefills + 1)


def _traces() -> int:
    return sum(step._cache_size() for step in (generate.begin_step, generate.decode_steps))  # pyright: ignore


def seconds(call: Callable) -> float:
    """Seconds of a call, until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


HEADLINE = "Decoding in each library's own loop, ours over the quickest variant of a library"
CASE = Column("batch × context", lambda r: f"{r.batch} × {r.context:,}")
PRUNING = ("kvpress",)
"""Libraries that keep a part of the tokens: their like among ours are caches that do so too."""


def table(found: list[BenchRow]) -> Table:
    """Of one model: times with their spread, bytes per step against the memory's bandwidth, ratios to each library."""
    timed, first = of(found, Bench), found[0]
    read = lambda r: r.speed and f"{r.speed / 1e9:.1f}, {r.speed / r.bandwidth:.0%}"
    mean = [Column("mean", "step_ms_mean", "{:.2f}")] if any(r.step_ms_mean for r in timed) else []
    columns = [
        CACHE, Column("weights", "weights"), CASE, Column("KV, MB/row", lambda r: r.kv_bytes and r.kv_bytes / 1e6, "{:,.2f}"),
        Column("first token, ms", "first_token_ms", "{:,.0f}"),
        Column("prefill, tok/s", "prefill_tokens_per_second", "{:,.0f}"), Column("decode, tok/s", "decode_tokens_per_second", "{:,.1f}"),
        Column("loop, ms (5–95 %)", lambda r: _spread(r.step_ms, r.step_ms_5_95)), *mean,
        Column("alone, ms (5–95 %)", lambda r: _spread(r.alone, r.alone_ms_5_95)),
        Column("read, MB", lambda r: r.step_bytes and r.step_bytes / 1e6, "{:,.1f}"), Column("GB/s", read), Column("memory, GB/s", _memory),
        *(Column(f"× {library}", lambda r, library=library: _ratios(r, timed, library)) for library in _libraries(found)),
    ]  # fmt: skip
    names = "; ".join(dict.fromkeys(r.peer for r in found if r.peer))
    peers = f"; × a library: prefill, loop, alone, over its quickest variant in each ({names})" if names else ""
    prefills = [r.prefills for r in found if r.prefills]
    times = f", {_from_to(prefills)} prefills" if prefills else ""
    rates = _from_to(r.bandwidth / 1e9 for r in found)
    title = f"{first.model}, {first.steps} steps × {first.repeats} rounds{times}, memory read at {rates} GB/s{peers}"
    return Table.of(title, columns, timed)


def notes(found: list[BenchRow]) -> list[str]:
    """A line for each peer that could not do a case, in its own words."""
    return [f"{r.cache} at {CASE.cell(r)}: {r.reason}" for r in of(found, BenchFailed)]


def headline(found: list[BenchRow]) -> Table:
    """Decoding as each library's own loop does it, the best of ours over the best of each library's; and the same among weights of as many bits.

    Of ours those that keep all tokens, against a library that keeps a part of them the others. No rows without a peer that was timed.
    """
    libraries, rows = _libraries(found), []
    quickest = lambda some: max(some, key=lambda r: r.decode_tokens_per_second, default=None)
    for case in grouped(of(found, Bench), lambda r: (r.batch, r.context)):
        for bits in (None, *sorted({r.bits for r in case if not r.library}, reverse=True)):
            alike = [r for r in case if bits in (None, r.bits)]
            ours = [r for r in alike if not r.library]
            whole = [r for r in ours if r.cache.startswith("full")]
            parts = [r for r in ours if r not in whole]
            best = quickest(whole or ours)
            told = {}
            for library in libraries:
                mine = quickest((parts if library in PRUNING else whole) or ours)
                theirs = quickest([r for r in alike if r.library == library])
                told[library] = mine and theirs and _against(mine, theirs)
            if best and any(told.values()):
                rows.append((best, "best" if bits is None else f"{bits} bits", told))
    shown = lambda row: f"{row[0].decode_tokens_per_second:,.1f} ({row[0].cache}, {row[0].weights})"
    columns = [
        CASE._replace(value=lambda row: CASE.cell(row[0])), Column("weights", lambda row: row[1]), Column("ours, tok/s", shown),
        *(Column(f"× {library}", lambda row, library=library: row[2][library]) for library in libraries),
    ]  # fmt: skip
    return Table.of(HEADLINE, columns, rows)


def _against(mine: Bench, theirs: Bench) -> str:
    name = theirs.cache.removeprefix(f"{theirs.library} ")
    return f"{mine.decode_tokens_per_second / theirs.decode_tokens_per_second:.2f} ({name}{_unsteady(mine)})"


def _libraries(found: list[BenchRow]) -> list[str]:
    return list(dict.fromkeys(r.library for r in found if r.library))


def _ratios(record: Bench, found: list[Bench], library: str) -> str | None:
    """Of prefill, loop and step alone, each of a library's quickest in the same case over a record's."""
    case = (library, record.batch, record.context)
    peers = [r for r in found if (r.library, r.batch, r.context) == case]
    times = (lambda r: r.first_token_ms, lambda r: r.step_ms, lambda r: r.alone)
    return ", ".join(f"{min(map(time, peers)) / time(record):.2f}" for time in times) if peers else None


def _spread(median: int | float, ends: Sequence[int | float] | None) -> str:
    return f"{median:.2f}" + (f" ({ends[0]:.2f}–{ends[1]:.2f})" if ends else "")


def _memory(record: Bench) -> str:
    """What the memory gave before and after the rounds, and whether that changed."""
    return _from_to(rate / 1e9 for rate in record.bandwidth_range or [record.bandwidth]) + _unsteady(record)


def _unsteady(record: Bench) -> str:
    return ", unsteady" if record.steady is False else ""


def _from_to(values: Iterable[int | float]) -> str:
    low, *_, high = sorted(2 * [round(value) for value in values])
    return f"{low}" if low == high else f"{low}–{high}"
