"""The device side of an engine: one compiled program for each number of tokens, over one pool of blocks."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kvcascade.cache import rows
from kvcascade.cache.block_cache import BlockCache
from kvcascade.cache.blocks import Blocks, Table
from kvcascade.cache.codec import has_high
from kvcascade.cache.errors import BadInput
from kvcascade.cache.groups import Group
from kvcascade.cache.snapshots import Snapshots
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.tier import BLOCK
from kvcascade.cache.whole import Cache
from kvcascade.model import generate, gpt, sampling
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.programs import Compiled, traced
from kvcascade.model.sampling import GREEDY, Sampling, Settings, sample, settings
from kvcascade.serve.plan import Limits, Move, Plan, Row, Run, sizes
from kvcascade.serve.request import TOP, Asked, Draw, Drawn, Likely

MOVED = 16
"""Blocks that go to host memory, or come back, by one program."""


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
    restrictions: sampling.Restrictions,
) -> tuple[Int[Array, " O"], Float[Array, " O"], Float[Array, "O V"], BlockCache, Bool[Array, "R V"]]:
    """Put tokens of any rows into their blocks, and draw what follows those of the numbers `out`; -1 is padding everywhere.

    Returns the tokens drawn, their log-probabilities as the model has them, and all logits.
    """
    rows = seen_RV.shape[0]
    seen_RV = seen_RV.at[jnp.where(row_N < 0, rows, row_N), token_N].set(True, mode="drop")
    cache = dataclasses.replace(cache, table_RW=table_RW, row_B=row_N)
    model = nnx.merge(gpt.graph(config)[0], params)
    x_NTM, cache = model.hidden(token_N[:, None], position_N[:, None], cache)
    at_O = out_O.clip(0)
    logits_OV = model.logits(x_NTM[at_O])[:, 0].astype(jnp.float32)
    drawn = draw(logits_OV, position_N[at_O] + 1, by, seen_RV[row_N[at_O].clip(0)], restrictions)
    return *drawn, logits_OV, dataclasses.replace(cache, row_B=None), seen_RV


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def guess(
    config: ModelConfig,
    params: Params,
    cache: BlockCache,
    seen_RV: Bool[Array, "R V"],
    token_N: Int[Array, " N"],
    position_N: Int[Array, " N"],
    row_N: Int[Array, " N"],
    count_A: Int[Array, " A"],
    table_RW: Int[Array, "R W"],
    by: Settings,
    restrictions: sampling.Restrictions,
) -> tuple[Int[Array, "A N"], BlockCache]:
    """As many tokens of each row as `count` is long, one after the other; of a cache that is `coarsely` the high plane of blocks alone is read.

    Their keys and values are written where those of the row's next tokens will be, over them.
    """
    model = nnx.merge(gpt.graph(config)[0], params)
    cache = dataclasses.replace(cache, table_RW=table_RW, row_B=row_N)

    def one(carry, _):
        cache, token_N, position_N = carry
        x_N1M, cache = model.hidden(token_N[:, None], position_N[:, None], cache)
        logits_NV = model.logits(x_N1M)[:, 0].astype(jnp.float32)
        token_N, _ = draw(logits_NV, position_N + 1, by, seen_RV[row_N.clip(0)], restrictions)
        return (cache, token_N, jnp.where(position_N < 0, -1, position_N + 1)), token_N

    (cache, _, _), token_AN = jax.lax.scan(one, (cache, token_N, position_N), count_A)
    return token_AN, dataclasses.replace(cache, row_B=None)


def draw(
    logits_OV: Float[Array, "O V"],
    position_O: Int[Array, " O"],
    by: Settings,
    seen_OV: Bool[Array, "O V"],
    restrictions: sampling.Restrictions,
) -> tuple[Int[Array, " O"], Float[Array, " O"]]:
    """Tokens at these positions, and their log-probabilities as the model has them, whatever may be drawn."""
    token_O = sample(sampling.restricted(logits_OV, restrictions), position_O, by, seen_OV)
    chosen_O1 = jnp.take_along_axis(logits_OV, token_O.clip(0)[:, None], 1)
    return token_O, chosen_O1[:, 0] - jax.nn.logsumexp(logits_OV, -1)


@jax.jit
def likeliest(logits_OV: Float[Array, "O V"]) -> tuple[Float[Array, "O N"], Int[Array, "O N"]]:
    """The log-probabilities and the numbers of the TOP likeliest tokens, or of all."""
    logprob_ON, token_ON = jax.lax.top_k(jax.nn.log_softmax(logits_OV), min(TOP, logits_OV.shape[1]))
    return logprob_ON, token_ON


def likely(logprob_N: np.ndarray, token_N: np.ndarray) -> Likely:
    """A row of `likeliest`."""
    return tuple(zip(token_N.tolist(), logprob_N.tolist(), strict=True))


@functools.partial(jax.jit, donate_argnames="cache")
def copy(cache: BlockCache, source_C: Int[Array, " C"], target_C: Int[Array, " C"]) -> BlockCache:
    """Copy whole blocks, all read before one is written; a target past the end is none."""
    put = lambda x: x.at[target_C].set(x[source_C], mode="drop")
    return dataclasses.replace(cache, pools=jax.tree.map(put, cache.pools))


@jax.jit
def take(cache: BlockCache, block_M: Int[Array, " M"]) -> list[Array]:
    """What is in these blocks, of each array of the pools."""
    return [x[block_M] for x in jax.tree.leaves(cache.pools)]


@functools.partial(jax.jit, donate_argnames="cache")
def put(cache: BlockCache, block_M: Int[Array, " M"], content: list[Array]) -> BlockCache:
    """Write what `take` gave into blocks; a number past the end is none."""
    leaves, tree = jax.tree.flatten(cache.pools)
    written = [x.at[block_M].set(new, mode="drop") for x, new in zip(leaves, content, strict=True)]
    return dataclasses.replace(cache, pools=tree.unflatten(written))


@functools.partial(jax.jit, donate_argnames="seen_RV")
def mark(seen_RV: Bool[Array, "R V"], row: Int[Array, ""], tokens_V: Bool[Array, " V"]) -> Bool[Array, "R V"]:
    """Say which tokens a row has had."""
    return seen_RV.at[row].set(tokens_V)


def _nobody(count: int) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Tokens, positions and rows of padding."""
    return np.zeros(count, np.int32), np.full(count, -1, np.int32), np.full(count, -1, np.int32)


class Device:
    """A model and a pool: what an engine's steps run on."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        spec: CacheSpec,
        blocks: int,
        limits: Limits | None = None,
        context: int | None = None,
        size: int = BLOCK,
        fingerprint: str = "",
        compiled: Compiled = traced,
    ):
        """BadInput for a cache that it cannot have: see `holds`."""
        self.config, self.params, self.limits = config, params, limits or Limits()
        self.context = config.context if context is None else context
        generate.check_context(config, self.context)
        if self.limits.itself and not (self.holds(spec.groups(config.layer_heads)) and all(map(has_high, spec.codecs))):
            raise BadInput(
                f"{spec}: the model foresees by the high plane of what is in blocks, as in `full@planes on blocks`"
            )
        self.blocks, self.size, self.vocab = blocks, size, config.vocab
        self.cache: Cache = self._empty(spec)
        self.about: dict[str, str | int] = {
            "model": fingerprint,
            "weights": config.weights,
            "spec": str(spec),
            "size": size,
        }
        """What prefixes must have in common besides their tokens."""
        self.programs: dict[int | str, Callable] = {}
        self.snapshots: Snapshots | None = None
        self.follower: Device | None = None
        """A smaller model that foresees (`draft.Follower`)."""
        self.compile_by = compiled
        self._table = np.full((self.limits.rows, self.pool().needed(self.context)), -1, np.int32)
        self._seen = jnp.zeros((self.limits.rows, config.vocab), bool)
        self._aside: dict[int, list[np.ndarray]] = {}
        self._seconds = 0.0, 0.0, math.inf

    @staticmethod
    def holds(groups: Sequence[Group]) -> bool:
        """Whether all that rows have is on blocks."""
        return all(each.cascade.shared and not each.cascade.own for each in groups)

    def _empty(self, spec: CacheSpec) -> Cache:
        groups = spec.groups(self.config.layer_heads)
        if not self.holds(groups):
            raise BadInput(f"caches wholly on blocks, such as `full@int8 on blocks`, are meant here, not {spec}")
        return BlockCache.empty(groups, self.limits.rows, self.context, self.blocks, self.size, spec.bases(groups))

    @property
    def nbytes(self) -> int:
        """Of all that holds keys and values."""
        pools = self.cache.pools if isinstance(self.cache, BlockCache) else ()
        mine = sum(x.nbytes for x in [*jax.tree.leaves(pools), *rows.state(self.cache)])
        return mine + (self.follower.nbytes if self.follower else 0)

    def pool(self) -> Blocks:
        """What counts its blocks, nobody having one."""
        return Blocks(self.blocks, self.size)

    def run(self, found: Plan, draws: Mapping[int, Sequence[Draw]], tell: bool) -> Drawn:
        """Move and copy blocks, put the tokens of runs into theirs, and draw for the rows of these numbers."""
        self._prepare(found)
        total, count = sum(run.stop - run.start for run in found.runs), sum(map(len, draws.values()))
        size = self.limits.bucket(total, count)
        token, position, row = _nobody(size)
        out, by, at = np.full(self.limits.drawn(size), -1, np.int32), [], 0
        for run in found.runs:
            some = slice(at, at + run.stop - run.start)
            token[some], position[some], row[some] = run.tokens, range(run.start, run.stop), run.row.place
            at = some.stop
            wanted = draws.get(run.row.id, ())
            # Of a draft each of its tokens draws, and the last before it; of rows that go on from one prompt all at its end.
            out[len(by) : len(by) + len(wanted)] = range(at - 1 - run.ahead, at) if run.ahead else at - 1
            by += wanted
        token_O, logprob_O, logits_OV = self._step(token, position, row, out, by)
        told = self._likely(logits_OV, count) if tell else [()] * count
        return Drawn(token_O[:count].tolist(), logprob_O[:count].tolist(), told, size)

    def _prepare(self, found: Plan) -> None:
        """Whatever is to be where it belongs before tokens come."""
        for move in found.out:
            self._put_aside(move)
        self._copy(found.copies)
        for move in found.back:
            self._bring_back(move)
        for run in found.runs:
            self._note_blocks(run.row)

    def _note_blocks(self, row: Row) -> None:
        """Have a row's blocks in its line of the table."""
        blocks = row.table.blocks
        self._table[row.place, : len(blocks)], self._table[row.place, len(blocks) :] = blocks, -1

    def _step(self, token, position, row, out, by: list[Draw]):
        program, arguments = self._program(token, position, row, out, by)
        token_O, logprob_O, logits_OV, self.cache, self._seen = program(*arguments)
        return np.asarray(token_O), np.asarray(logprob_O), logits_OV

    def _program(self, token, position, row, out, by: list[Draw]):
        how = self._how(by, len(out))
        arguments = self.params, self.cache, self._seen, token, position, row, out, self._table, *how
        return self._named(len(token), step, *arguments), arguments

    def _how(self, by: Sequence[Draw], count: int) -> tuple[Settings, sampling.Restrictions]:
        """How so many rows draw, those that are left over by no matter what."""
        by = [*by, *[Draw(GREEDY)] * (count - len(by))]
        restrictions = [each.restriction for each in by]
        return settings([each.sampling for each in by], count), sampling.restrictions(restrictions, self.vocab)

    def _named(self, name: int | str, work: Callable, *arguments) -> Callable:
        """The program of that name, made the first time."""
        if name not in self.programs:
            self.programs[name] = self.compile_by(work, self.config, *arguments)
        return self.programs[name]

    def _likely(self, logits_OV: Float[Array, "O V"], count: int) -> list[Likely]:
        return [*map(likely, *(np.asarray(each)[:count] for each in likeliest(logits_OV)))]

    def _copy(self, copies: Mapping[int, int]) -> None:
        """A row copies one block at most: the last of a prompt that it shares with others, before it writes on in it."""
        if copies:
            target = np.full(self.limits.rows, self.blocks, np.int32)
            source = np.zeros(self.limits.rows, np.int32)
            target[: len(copies)], source[: len(copies)] = [*copies], [*copies.values()]
            self.cache = copy(self.cache, source, target)

    def _put_aside(self, move: Move) -> None:
        taken = [take(self.cache, np.asarray(part, np.int32)) for part in _filled(move.blocks, 0)]
        self._aside[move.row.id] = [np.concatenate(each)[: len(move.blocks)] for each in zip(*taken, strict=True)]

    def _bring_back(self, move: Move) -> None:
        """The blocks of a row from its `first` on; those before it have been found in the pool."""
        content = self._aside.pop(move.row.id)
        for start, part in enumerate(_filled(move.blocks, self.blocks)):
            at = move.first + start * MOVED + np.arange(MOVED)
            some = [each.take(at, 0, mode="clip") for each in content]
            self.cache = put(self.cache, np.asarray(part, np.int32), some)

    def forget(self, row: Row) -> None:
        """Drop what is put aside of a row that is over."""
        self._aside.pop(row.id, None)

    def fork(self, row: Row, more: Row) -> None:
        """Let a row begin where another one is, which has the same blocks."""

    def places(self, row: Row) -> Int[np.ndarray, "L K T"] | None:
        """`Cache.places` of its tokens; None where all of them stay."""
        return None

    def foresee(self, asked: Sequence[Asked]) -> list[list[int]]:
        """What a smaller model draws for rows, or else the model itself, which reads half of what they have in blocks, and writes in these alone.

        By each row's own seed and positions, so that it is the token to come wherever that does not hang on the other half. A token that
        there is no block for yet is not seen by the next ones.
        """
        if self.follower:
            return self.follower.foresee(asked)
        size = next(count for count in self._drafts if count >= len(asked))
        token, position, row = _nobody(size)
        for index, each in enumerate(asked):
            token[index], position[index], row[index] = each.row.tokens[-1], len(each.row.tokens) - 1, each.row.place
            self._note_blocks(each.row)
        token_NA = self._foreseen(token, position, row, [each.draw for each in asked]).T.tolist()
        made = [tokens[: each.room] for tokens, each in zip(token_NA, asked, strict=False)]
        return [[*itertools.takewhile(lambda token: token >= 0, tokens)] for tokens in made]

    def _foreseen(self, token, position, row, by: Sequence[Draw]) -> Int[np.ndarray, "A N"]:
        program, arguments = self._drafting(token, position, row, by)
        token_AN, cache = program(*arguments)
        self.cache = self._read(cache, False)
        return np.asarray(token_AN)

    @staticmethod
    def _read(cache: Cache, coarsely: bool) -> Cache:
        """A cache that is read whole, or of what is in blocks the high plane alone."""
        assert isinstance(cache, BlockCache)
        return dataclasses.replace(cache, coarsely=coarsely)

    def _drafting(self, token, position, row, by: Sequence[Draw]):
        count_A = np.arange(self.limits.ahead)
        how = self._table, *self._how(by, len(token))
        cache = self._read(self.cache, self.limits.itself)
        arguments = self.params, cache, self._seen, token, position, row, count_A, *how
        return self._named(f"guess {len(token)}", guess, *arguments), arguments

    @property
    def _drafts(self) -> list[int]:
        """Rows of each program by which the model foresees; none where it does not."""
        return sizes(self.limits.rows) if self.limits.itself else []

    def room(self, position: int) -> int:
        """How many tokens after one at that position can be tried along with it, and taken back."""
        return self.limits.ahead

    def quicker(self, blocks: int) -> bool:
        """Whether so many blocks are sooner moved to host memory and back than computed again, as `warm` has measured it."""
        start, each, token = self._seconds
        return start + -(-blocks // MOVED) * each < blocks * self.size * token

    def note(self, row: Row, by: Sampling) -> None:
        """Hear of a row that begins at a place: what it has had, if it is held against that."""
        if by.repetition_penalty != 1:
            had = np.zeros(self.vocab, bool)
            had[row.tokens] = True
            self._seen = mark(self._seen, np.int32(row.place), had)

    def warm(self) -> float:
        """Compile all programs, and run each on padding alone; the seconds that it took."""
        start = time.perf_counter()
        # All before one runs: XLA writes no program down whose functions have run in this process.
        self._compile()
        if self.follower:
            self.follower._compile()
        self._try()
        self._seen = mark(self._seen, np.int32(0), np.zeros(self.vocab, bool))
        jax.block_until_ready((self.cache, self._seen))
        if self.follower:
            self.follower.warm()
        return time.perf_counter() - start

    def _padding(self) -> list[tuple[Any, Any, Any, Any]]:
        return [(*_nobody(size), np.full(self.limits.drawn(size), -1, np.int32)) for size in self.limits.buckets]

    def _compile(self) -> None:
        for each in self._padding():
            self._program(*each, [])
        for count in self._drafts:
            self._drafting(*_nobody(count), [])

    def _try(self) -> None:
        """Run whatever a step may run, on nothing."""
        for each in self._padding():
            likeliest(self._step(*each, [])[2])
        for count in self._drafts:
            self._foreseen(*_nobody(count), [])
        self._copy({self.blocks: 0})
        if self.limits.aside:
            self._measure()

    def compiled(self) -> int:
        """How many programs there are."""
        follows = len(self.follower.programs) if self.follower else 0
        return len(self.programs) + follows + sum(each._cache_size() for each in self.jitted)

    jitted: ClassVar[tuple[Any, ...]] = (step, guess, copy, take, put, mark, likeliest)
    """What is compiled besides the programs of steps."""

    def _moved(self, programs: int) -> None:
        """Put nothing aside and bring it back."""
        row = Row(-1, [], 0)
        self._put_aside(Move(row, 0, [0] * MOVED * programs))
        self._bring_back(Move(row, 0, [self.blocks] * MOVED * programs))

    def _measure(self) -> None:
        """Seconds of a move, of each of its programs there and back, and of a token of the largest step, in blocks that nobody has yet."""

        def took(work: Callable) -> float:
            start = time.perf_counter()
            work()
            jax.block_until_ready(self.cache)
            return time.perf_counter() - start

        count = min(self.limits.tokens, self.context, (self.blocks - 1) * self.size)
        table = Table(b"", list(range(1, 1 + -(-count // self.size))))
        largest = Plan([Run(Row(-1, [0] * count, count, place=0, held=table), 0, count)])
        self._moved(1)
        one, four = (min(took(functools.partial(self._moved, programs)) for _ in range(3)) for programs in (1, 4))
        each = max(four - one, 0.0) / 3
        self._seconds = (
            max(one - each, 0.0),
            each,
            min(took(lambda: self.run(largest, {}, False)) for _ in range(2)) / count,
        )


def _filled(blocks: list[int], rest: int) -> list[list[int]]:
    """MOVED blocks at a time, the last ones filled up."""
    return [[*some, *[rest] * (MOVED - len(some))] for some in itertools.batched(blocks, MOVED)]
