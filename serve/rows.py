"""The device side of an engine whose rows keep slots of their own: one program for a chunk of a prompt, and one for each number of rows that generate."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kvcascade.cache import block_cache, rows
from kvcascade.cache.block_cache import BlockCache
from kvcascade.cache.blocks import Blocks
from kvcascade.cache.errors import BadInput
from kvcascade.cache.rows import Lines, State
from kvcascade.cache.snapshots import Snapshots
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.whole import Cache
from kvcascade.model import generate, gpt, sampling
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.sampling import Settings
from kvcascade.serve.device import Device, draw, likeliest
from kvcascade.serve.draft import Draft, Follower
from kvcascade.serve.plan import Plan, Row, Run, sizes
from kvcascade.serve.request import Draw, Drawn, Likely


def device_for(
    config: ModelConfig, params: Params, spec: CacheSpec, *arguments: Any, draft: Draft | None = None, **named: Any
) -> Device:
    """What an engine with such a cache runs on, a smaller model beside it if there is one; arguments as of `Device`."""
    kind = Device if Device.holds(spec.groups(config.layer_heads)) else RowDevice
    device = kind(config, params, spec, *arguments, **named)
    if draft:
        device.follower = Follower(draft, device.limits, device.context, device.compile_by)
    return device


type Found = tuple[Int[Array, " O"], Float[Array, " O"], Float[Array, "O V"], Cache, Bool[Array, "R V"]]
"""Tokens drawn, their log-probabilities as the model has them, all logits; the cache, and the tokens that rows have had."""


class Next(NamedTuple):
    """A row's next token."""

    token: int
    logprob: float
    likely: Likely


def _on(cache: Cache, table_RW: Int[Array, "R W"]) -> Cache:
    return dataclasses.replace(cache, table_RW=table_RW) if isinstance(cache, BlockCache) else cache


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("cache", "seen_RV"))
def lines(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    seen_RV: Bool[Array, "R V"],
    token_N: Int[Array, " N"],
    position_N: Int[Array, " N"],
    line_RA: Int[Array, "R A"],
    table_RW: Int[Array, "R W"],
    by: Settings,
    restrictions: sampling.Restrictions,
) -> Found:
    """Put tokens of some rows into their tiers, and draw what follows each; of a row's tokens those after the first are foreseen, and leave
    nothing where they are not what is drawn. `line` says where each row's tokens are; -1: it has no more."""
    count = len(seen_RV)
    call = Lines.of(_on(cache, table_RW), line_RA, len(token_N))
    row_N = call.row_N
    seen_RV = seen_RV.at[jnp.where(row_N < 0, count, row_N), token_N].set(True, mode="drop")
    model = nnx.merge(gpt.graph(config)[0], params)
    x_N1M, call = model.hidden(token_N[:, None], position_N[:, None], call)
    logits_NV = model.logits(x_N1M)[:, 0].astype(jnp.float32)
    drawn_N, logprob_N = draw(logits_NV, position_N + 1, by, seen_RV[row_N.clip(0)], restrictions)
    each = lambda x_N, none: jnp.where(line_RA < 0, none, x_N[line_RA.clip(0)])
    right_RA = each(drawn_N, -3)[:, :-1] == each(token_N, -2)[:, 1:]
    kept_R = (line_RA[:, 0] >= 0) * (1 + jnp.cumprod(right_RA, 1, dtype=jnp.int32).sum(1))
    return drawn_N, logprob_N, logits_NV, call.accept(kept_R, position_N), seen_RV


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("cache", "seen_RV"))
def chunk(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    seen_RV: Bool[Array, "R V"],
    token_T: Int[Array, " T"],
    position_T: Int[Array, " T"],
    row: Int[Array, ""],
    table_RW: Int[Array, "R W"],
    by: Settings,
    restrictions: sampling.Restrictions,
) -> Found:
    """Put a chunk of a row's prompt into its tiers, and draw what follows its last token; position -1 is padding."""
    there_T = jnp.where(position_T < 0, seen_RV.shape[1], token_T)
    seen_RV = seen_RV.at[row, there_T].set(True, mode="drop")
    model = nnx.merge(gpt.graph(config)[0], params)

    def work(one: Cache) -> tuple[Array, Cache]:
        prompting = (dataclasses.replace(each, prompting=each.cascade.front > 0) for each in one.layers)
        one = dataclasses.replace(one, layers=tuple(prompting))
        x_1TM, one = model.hidden(token_T[None], position_T[None], one)
        return x_1TM, one.answering()

    x_1TM, cache = rows.within(_on(cache, table_RW), row, work)
    last = position_T.argmax()
    logits_1V = model.logits(x_1TM[:, last][:, None])[:, 0].astype(jnp.float32)
    drawn = draw(logits_1V, position_T[last][None] + 1, by, seen_RV[row][None], restrictions)
    return *drawn, logits_1V, cache, seen_RV


@jax.jit
def redraw(
    logits_1V: Float[Array, "1 V"],
    position: Int[Array, ""],
    by: Settings,
    seen_V: Bool[Array, " V"],
    restrictions: sampling.Restrictions,
) -> tuple[Int[Array, " O"], Float[Array, " O"]]:
    """What several rows draw that go on from one place."""
    count = len(by.seed_B)
    every = lambda x: jnp.broadcast_to(x, (count, *x.shape[-1:]))
    return draw(every(logits_1V), jnp.full(count, position), by, every(seen_V), restrictions)


take = jax.jit(rows.take)
put = jax.jit(rows.put, donate_argnames="cache")


class RowDevice(Device):
    """A model, and caches of which some tiers or all are in slots of each row; in front of them there may be a pool."""

    def _empty(self, spec: CacheSpec) -> Cache:
        if spec.rereads:
            raise BadInput(f"{spec} reads a prompt twice, and here it enters in parts of {self.limits.chunk} tokens")
        heads, count = self.config.layer_heads, self.limits.rows
        groups = spec.groups(heads)
        if self.holds(groups):
            raise BadInput(f"caches with slots of a row's own are meant here, and {spec} is wholly on blocks")
        self.limit = block_cache.limit(groups, self.context)
        # Where a layer has nothing on blocks, its own slots have all tokens.
        self.enough = self.limit if all(each.cascade.shared for each in groups) else 0
        if not self.limit:
            self.blocks = 2
            cache = generate.empty_cache(self.config, spec, count, self.context)
        else:
            cache = BlockCache.empty(groups, count, self.context, self.blocks, self.size, spec.bases(groups))
        self._waits = [cascade.pending for each in groups if (cascade := each.cascade.own)]
        # Copies: where there is one row only, they would be the cache's own buffers, which steps are given away.
        self._nothing: State = [np.array(x[:1]) for x in rows.state(cache)]
        return cache.answering()

    def __init__(self, *arguments: Any, **named: Any):
        """BadInput for a cache that is wholly on blocks, and for one that must have a prompt whole."""
        super().__init__(*arguments, **named)
        self.about["chunk"] = self.limits.chunk
        self.snapshots = Snapshots(self.limits.snapshots, self.limits.chunk)

    def pool(self) -> Blocks:
        """What counts its blocks, nobody having one."""
        return Blocks(self.blocks, self.size, limit=self.limit, enough=self.enough)

    def _prepare(self, found: Plan) -> None:
        for move in found.out:
            move.row.state = [np.asarray(x) for x in take(self.cache, np.int32(move.place))]
        super()._prepare(found)
        for row in found.begun:
            content, row.state = self._nothing if row.state is None else row.state, None
            self.cache = put(self.cache, np.int32(row.place), content)

    def run(self, found: Plan, draws: Mapping[int, Sequence[Draw]], tell: bool) -> Drawn:
        """As `Device.run`: the chunks of prompts one after the other, then the rows that generate at once."""
        self._prepare(found)
        drawn, size = {}, 0
        for run in (each for each in found.runs if each.prompts):
            drawn[run.row.id] = self._chunk(run, draws.get(run.row.id, ()), tell)
            size += self.limits.chunk
        if generating := [each for each in found.runs if not each.prompts]:
            total = sum(run.stop - run.start for run in generating)
            bucket = next(count for count in self._buckets if count >= total)
            drawn |= self._lines(generating, bucket, [each for run in generating for each in draws[run.row.id]], tell)
            size += bucket
        every = [each for run in found.runs for each in drawn[run.row.id]]
        told = [each.likely for each in every]
        return Drawn([each.token for each in every], [each.logprob for each in every], told, size)

    @property
    def _buckets(self) -> list[int]:
        return sizes(min(self.limits.rows * (1 + self.room(0)), self.limits.tokens))

    def room(self, position: int) -> int:
        """As `Device.room`: of tokens that wait no slot is taken before those that wait are handed over."""
        return min([self.limits.ahead, *(max(1, count) - 1 - position % max(1, count) for count in self._waits)])

    @property
    def _none(self) -> Int[np.ndarray, "R A"]:
        """The lines of rows that have none."""
        return np.full((self.limits.rows, 1 + self.room(0)), -1, np.int32)

    def _chunk(self, run: Run, by: Sequence[Draw], tell: bool) -> list[Next]:
        """A chunk of a prompt, and the next token of each row that goes on from its end; what the row has then is known from now on."""
        row, count, size = run.row, run.stop - run.start, self.limits.chunk
        token, position = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        token[:count], position[:count] = row.tokens[run.start : run.stop], range(run.start, run.stop)
        token_O, logprob_O, logits_1V = self._called("chunk", chunk, token, position, np.int32(row.place), by[:1], 1)
        if len(by) > 1:
            how = self._how(by, self.limits.rows)
            arguments = logits_1V, np.int32(run.stop), how[0], self._seen[row.place], how[1]
            token_O, logprob_O = map(np.asarray, redraw(*arguments))
        begun = row.tokens[: run.stop]
        if self.snapshots and run.stop > self.enough and self.snapshots.lacks(row.space, begun):
            content = [np.asarray(x) for x in take(self.cache, np.int32(row.place))]
            self.snapshots.keep(row.space, begun, content, sum(x.nbytes for x in content))
        told = self._likely(logits_1V, 1)[0] if tell and by else ()
        return [Next(int(token_O[index]), float(logprob_O[index]), told) for index in range(len(by))]

    def _lines(self, runs: Sequence[Run], bucket: int, by: Sequence[Draw], tell: bool) -> dict[int, list[Next]]:
        """A token of each of some rows and what is foreseen to follow it, and the next one of each."""
        token, position, line = np.zeros(bucket, np.int32), np.full(bucket, -1, np.int32), self._none
        starts = [*itertools.accumulate((run.stop - run.start for run in runs), initial=0)]
        for run, start, stop in zip(runs, starts, starts[1:], strict=False):
            token[start:stop], position[start:stop] = run.tokens, range(run.start, run.stop)
            line[run.row.place, : stop - start] = range(start, stop)
        token_N, logprob_N, logits_NV = self._called(bucket, lines, token, position, line, by, bucket)
        told = self._likely(logits_NV, len(by)) if tell else [()] * len(by)
        every = [*itertools.starmap(Next, zip(token_N.tolist(), logprob_N.tolist(), told, strict=False))]
        return {run.row.id: every[start:stop] for run, start, stop in zip(runs, starts, starts[1:], strict=False)}

    def _bound(self, name: int | str, work: Callable, token, position, row, by: Sequence[Draw], count: int):
        arguments = self.params, self.cache, self._seen, token, position, row, self._table, *self._how(by, count)
        return self._named(name, work, *arguments), arguments

    def _called(self, *asked):
        program, arguments = self._bound(*asked)
        token_O, logprob_O, logits_OV, self.cache, self._seen = program(*arguments)
        return np.asarray(token_O), np.asarray(logprob_O), logits_OV

    def fork(self, row: Row, more: Row) -> None:
        """Let a row begin where another one is, which has the same blocks."""
        self.cache = put(self.cache, np.int32(more.place), take(self.cache, np.int32(row.place)))

    def places(self, row: Row) -> Int[np.ndarray, "L K T"] | None:
        """`Cache.places` of its tokens."""
        return self.cache.places(row.place, row.table.computed)

    def quicker(self, blocks: int) -> bool:
        """What is in a row's own slots depends on how it came there, and is not computed again."""
        return True

    def _calls(self) -> list[tuple[Any, Any, Any, Any, Any, Any, Any]]:
        none = lambda count: np.full(count, -1, np.int32)
        of = lambda name, work, size, row, drawn: (name, work, np.zeros(size, np.int32), none(size), row, [], drawn)
        chunks = of("chunk", chunk, self.limits.chunk, np.int32(0), 1)
        return [chunks, *(of(count, lines, count, self._none, count) for count in self._buckets)]

    def _compile(self) -> None:
        for each in self._calls():
            self._bound(*each)

    def _try(self) -> None:
        for each in self._calls():
            *_, logits_OV = self._called(*each)
            likeliest(logits_OV)
        how = self._how([], self.limits.rows)
        redraw(jnp.zeros((1, self.vocab)), np.int32(0), how[0], self._seen[0], how[1])
        content = take(self.cache, np.int32(0))
        for each in (content, [np.asarray(x) for x in content], self._nothing):
            self.cache = put(self.cache, np.int32(0), each)
        if self.limit:
            self._copy({self.blocks: 0})
            self._moved(1)

    jitted: ClassVar[tuple[Any, ...]] = (*Device.jitted, take, put, redraw)
