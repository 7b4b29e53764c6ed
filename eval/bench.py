"""How fast a model prefills and decodes behind a cache, what a step must read from memory, and peers timed in turns with it."""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvcascade.cache.cascade import Cache
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.eval.records import Record, full_bytes
from kvcascade.kernels.write import argmin
from kvcascade.model import generate
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.pretrained import Model, locate

WARM = 3  # decode steps before those that are timed


@dataclasses.dataclass
class Round:
    """Seconds of one prefill, up to and with its first token, and of each decode step after it."""

    prefill: float
    steps: list[float]


def bandwidth() -> float:
    """Bytes per second that this device reads from its memory: the best of seven sums over 512 MiB."""
    x = jnp.arange(2**27, dtype=jnp.float32).reshape(4096, -1)
    total = jax.jit(lambda x: x.sum(-1))
    return x.nbytes / min(_seconds(lambda: total(x)) for _ in range(8))


def ours(model: Model, spec: CacheSpec, batch: int, context: int, steps: int) -> tuple[Callable[[], Round], Record]:
    """A function that does a round, compiled and warm, and what is known of it before: bytes, compile time, traces."""
    config, params = model.config, model.params
    prompts = np.random.default_rng(model.seed).integers(0, model.encoding.n_vocab, (batch, context)).tolist()
    tokens_BT, positions_BT = map(jnp.asarray, generate.pad(prompts))
    likeliest = jax.jit(lambda logits_BV: argmin(-logits_BV))
    caches: list[Cache] = []

    def run(count: int = steps) -> Round:
        cache = jax.block_until_ready(generate.empty_cache(config, spec, batch, context + steps))
        start = time.perf_counter()
        logits_BV, cache = generate.prefill(config, params, cache, tokens_BT, positions_BT)
        token_B = jax.block_until_ready(likeliest(logits_BV))
        prefill, seconds = time.perf_counter() - start, []
        for index in range(count):
            position_B = jnp.full(batch, context + index)
            start = time.perf_counter()
            logits_BV, cache = generate.decode_step(config, params, cache, token_B, position_B)
            token_B = jax.block_until_ready(likeliest(logits_BV))
            seconds.append(time.perf_counter() - start)
        caches[:] = [cache]
        return Round(prefill, seconds[WARM:])

    before = _traces()
    first = _seconds(lambda: run(WARM))
    traces = _traces() - before
    warm = _seconds(lambda: run(WARM))
    return run, {
        "kind": "bench",
        "model": model.name,
        "weights": config.weights,
        "cache": str(spec),
        "batch": batch,
        "context": context,
        "kv_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(caches[0])) // batch,
        "kv_bytes_full": full_bytes(config, context),
        "weight_bytes": weight_bytes(config, params),
        "step_bytes": weight_bytes(config, params) + occupied_bytes(caches[0]),
        "compile_seconds": round(first - warm, 2),
        "traces": traces,
        "seed": model.seed,
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
    for slots in (slots for layer in cache for slots in layer.slots):
        held = float((slots.pos_BKS >= 0).mean())
        total += held * sum(leaf.nbytes for leaf in jax.tree.leaves(slots))
    return round(total)


class Peer:
    """transformers in an interpreter that has it, with the same weights; BadInput if it cannot be started."""

    def __init__(self, python: Path, model: str):
        script = Path(__file__).with_name("peer_transformers.py")
        try:
            self.process = subprocess.Popen(
                [str(python), str(script), str(locate(model))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise BadInput(f"cannot run the peer's Python {python}: {error.strerror}") from error
        self.name = self._read()["name"]

    def ask(self, batch: int, context: int, steps: int) -> Round:
        """One round, the same as ours."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it wrote before it ended says why
            print(json.dumps([batch, context, steps]), file=self.process.stdin, flush=True)
        found = self._read()
        return Round(found["prefill"], found["steps"][WARM:])

    def close(self) -> None:
        """End its process."""
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.__exit__(None, None, None)

    def _read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = json.loads(line) if line.startswith("{") else {}
        if "error" in found or not found:
            self.close()
            raise BadInput(
                f"the peer failed: {found.get('error', 'it ended without a word; are torch and transformers there?')}"
            )
        return found


def bench(
    model: Model, specs: list[CacheSpec], batch: int, context: int, steps: int, repeats: int, peer: Peer | None
) -> list[Record]:
    """Records of each cache at one batch and context, and of the peer: rounds in turns, so that noise of the machine hits all."""
    rounds: dict[int, list[Round]] = {}
    entries = [ours(model, spec, batch, context, steps + WARM) for spec in specs]
    if peer is not None:
        run = lambda: peer.ask(batch, context, steps + WARM)
        run()
        shared = {key: entries[0][1][key] for key in ("kind", "batch", "context", "seed")}
        entries.append(
            (run, shared | {"model": model.name, "weights": "float32", "cache": "transformers", "peer": peer.name})
        )
    for _ in range(repeats):
        for index, (run, _) in enumerate(entries):
            rounds.setdefault(index, []).append(run())
    found = []
    for index, (_, record) in enumerate(entries):
        prefill = [each.prefill for each in rounds[index]]
        every = np.sort([step for each in rounds[index] for step in each.steps])
        low, median, high = np.quantile(every, [0.05, 0.5, 0.95])
        found.append(
            record
            | {
                "steps": steps,
                "repeats": repeats,
                "first_token_ms": statistics.median(prefill) * 1e3,
                "first_token_ms_range": [min(prefill) * 1e3, max(prefill) * 1e3],
                "prefill_tokens_per_second": batch * context / statistics.median(prefill),
                "step_ms": median * 1e3,
                "step_ms_5_95": [low * 1e3, high * 1e3],
                "decode_tokens_per_second": batch / median,
            }
        )
    return found


def _traces() -> int:
    return sum(step._cache_size() for step in (generate.prefill, generate.decode_step))  # pyright: ignore


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def table(found: list[Record]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of one model: speeds with their spread, bytes per step against the memory's bandwidth, the ratio to the peer."""
    peers = {(r["batch"], r["context"]): r for r in found if "peer" in r}
    columns = [
        "cache", "weights", "batch", "context", "prefill, tok/s", "decode, tok/s", *(["× peer: prefill, decode"] if peers else []),
        "of bandwidth", "step, ms", "5…95 %", "MB read", "first token, ms",
    ]  # fmt: skip
    rows = []
    for r in found:
        low, high = r["step_ms_5_95"]
        ratios, share, size = "", "", ""
        if "peer" not in r:
            size = f"{r['step_bytes'] / 1e6:,.1f}"
            share = f"{r['step_bytes'] / r['bandwidth'] * 1e3 / r['step_ms']:.0%}"
            if peer := peers.get((r["batch"], r["context"])):
                keys = ("prefill_tokens_per_second", "decode_tokens_per_second")
                ratios = ", ".join(f"{r[key] / peer[key]:.2f}" for key in keys)
        rows.append([
            r["cache"], r["weights"], str(r["batch"]), f"{r['context']:,}", f"{r['prefill_tokens_per_second']:,.0f}",
            f"{r['decode_tokens_per_second']:,.1f}", *([ratios] if peers else []), share, f"{r['step_ms']:.2f}",
            f"{low:.2f}…{high:.2f}", size, f"{r['first_token_ms']:,.0f}",
        ])  # fmt: skip
    first = found[0]
    peer = "".join(f"; peer: {name}" for name in dict.fromkeys(r["peer"] for r in peers.values()))
    title = f"{first['model']}, {first['steps']} steps × {first['repeats']} rounds, memory read at {first['bandwidth'] / 1e9:.1f} GB/s{peer}"
    return title, columns, rows
