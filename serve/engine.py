"""An engine: requests come and go, and each step of one compiled program serves them all from one pool of blocks."""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kvcascade.cache.block_cache import BlockCache
from kvcascade.cache.blocks import Blocks
from kvcascade.cache.errors import BadInput
from kvcascade.cache.prefix import namespace
from kvcascade.cache.retention import Retention
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.tier import BLOCK
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.programs import Compiled, traced
from kvcascade.model.sampling import GREEDY, NOT_A_NUMBER, Sampling, Settings, sample, settings
from kvcascade.serve.plan import Limits, Queue, Row, Run, check, end, fork, plan

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Tokens of a step's programs; there is one more for the most that a step may have."""


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("cache", "seen_RV"))
def step(
    config: ModelConfig,
    params: Params,
    cache: BlockCache,
    seen_RV: Bool[Array, "R V"],
    token_N: Int[Array, " N"],
    position_N: Int[Array, " N"],
    row_N: Int[Array, " N"],
    out_O: Int[Array, " O"],
    table_RW: Int[Array, "R W"],
    by: Settings,
) -> tuple[Int[Array, " O"], Float[Array, " O"], Float[Array, "O V"], BlockCache, Bool[Array, "R V"]]:
    """Put tokens of any rows into their blocks, and draw what follows those of the numbers `out`; -1 is padding everywhere.

    Returns the tokens drawn, their log-probabilities as the model has them, and the logits.
    """
    rows = seen_RV.shape[0]
    seen_RV = seen_RV.at[jnp.where(row_N < 0, rows, row_N), token_N].set(True, mode="drop")
    cache = dataclasses.replace(cache, table_RW=table_RW, row_B=row_N)
    model = nnx.merge(gpt.graph(config)[0], params)
    x_NTM, cache = model.hidden(token_N[:, None], position_N[:, None], cache)
    at_O = out_O.clip(0)
    logits_OV = model.logits(x_NTM[at_O])[:, 0].astype(jnp.float32)
    token_O = sample(logits_OV, position_N[at_O] + 1, by, seen_RV[row_N[at_O].clip(0)])
    chosen_O1 = jnp.take_along_axis(logits_OV, token_O.clip(0)[:, None], 1)
    logprob_O = chosen_O1[:, 0] - jax.nn.logsumexp(logits_OV, -1)
    return token_O, logprob_O, logits_OV, dataclasses.replace(cache, row_B=None), seen_RV


@functools.partial(jax.jit, donate_argnames="cache")
def copy(cache: BlockCache, source_C: Int[Array, " C"], target_C: Int[Array, " C"]) -> BlockCache:
    """Copy whole blocks, all read before one is written; a target past the end is none."""
    put = lambda x: x.at[target_C].set(x[source_C], mode="drop")
    return dataclasses.replace(cache, pools=jax.tree.map(put, cache.pools))


@functools.partial(jax.jit, donate_argnames="seen_RV")
def mark(seen_RV: Bool[Array, "R V"], row: Int[Array, ""], tokens_V: Bool[Array, " V"]) -> Bool[Array, "R V"]:
    """Say which tokens a row has had."""
    return seen_RV.at[row].set(tokens_V)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt that is continued."""

    prompt: Sequence[int]
    count: int
    """Tokens that are generated at most."""
    sampling: Sampling = GREEDY
    continuations: int = 1
    """Rows that go on from the one prompt; they draw by seeds one after the other."""
    stops: frozenset[int] = frozenset()
    """Tokens after which a row is over."""
    priority: int = 0
    """The lowest goes first."""
    retention: tuple[Retention, ...] = ()
    """How long blocks of its prompt are kept when it is over."""
    salt: str = ""
    """Only requests of the same salt share prefixes."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A token of a row, or its end."""

    id: int
    token: int | None
    logprob: float | None
    finished: str = ""
    """Why it is over: stop, length, error or cancelled."""


@dataclasses.dataclass
class Live:
    """What the engine knows of a row besides what is planned with."""

    row: Row
    sampling: Sampling
    stops: frozenset[int]
    prompt: int
    hit: int = -1
    """Tokens of the prompt that were there already, when it first began."""


class Engine:
    """Requests over one model and one pool; whoever has it calls `run_step` until nothing is left.

    The cache must be wholly on blocks. Every result is what the request alone would have got, whatever else runs: a row's tokens are
    attended to as they are stored, and it draws by its own seed and positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        spec: CacheSpec,
        blocks: int,
        limits: Limits | None = None,
        context: int | None = None,
        size: int = BLOCK,
        reuse: bool = True,
        fingerprint: str = "",
        compiled: Compiled = traced,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.config, self.params, self.limits, self.clock = config, params, limits or Limits(), clock
        self.context = self.config.context if context is None else context
        generate.check_context(self.config, self.context)
        layers = spec.layers(self.config.layer_heads)
        if any(cascade.shared is None or cascade.own for cascade, _ in layers):
            raise BadInput(
                f"the engine has caches that are wholly on blocks, such as `full@int8 on blocks`, not {spec}"
            )
        self.blocks, self.reuse = Blocks(blocks, size), reuse
        self.cache = BlockCache.empty(layers, self.limits.rows, self.context, blocks, size)
        self.queue = Queue.of(self.limits)
        self.stats: collections.Counter[str] = collections.Counter()
        self.live: dict[int, Live] = {}
        self._about = {"model": fingerprint, "weights": config.weights, "spec": str(spec), "size": size}
        self._ids = itertools.count()
        self._table = np.full(self.cache.table_RW.shape, -1, np.int32)
        self._seen = jnp.zeros((self.limits.rows, self.config.vocab), bool)
        most = self.limits.tokens
        self.buckets = sorted({n for n in BUCKETS if n < most} | {most})
        self._compiled, self._programs = compiled, {}

    def submit(self, request: Request) -> list[int]:
        """Take a request in; return the numbers of its rows. BadInput for one that could never end."""
        sampling, prompt = request.sampling, list(request.prompt)
        seeds = [(sampling.seed + index) % 2**32 for index in range(request.continuations)]
        space = namespace(**self._about, salt=request.salt)
        limit, forks = len(prompt) + request.count, request.continuations - 1
        row = Row(next(self._ids), prompt, limit, self.clock(), request.priority, space, request.retention, forks)
        check(row, self.blocks, self.limits)
        generate.check_context(self.config, limit)
        if limit > self.context:
            raise BadInput(f"{limit} tokens are more than the engine's context of {self.context}")
        if not all(0 <= token < self.config.vocab for token in prompt):
            raise BadInput(f"a prompt's tokens are numbers from 0 to {self.config.vocab - 1}")
        ids = [row.id, *(next(self._ids) for _ in range(forks))]
        for each, seed in zip(ids, seeds, strict=True):
            own = dataclasses.replace(sampling, seed=seed)
            self.live[each] = Live(row, own, request.stops, len(prompt))
        self.queue.waiting.append(row)
        return ids

    def cancel(self, number: int) -> Event | None:
        """Take a row out at once; None if it is over already. Of a request whose prompt is not through all rows end."""
        live = self.live.get(number)
        if live is None:
            return None
        end(self.queue, self.blocks, live.row, self.clock())
        for each in [each for each, other in self.live.items() if other.row is live.row]:
            del self.live[each]
        self.stats["cancelled"] += 1
        return Event(number, None, None, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether somebody runs or waits."""
        return bool(self.live)

    def run_step(self) -> list[Event]:
        """Plan a step, run it, and say what it brought."""
        now = self.clock()
        found = plan(self.queue, self.blocks, self.limits, now, self.reuse)
        self.stats["stopped"] += len(found.stopped)
        for row in found.begun:
            self._begin(row)
        if not found.runs:
            return []
        self._copy(found.copies)
        token_O, logprob_O, outs = self._run(found.runs)
        events, place = [], 0
        for run in found.runs:
            table = run.row.table
            assert table is not None
            table.computed = run.stop
            count = outs[run.row.id]
            if count:
                ids = self._rows_of(run.row)
                more = fork(self.queue, self.blocks, run.row, ids[1:])
                for row in more:
                    self.live[row.id].row = row
                    self._mark(row)
                for row in (run.row, *more):
                    events.append(self._drawn(row, int(token_O[place]), float(logprob_O[place]), now))
                    place += 1
        return events

    def _rows_of(self, row: Row) -> list[int]:
        """The numbers of the rows that go on from a row, itself the first."""
        return [row.id] if not row.forks else [each for each, live in self.live.items() if live.row is row]

    def _begin(self, row: Row) -> None:
        """Note what a row finds."""
        assert row.table is not None
        live = self.live[row.id]
        live.hit = row.table.computed if live.hit < 0 else live.hit
        self.stats.update(begun=1, found=row.table.computed)
        self._mark(row)

    def _mark(self, row: Row) -> None:
        """Note what a row has had, if it is held against that."""
        if self.live[row.id].sampling.repetition_penalty != 1:
            had = np.zeros(self.config.vocab, bool)
            had[row.tokens] = True
            self._seen = mark(self._seen, np.int32(row.place), had)

    def _copy(self, copies: dict[int, int]) -> None:
        """A row copies one block at most: the last of a prompt that it shares with others, before it writes on in it."""
        if copies:
            self.stats["copied"] += len(copies)
            target = np.full(self.limits.rows, self.blocks.count, np.int32)
            source = np.zeros(self.limits.rows, np.int32)
            target[: len(copies)], source[: len(copies)] = [*copies], [*copies.values()]
            self.cache = copy(self.cache, source, target)

    def _run(self, runs: list[Run]) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
        """Run the program for so many tokens; what was drawn, and how many of it is each row's."""
        outs = {run.row.id: (1 + run.row.forks) * (run.stop == len(run.row.tokens)) for run in runs}
        total, drawn = sum(run.stop - run.start for run in runs), sum(outs.values())
        size = next(n for n in self.buckets if n >= total and min(n, self.limits.rows) >= min(drawn, self.limits.rows))
        token, position, row = np.zeros(size, np.int32), np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        out, by, at = np.full(min(size, self.limits.rows), -1, np.int32), [], 0
        for run in runs:
            some = slice(at, at + run.stop - run.start)
            assert run.row.table is not None
            token[some], position[some], row[some] = (
                run.row.tokens[run.start : run.stop],
                range(run.start, run.stop),
                run.row.place,
            )
            line = self._table[run.row.place]
            line[: len(run.row.table.blocks)], line[len(run.row.table.blocks) :] = run.row.table.blocks, -1
            at = some.stop
            if outs[run.row.id]:
                ids = self._rows_of(run.row)
                out[len(by) : len(by) + len(ids)] = at - 1
                by += [self.live[each].sampling for each in ids]
        by = settings([*by, *[GREEDY] * (len(out) - len(by))], len(out))
        arguments = self.params, self.cache, self._seen, token, position, row, out, self._table, by
        token_O, logprob_O, _, self.cache, self._seen = self._program(arguments)(*arguments)
        self.stats.update(steps=1, tokens=total, padded=size - total, drawn=drawn)
        return np.asarray(token_O), np.asarray(logprob_O), outs

    def _program(self, arguments) -> Callable:
        size = len(arguments[3])
        if size not in self._programs:
            self.stats["compiled"] += 1
            self._programs[size] = self._compiled(step, self.config, *arguments)
        return self._programs[size]

    def _drawn(self, row: Row, token: int, logprob: float, now: float) -> Event:
        """A row's next token, or its end."""
        live, table = self.live[row.id], row.table
        assert table is not None
        if token == NOT_A_NUMBER:
            reason = "error"
        else:
            row.tokens.append(token)
            self.blocks.publish(table, row.tokens, now)
            reason = "stop" if token in live.stops else "length" if len(row.tokens) == row.limit else ""
        if reason:
            end(self.queue, self.blocks, row, now)
            del self.live[row.id]
            self.stats["over"] += 1
        return Event(row.id, None if reason == "error" else token, logprob, reason)

    def warm(self) -> float:
        """Compile all programs, with steps of padding alone; the seconds that it took."""
        start = time.perf_counter()
        for size in self.buckets:
            none = np.full(size, -1, np.int32)
            out = np.full(min(size, self.limits.rows), -1, np.int32)
            by = settings([GREEDY] * len(out), len(out))
            arguments = self.params, self.cache, self._seen, np.zeros(size, np.int32), none, none, out, self._table, by
            _, _, _, self.cache, self._seen = self._program(arguments)(*arguments)
        none = np.full(self.limits.rows, self.blocks.count, np.int32)
        self.cache = copy(self.cache, np.zeros_like(none), none)
        jax.block_until_ready(self.cache)
        return time.perf_counter() - start

    def check(self) -> None:
        """AssertionError if a block is lost, or counted wrong."""
        self.blocks.check([row.table for row in self.queue.running if row.table])
