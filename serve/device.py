"""The device side of an engine: one compiled program for each number of tokens, over one pool of blocks."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kvcascade.cache.block_cache import BlockCache
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.tier import BLOCK
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.programs import Compiled, traced
from kvcascade.model.sampling import GREEDY, Sampling, Settings, sample, settings
from kvcascade.serve.plan import Limits, Row, Run

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
) -> tuple[Int[Array, " O"], Float[Array, " O"], BlockCache, Bool[Array, "R V"]]:
    """Put tokens of any rows into their blocks, and draw what follows those of the numbers `out`; -1 is padding everywhere.

    Returns the tokens drawn, and their log-probabilities as the model has them.
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
    return token_O, logprob_O, dataclasses.replace(cache, row_B=None), seen_RV


@functools.partial(jax.jit, donate_argnames="cache")
def copy(cache: BlockCache, source_C: Int[Array, " C"], target_C: Int[Array, " C"]) -> BlockCache:
    """Copy whole blocks, all read before one is written; a target past the end is none."""
    put = lambda x: x.at[target_C].set(x[source_C], mode="drop")
    return dataclasses.replace(cache, pools=jax.tree.map(put, cache.pools))


@functools.partial(jax.jit, donate_argnames="seen_RV")
def mark(seen_RV: Bool[Array, "R V"], row: Int[Array, ""], tokens_V: Bool[Array, " V"]) -> Bool[Array, "R V"]:
    """Say which tokens a row has had."""
    return seen_RV.at[row].set(tokens_V)


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
        """BadInput for a cache that is not wholly on blocks."""
        self.config, self.params, self.limits = config, params, limits or Limits()
        self.context = config.context if context is None else context
        generate.check_context(config, self.context)
        layers = spec.layers(config.layer_heads)
        if any(cascade.shared is None or cascade.own for cascade, _ in layers):
            raise BadInput(
                f"the engine has caches that are wholly on blocks, such as `full@int8 on blocks`, not {spec}"
            )
        self.blocks, self.size, self.vocab = blocks, size, config.vocab
        self.cache = BlockCache.empty(layers, self.limits.rows, self.context, blocks, size)
        self.about: dict[str, str | int] = {
            "model": fingerprint,
            "weights": config.weights,
            "spec": str(spec),
            "size": size,
        }
        """What prefixes must have in common besides their tokens."""
        self.programs: dict[int, Callable] = {}
        self._compiled = compiled
        self._table = np.full(self.cache.table_RW.shape, -1, np.int32)
        self._seen = jnp.zeros((self.limits.rows, config.vocab), bool)
        most = self.limits.tokens
        self.buckets = sorted({n for n in BUCKETS if n < most} | {most})

    def run(
        self, runs: Sequence[Run], draws: Mapping[int, Sequence[Sampling]], copies: Mapping[int, int]
    ) -> tuple[list[int], list[float], int]:
        """Copy blocks, put the tokens of runs into theirs, and draw for the rows of these numbers, in the order of the runs.

        Returns the tokens, their log-probabilities as the model has them, and how many tokens the program was for.
        """
        self._copy(copies)
        total, drawn = sum(run.stop - run.start for run in runs), sum(map(len, draws.values()))
        size = next(n for n in self.buckets if n >= total and min(n, self.limits.rows) >= min(drawn, self.limits.rows))
        token, position, row = np.zeros(size, np.int32), np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        out, by, at = np.full(min(size, self.limits.rows), -1, np.int32), [], 0
        for run in runs:
            some, blocks = slice(at, at + run.stop - run.start), run.row.table.blocks
            token[some], position[some] = run.row.tokens[run.start : run.stop], range(run.start, run.stop)
            row[some] = run.row.place
            self._table[run.row.place, : len(blocks)], self._table[run.row.place, len(blocks) :] = blocks, -1
            at = some.stop
            wanted = draws.get(run.row.id, ())
            out[len(by) : len(by) + len(wanted)] = at - 1
            by += wanted
        token_O, logprob_O = self._step(token, position, row, out, by)
        return token_O[:drawn].tolist(), logprob_O[:drawn].tolist(), size

    def _step(self, token, position, row, out, by: list[Sampling]):
        drawn = settings([*by, *[GREEDY] * (len(out) - len(by))], len(out))
        arguments = self.params, self.cache, self._seen, token, position, row, out, self._table, drawn
        if len(token) not in self.programs:
            self.programs[len(token)] = self._compiled(step, self.config, *arguments)
        token_O, logprob_O, self.cache, self._seen = self.programs[len(token)](*arguments)
        return np.asarray(token_O), np.asarray(logprob_O)

    def _copy(self, copies: Mapping[int, int]) -> None:
        """A row copies one block at most: the last of a prompt that it shares with others, before it writes on in it."""
        if copies:
            target = np.full(self.limits.rows, self.blocks, np.int32)
            source = np.zeros(self.limits.rows, np.int32)
            target[: len(copies)], source[: len(copies)] = [*copies], [*copies.values()]
            self.cache = copy(self.cache, source, target)

    def note(self, row: Row, sampling: Sampling) -> None:
        """Hear of a row that begins at a place: what it has had, if it is held against that."""
        if sampling.repetition_penalty != 1:
            had = np.zeros(self.vocab, bool)
            had[row.tokens] = True
            self._seen = mark(self._seen, np.int32(row.place), had)

    def warm(self) -> float:
        """Compile all programs, with steps of padding alone; the seconds that it took."""
        start = time.perf_counter()
        for size in self.buckets:
            none = np.full(size, -1, np.int32)
            self._step(np.zeros(size, np.int32), none, none, np.full(min(size, self.limits.rows), -1, np.int32), [])
        self._copy({self.blocks: 0})
        self._seen = mark(self._seen, np.int32(0), np.zeros(self.vocab, bool))
        jax.block_until_ready((self.cache, self._seen))
        return time.perf_counter() - start
