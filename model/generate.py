"""From a prompt's tokens to new tokens, through a cache: one prefill, then one compiled decode step again and again."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.whole import Cache
from kvcascade.kernels.write import argmin
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params

DISPATCH = 8
"""Tokens that `generate` decodes between two looks at them."""


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(
    config: ModelConfig, params: Params, cache: Cache, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B V"], Cache]:
    """Put whole prompts into an empty cache, which is donated; return the logits after each row's last token (position -1 is padding)."""
    return gpt.first_step(config, params, cache, tokens_BT, positions_BT)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_step(
    config: ModelConfig, params: Params, cache: Cache, token_B: Int[Array, " B"], position_B: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Cache]:
    """Put one token per row into a cache, which is donated; return the logits of the next. Compiled once per shape."""
    logits_BTV, cache = gpt.step(config, params, cache, token_B[:, None], position_B[:, None])
    return logits_BTV[:, 0], cache


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn; every limit leaves the likeliest token in."""

    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples as the model says."""
    top_k: int = 0
    """Only the so many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability (nucleus sampling, Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Only tokens with at least this share of the likeliest one's probability (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that were there before (CTRL, Keskar et al. 2019)."""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf or not 0 < self.repetition_penalty < math.inf:
            raise BadInput("temperature must be at least 0, repetition-penalty above 0, and both finite")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise BadInput("top-k must be at least 0, top-p above 0 and at most 1, min-p between 0 and 1")


@functools.partial(jax.jit, static_argnames="sampling")
@jax.named_scope("sampling")
def sample(
    logits_BV: Float[Array, "B V"], key: Key[Array, ""], sampling: Sampling, seen_BV: Bool[Array, "B _"]
) -> Int[Array, " B"]:
    """Draw a token per row: temperature, then top-k, top-p, min-p. `seen` are the tokens that a repetition penalty holds for, else empty."""
    logits = logits_BV.astype(jnp.float32)
    if (penalty := sampling.repetition_penalty) != 1:
        logits = jnp.where(seen_BV, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return argmin(-logits)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least_B1 = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least_B1, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = -jnp.sort(-jax.nn.softmax(logits))
        # A token is in as long as those before it do not reach the share.
        inside = jnp.cumsum(ordered, -1) - ordered < sampling.top_p
        least_B1 = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(jax.nn.softmax(logits) < least_B1, -jnp.inf, logits)
    if sampling.min_p > 0:
        likely = logits >= logits.max(-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(likely, logits, -jnp.inf)
    return jax.random.categorical(key, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where rows stand: their newest tokens and those tokens' positions, a cache that has seen all before them, and `seen` as `sample` has it."""

    cache: Cache
    token_B: Int[Array, " B"]
    position_B: Int[Array, " B"]
    seen_BV: Bool[Array, "B _"]


@functools.partial(jax.jit, static_argnames=("config", "sampling", "most"), donate_argnames="state")
def decode_steps(
    config: ModelConfig,
    params: Params,
    state: State,
    count: int | Int[Array, ""] = 1,
    sampling: Sampling = Sampling(),
    key: Key[Array, ""] | None = None,
    most: int = 1,
) -> tuple[Int[Array, "{most} B"], State]:
    """`count` decode steps, at most `most`, in one dispatch: each puts a token per row into the cache and draws the next.

    Tokens from `count` on mean nothing. The state is donated. A step draws by `key` folded with its number; the likeliest token needs none.
    """

    def body(index, carry):
        tokens_nB, state = carry
        positions_BT = state.position_B[:, None]
        logits_BTV, cache = gpt.step(config, params, state.cache, state.token_B[:, None], positions_BT)
        folded = jax.random.fold_in(jax.random.key(0) if key is None else key, index)
        token_B = sample(logits_BTV[:, 0], folded, sampling, state.seen_BV)
        seen_BV = _saw(state.seen_BV, token_B)
        return tokens_nB.at[index].set(token_B), State(cache, token_B, state.position_B + 1, seen_BV)

    tokens_nB = jnp.zeros((most, len(state.token_B)), jnp.int32)
    return body(0, (tokens_nB, state)) if most == 1 else lax.fori_loop(0, count, body, (tokens_nB, state))


def _saw(seen_BV, token_B):
    return seen_BV.at[jnp.arange(len(token_B)), token_B].set(True) if seen_BV.shape[-1] else seen_BV


def empty_cache(config: ModelConfig, spec: CacheSpec, batch: int, context: int) -> Cache:
    """An empty cache for a model; BadInput if the context is longer than the model's."""
    check_context(config, context)
    return spec.init(batch, config.layer_heads, context)


def start(config: ModelConfig, spec: CacheSpec, batch: int, context: int) -> State:
    """Rows that begin with token 1 and an empty cache: what is timed, where the text does not matter."""
    cache = empty_cache(config, spec, batch, context)
    return State(cache, jnp.ones(batch, jnp.int32), jnp.zeros(batch, jnp.int32), jnp.zeros((batch, 0), bool))


def check_context(config: ModelConfig, context: int) -> None:
    """BadInput if a context is longer than the model's."""
    if context > config.context:
        raise BadInput(f"a context of {context} tokens is longer than the model's {config.context}")


def pad(prompts: list[list[int]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Prompts of unequal lengths as tokens and positions, padded on the right with position -1 to a power of two, so few shapes are compiled."""
    T = 1 << (max(map(len, prompts)) - 1).bit_length()
    tokens, positions = np.zeros((len(prompts), T), np.int32), np.full((len(prompts), T), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], positions[row, : len(prompt)] = prompt, range(len(prompt))
    return tokens, positions


def begin(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    prompts: list[list[int]],
    sampling: Sampling = Sampling(),
    key: Key[Array, ""] | None = None,
) -> State:
    """Put prompts into an empty cache, which is donated, and draw each row's first token. Raises BadInput for an empty prompt."""
    if not all(prompts):
        raise BadInput("the prompt is empty")
    tokens_BT, positions_BT = pad(prompts)
    seen = np.zeros((len(prompts), config.vocab if sampling.repetition_penalty != 1 else 0), bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt if seen.size else []] = True
    seen_BV = jnp.asarray(seen)
    logits_BV, cache = prefill(config, params, cache, jnp.asarray(tokens_BT), jnp.asarray(positions_BT))
    token_B = sample(logits_BV, jax.random.key(0) if key is None else key, sampling, seen_BV)
    return State(cache, token_B, jnp.asarray(positions_BT.max(-1)) + 1, _saw(seen_BV, token_B))


def generate(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    prompts: list[list[int]],
    count: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> Iterator[tuple[Int[np.ndarray, "n B"], Cache]]:
    """Continue each prompt by `count` tokens; yields the first one per row, then DISPATCH at a time, with the cache that has seen those before.

    The yielded cache is donated to the next steps: look at it before asking for more tokens. Raises BadInput for an empty prompt.
    """
    key = jax.random.key(seed)
    state = begin(config, params, cache, prompts, sampling, key)
    yield np.asarray(state.token_B)[None], state.cache
    for first in range(1, count, DISPATCH):
        n = min(DISPATCH, count - first)
        tokens_nB, state = decode_steps(
            config, params, state, n, sampling, jax.random.fold_in(key, first), most=DISPATCH
        )
        yield np.asarray(tokens_nB[:n]), state.cache
