"""From a prompt's tokens to new tokens, through a cache: one prefill, then one compiled decode step again and again."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.statistic import Statistic
from kvcascade.cache.whole import Cache
from kvcascade.kernels import processor
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.programs import Compiled, traced
from kvcascade.model.sampling import GREEDY, NOT_A_NUMBER, Sampling, Settings, sample, settings

CHUNK, LONG = 256, 2048
DISPATCH = 8
"""Tokens that `generate` decodes between two looks at them."""


def prefill(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    chunk: int | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Put whole prompts into an empty cache, which is donated; return the logits after each row's last token.

    A chunk of so many tokens enters at once, 0: all of them; by default what `chunk_for` says.

    A row's positions are 0, 1, … and then -1 for padding. Raises BadInput for others, and for a cache that holds something; inside
    another `jit` neither is looked at.
    """
    check_start(cache, positions_BT)
    if cache.rereads:
        check_rereading(config, cache.rereads, tokens_BT.shape[1])
    chunk = chunk_for(config, cache, tokens_BT.shape[1]) if chunk is None else chunk
    return prefill_step(config, params, cache, tokens_BT, positions_BT, chunk=chunk)


def chunk_for(config: ModelConfig, cache: Cache, tokens: int) -> int:
    """Tokens of a prompt that enter at once: CHUNK of a prompt longer than LONG if the cache keeps at most half of it, else all (0).

    A cache that keeps most of it takes the memory anyway, and is filled more quickly at once; one that reads its prompt twice takes it whole.
    """
    if cache.rereads:
        return 0
    return CHUNK if tokens > LONG and 2 * cache.kept <= tokens else 0


def check_start(cache: Cache, positions_BT: Int[Array | np.ndarray, "B T"]) -> None:
    """BadInput for a cache that holds something, and for positions that a prompt does not have; neither is looked at inside a `jit`."""
    # The first tier takes in whatever comes. What stands in blocks from earlier is not seen: it is written before a query is there.
    newest = [layer.slots[0].pos_BKS for layer in cache.layers[:1]]
    if not isinstance(positions_BT, Tracer) and not any(isinstance(each, Tracer) for each in newest):
        positions = np.asarray(positions_BT)
        index = np.arange(positions.shape[1])
        if (positions != np.where(index < (positions >= 0).sum(-1, keepdims=True), index, -1)).any():
            raise BadInput("a prompt's positions must be 0, 1, 2, … and its padding, -1, on the right")
        if any(_most(each) >= 0 for each in newest):
            raise BadInput("a prefill needs an empty cache, and this one holds tokens")


_most = jax.jit(jnp.max)

prefill_step = jax.jit(gpt.first_step, static_argnames=("config", "chunk"), donate_argnames="cache")
"""What `prefill` compiles, with nothing checked."""


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_step(
    config: ModelConfig, params: Params, cache: Cache, token_B: Int[Array, " B"], position_B: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Cache]:
    """Put one token per row into a cache, which is donated; return the logits of the next. Compiled once per shape."""
    logits_BTV, cache = gpt.step(config, params, cache, token_B[:, None], position_B[:, None])
    return logits_BTV[:, 0], cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where rows stand: a cache that has seen all before their newest tokens, those tokens and their positions, and how each draws the next."""

    cache: Cache
    token_B: Int[Array, " B"]
    position_B: Int[Array, " B"]
    by: Settings
    seen_BV: Bool[Array, "B V"]
    """Tokens that were there before: a byte for each of the vocabulary, also where no repetition penalty asks, so that there is one program."""


@functools.partial(jax.jit, static_argnames=("config", "most"), donate_argnames="state")
def decode_steps(
    config: ModelConfig, params: Params, state: State, count: int | Int[Array, ""] = 1, most: int = 1
) -> tuple[Int[Array, "{most} B"], State]:
    """`count` decode steps, at most `most`, in one dispatch: each puts a token per row into the cache and draws the next.

    A larger count is `most`, and none leaves the state as it is. Tokens from `count` on mean nothing. The state is donated.
    """

    def body(index, carry):
        tokens_nB, state = carry
        positions_BT = state.position_B[:, None]
        logits_BTV, cache = gpt.step(config, params, state.cache, state.token_B[:, None], positions_BT)
        state = _draw(logits_BTV[:, 0], cache, state.position_B + 1, state.by, state.seen_BV)
        return tokens_nB.at[index].set(state.token_B), state

    tokens_nB = jnp.zeros((most, len(state.token_B)), jnp.int32)
    return lax.fori_loop(0, jnp.minimum(count, most), body, (tokens_nB, state))


@functools.partial(jax.jit, static_argnames=("config", "chunk"), donate_argnames="cache")
def begin_step(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    by: Settings,
    seen_BV: Bool[Array, "B V"],
    chunk: int = 0,
) -> State:
    """Put whole prompts into an empty cache, which is donated, and draw each row's first token."""
    logits_BV, cache = gpt.first_step(config, params, cache, tokens_BT, positions_BT, chunk)
    return _draw(logits_BV, cache, positions_BT.max(-1) + 1, by, seen_BV)


def _draw(logits_BV, cache, position_B, by, seen_BV):
    """The state after the tokens at these positions are drawn."""
    token_B = sample(logits_BV, position_B, by, seen_BV)
    # Not by an index, for which rows that are divided among devices would be gathered.
    seen_BV = seen_BV | (token_B[:, None] == jnp.arange(seen_BV.shape[1]))
    return State(cache, token_B, position_B, by, seen_BV)


def empty_cache(config: ModelConfig, spec: CacheSpec, batch: int, context: int) -> Cache:
    """An empty cache for a model; BadInput if the context is longer than the model's, or there is no memory for so much."""
    check_context(config, context)
    check_memory(config, spec, batch, context)
    return spec.init(batch, config.layer_heads, context)


def start(config: ModelConfig, spec: CacheSpec, batch: int, context: int) -> State:
    """Rows that begin with token 1 and an empty cache: what is timed, where the text does not matter."""
    cache = empty_cache(config, spec, batch, context)
    seen_BV = jnp.zeros((batch, config.vocab), bool)
    one_B = jnp.ones(batch, jnp.int32)
    return State(cache, one_B, jnp.zeros(batch, jnp.int32), settings(GREEDY, batch), seen_BV)


def check_context(config: ModelConfig, context: int) -> None:
    """BadInput if a context is longer than the model's."""
    if context > config.context:
        raise BadInput(f"a context of {context} tokens is longer than the model's {config.context}")


def check_rereading(config: ModelConfig, rereads: Sequence[Statistic], tokens: int) -> None:
    """BadInput if a prompt of so many tokens and a part of it once more are longer than the model's context."""
    again = gpt.LEAD + min(max(each.part for each in rereads), tokens)
    if tokens + again > config.context:
        raise BadInput(
            f"a prompt of {tokens} tokens that is read twice goes up to position {tokens + again}, and the model's context is {config.context}"
        )


def check_memory(config: ModelConfig, spec: CacheSpec, batch: int, context: int) -> None:
    """BadInput if the device has no memory for so many rows of a cache and the logits of each."""
    wanted = batch * (spec.nbytes(config.layer_heads, context) + 4 * config.vocab)
    known = jax.local_devices()[0].memory_stats() or {}
    free = known["bytes_limit"] - known["bytes_in_use"] if "bytes_limit" in known else processor.available()
    if wanted > free:
        raise BadInput(f"{spec} for {batch} rows takes {wanted:,} bytes, and there are {free:,} left")


def check_room(config: ModelConfig, cache: Cache, tokens: int) -> None:
    """BadInput if rows of so many tokens are longer than the model's context, or than the one that a cache was made for."""
    check_context(config, tokens)
    if tokens > cache.context:
        raise BadInput(f"{tokens} tokens do not fit into a cache for a context of {cache.context}")


def check_numbers(missing_BT: Bool[np.ndarray, "B T"], first_B: Int[np.ndarray, " B"], row: int = 0) -> None:
    """BadInput if some logits are not numbers: it names the first such row, counted from `row`, and position; rows begin at `first`."""
    if missing_BT.any():
        index = int(missing_BT.any(1).argmax())
        position = int(first_B[index] + missing_BT[index].argmax())
        raise BadInput(f"the model's logits for position {position} of row {row + index} are not numbers")


def pad(prompts: list[list[int]], least: int = 1) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Prompts of unequal lengths as tokens and positions, padded on the right with position -1 to a power of two, so few shapes are compiled.

    It is at least `least`, itself one.
    """
    T = max(least, 1 << (max(map(len, prompts)) - 1).bit_length())
    tokens, positions = np.zeros((len(prompts), T), np.int32), np.full((len(prompts), T), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], positions[row, : len(prompt)] = prompt, range(len(prompt))
    return tokens, positions


def begin(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    prompts: list[list[int]],
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    compiled: Compiled = traced,
    chunk: int | None = None,
) -> State:
    """Put prompts into an empty cache, which is donated, and draw each row's first token; `chunk` as for `prefill`.

    Raises BadInput for an empty prompt, and for one that is longer than the model's or the cache's context.
    """
    if not all(prompts):
        raise BadInput("the prompt is empty")
    check_room(config, cache, max(map(len, prompts)))
    if cache.rereads:
        check_rereading(config, cache.rereads, max(map(len, prompts)))
    by = settings(sampling, len(prompts))
    tokens_BT, positions_BT = pad(prompts)
    seen = np.zeros((len(prompts), config.vocab), bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    check_start(cache, positions_BT)
    arguments = params, cache, jnp.asarray(tokens_BT), jnp.asarray(positions_BT), by, jnp.asarray(seen)
    chunk = chunk_for(config, cache, max(map(len, prompts))) if chunk is None else chunk
    return compiled(begin_step, config, *arguments, chunk=chunk)(*arguments)


def generate(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    prompts: list[list[int]],
    count: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    compiled: Compiled = traced,
    chunk: int | None = None,
) -> Iterator[tuple[Int[np.ndarray, "n B"], Cache]]:
    """Continue each prompt by `count` tokens; yields the first one per row, then DISPATCH at a time, with the cache that has seen those before.

    The yielded cache is donated to the next steps: look at it before asking for more tokens. One `Sampling` is for all rows, which then
    draw by seeds one after the other; `chunk` is as for `prefill`. Raises BadInput for an empty prompt, where the longest prompt and all that is
    drawn but the last token are more than the model's or the cache's context, and where the logits are not numbers. `compiled` says how
    the steps become programs: with `programs.kept` the next start finds them.
    """
    check_room(config, cache, max(map(len, prompts)) + count - 1)  # the last token drawn enters no cache
    state = begin(config, params, cache, prompts, sampling, compiled, chunk)
    lengths = np.asarray([len(prompt) for prompt in prompts])
    first_1B = np.asarray(state.token_B)[None]
    check_numbers(first_1B.T == NOT_A_NUMBER, lengths)
    yield first_1B, state.cache
    for new_nB, newer in go_on(config, params, state, count - 1, compiled):
        yield new_nB, newer.cache


def go_on(
    config: ModelConfig, params: Params, state: State, count: int, compiled: Compiled = traced
) -> Iterator[tuple[Int[np.ndarray, "n B"], State]]:
    """Decode `count` more tokens of each row, DISPATCH at a time: yields those, and the state, which is donated to the next steps.

    The loop of `generate`. Raises BadInput where the logits are not numbers.
    """
    if not count:
        return
    new_B = np.asarray(state.position_B) + 1
    decode = compiled(decode_steps, config, params, state, 1, most=DISPATCH)
    for done in range(0, count, DISPATCH):
        n = min(DISPATCH, count - done)
        tokens_nB, state = decode(params, state, n)
        new_nB = np.asarray(tokens_nB[:n])
        check_numbers(new_nB.T == NOT_A_NUMBER, new_B + done)
        yield new_nB, state
