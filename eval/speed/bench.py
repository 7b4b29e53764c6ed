"""How fast a model prefills and decodes behind a cache, what a step must read from memory, and peers timed in turns with it."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.whole import Cache
from kvcascade.eval.measure import Job
from kvcascade.eval.records import Record, full_bytes
from kvcascade.eval.speed.peers import Peer, PeerFailed
from kvcascade.kernels import processor
from kvcascade.model import generate
from kvcascade.model.config import ModelConfig
from kvcascade.model.generate import DISPATCH, State
from kvcascade.model.gpt import Params
from kvcascade.model.pretrained import Model

WARM = DISPATCH  # decode steps before those that are timed


def bandwidth() -> float:
    """Bytes per second that this device reads from its memory: the median of seven sums over 512 MiB, after a first one."""
    x = jnp.arange(2**27, dtype=jnp.float32).reshape(4096, -1)
    jax.block_until_ready(_total(x))
    return x.nbytes / statistics.median(seconds(lambda: _total(x)) for _ in range(7))


_total = jax.jit(lambda x: x.sum(-1))


class Ours:
    """A model behind a cache at one batch and context, compiled and warm; it decodes on until it is prefilled anew."""

    def __init__(self, model: Model, spec: CacheSpec, batch: int, context: int, room: int):
        self._model, self._spec, self._batch, self._context, self._room = model, spec, batch, context, room
        draw = np.random.default_rng(model.seed)
        self._prompts = draw.integers(0, model.encoding.n_vocab, (batch, context)).tolist()
        self._state: State | None = None
        before = _traces()
        self.first_seconds = self.prefill() + sum(self.decode(DISPATCH))
        self.traces = _traces() - before

    def prefill(self) -> float:
        """Seconds from the prompts to each row's first token."""
        config, params = self._model.config, self._model.params
        self._state = None  # two caches would be held otherwise
        cache = jax.block_until_ready(generate.empty_cache(config, self._spec, self._batch, self._room))
        start = time.perf_counter()
        self._state = jax.block_until_ready(generate.begin(config, params, cache, self._prompts))
        return time.perf_counter() - start

    def decode(self, steps: int, together: int = DISPATCH) -> list[float]:
        """Seconds of each greedy step, going on where the last one ended; so many are dispatched together, and share their time."""
        seconds = []
        while len(seconds) < steps:
            count = min(together, steps - len(seconds))
            start = time.perf_counter()
            config, params = self._model.config, self._model.params
            assert self._state is not None
            tokens_nB, self._state = generate.decode_steps(config, params, self._state, count, most=DISPATCH)
            jax.block_until_ready(tokens_nB)
            seconds += [(time.perf_counter() - start) / count] * count
        return seconds

    def about(self) -> Record:
        """What is known of it besides its times; the bytes are those of its cache as it is now."""
        config, params = self._model.config, self._model.params
        read = weight_bytes(config, params)
        assert self._state is not None
        if int(self._state.token_B.min()) < 0:
            raise BadInput(f"{self._model.name}: the model's logits are not numbers")
        return {
            "weights": config.weights,
            "cache": str(self._spec),
            "kv_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self._state.cache)) // self._batch,
            "kv_bytes_full": full_bytes(config, self._room),
            "weight_bytes": read,
            "step_bytes": read + occupied_bytes(self._state.cache),
            "traces": self.traces,
        }


def weight_bytes(config: ModelConfig, params: Params) -> int:
    """Bytes of the parameters that each decode step reads whole: all but tables of which it takes a row per token."""
    return sum(leaf.nbytes for leaf in read_whole(config, params))


def read_whole(config: ModelConfig, params: Params) -> list:
    """The parameters that each decode step reads whole."""
    tables = ("position",) if config.tied else ("position", "embed")
    return [leaf for name, part in params.items() if name not in tables for leaf in jax.tree.leaves(part)]


def occupied_bytes(cache: Cache) -> int:
    """Bytes of a cache's slots that hold a token, all rows together."""
    total = 0.0
    for slots in (slots for layer in cache.layers for slots in layer.slots):
        held = float((slots.pos_BKS >= 0).mean())
        total += held * sum(leaf.nbytes for leaf in jax.tree.leaves(slots))
    return round(total)


@dataclasses.dataclass
class Timed:
    """One of ours or a peer, with the seconds of its prefills and of its steps so far, or with why it has none."""

    who: Ours | Peer
    prefill: list[float] = dataclasses.field(default_factory=list)
    steps: list[float] = dataclasses.field(default_factory=list)
    alone: list[float] = dataclasses.field(default_factory=list)
    reason: str = ""

    def attempt(self, call: Callable, *arguments: object) -> None:
        """Call unless it failed before; a peer's failure is kept."""
        try:
            if not self.reason:
                call(*arguments)
        except PeerFailed as failed:
            self.reason = str(failed)

    def turn(self, prefill: bool, steps: int) -> None:
        """A round: the prompts where they are due, and steps, of which the first few are not kept."""
        if prefill:
            self.prefill.append(self.who.prefill())
        self.steps += self.who.decode(WARM + steps)[WARM:]
        # A peer hands out every token by itself anyway.
        self.alone += self.who.decode(steps, together=1) if isinstance(self.who, Ours) else self.steps[-steps:]

    def record(self, batch: int, context: int) -> Record:
        """What it is and how fast."""
        known = self.who.about()
        if self.reason:
            return known | {"reason": self.reason}
        first, step = statistics.median(self.prefill), statistics.median(self.steps)
        if isinstance(self.who, Ours):
            known["compile_seconds"] = round(max(0.0, self.who.first_seconds - first - DISPATCH * step), 2)
        low, high = np.quantile(self.steps, [0.05, 0.95]) * 1e3
        return known | {
            "first_token_ms": first * 1e3,
            "first_token_ms_range": [min(self.prefill) * 1e3, max(self.prefill) * 1e3],
            "prefill_tokens_per_second": batch * context / first,
            "step_ms": step * 1e3,
            "step_ms_5_95": [low, high],
            "alone_ms_50_90_99": (np.quantile(self.alone, [0.5, 0.9, 0.99]) * 1e3).tolist(),
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
) -> list[Record]:
    """Records of each cache at one batch and context, and of each peer: rounds in turns, so that noise of the machine hits all.

    A round is `WARM` steps, `steps` that are timed in dispatches of DISPATCH, and as many one by one. The first `prefills` of the
    `repeats` rounds begin with the prompts, the others go on where the round before ended. `models` are one model with its weights
    in several formats. A peer that cannot do this has a `reason` in its record instead of times.
    """
    length = room(context, steps, repeats, prefills)
    entries = [Timed(Ours(model, spec, batch, context, length)) for model in models for spec in specs]
    for peer in peers:
        entries.append(Timed(peer))
        entries[-1].attempt(peer.prepare, batch, context, length)
    rates = []
    for index in range(repeats):
        rates.append(bandwidth())
        for entry in entries:
            entry.attempt(entry.turn, index < prefills, steps)
    shared = {
        "kind": "bench", "model": models[0].name, "batch": batch, "context": context, "last_position": length - 1, "steps": steps,
        "repeats": repeats, "prefills": min(prefills, repeats), "seed": models[0].seed, "bandwidth": statistics.median(rates),
    }  # fmt: skip
    return [shared | entry.record(batch, context) for entry in entries]


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


SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second")


def table(found: list[Record]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of one model: speeds with their spread, bytes per step against the memory's bandwidth, ratios to each library."""
    libraries = list(dict.fromkeys(r["library"] for r in found if "library" in r))
    columns = [
        "cache", "weights", "batch × context", "KV, MB/row", "first token, ms", "prefill, tok/s", "decode, tok/s",
        "step, ms", "alone: 50, 90, 99 %", "MB read, of bandwidth", *(f"× {library}" for library in libraries),
    ]  # fmt: skip
    rows = []
    for r in found:
        cells = [r["cache"], r.get("weights", ""), f"{r['batch']} × {r['context']:,}"]
        if "reason" in r:
            rows.append([f"{cells[0]}: {r['reason']}", *cells[1:], *[""] * (len(columns) - len(cells))])
            continue
        read = (
            "step_bytes" in r
            and f"{r['step_bytes'] / 1e6:,.1f}, {r['step_bytes'] / r['bandwidth'] * 1e3 / r['step_ms']:.0%}"
        )
        size = r.get("kv_bytes")
        rows.append([
            *cells, f"{size / 1e6:,.2f}" if size else "", f"{r['first_token_ms']:,.0f}", f"{r['prefill_tokens_per_second']:,.0f}",
            f"{r['decode_tokens_per_second']:,.1f}", f"{r['step_ms']:.2f}", ", ".join(f"{x:.2f}" for x in r["alone_ms_50_90_99"]),
            read or "", *(_ratios(r, _like(r, found, library)) for library in libraries),
        ])  # fmt: skip
    first = found[0]
    names = list(dict.fromkeys(r["peer"] for r in found if "peer" in r))
    peers = f"; × a library: prefill, decode, over its quickest variant here ({'; '.join(names)})" if names else ""
    rates = [r["bandwidth"] / 1e9 for r in found]
    title = f"{first['model']}, {first['steps']} steps × {first['repeats']} rounds, memory read at {min(rates):.0f} to {max(rates):.0f} GB/s{peers}"
    return title, columns, rows


def _like(record: Record, found: list[Record], library: str) -> list[Record]:
    alike = lambda r: r.get("library") == library and "reason" not in r
    return [r for r in found if alike(r) and (r["batch"], r["context"]) == (record["batch"], record["context"])]


def _ratios(record: Record, peers: list[Record]) -> str:
    return ", ".join(f"{record[key] / max(r[key] for r in peers):.2f}" for key in SPEEDS) if peers else ""
