"""From a prompt's tokens to new tokens, through a cache: one prefill, then one compiled decode step again and again."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kvcascade.cache.cascade import Cache
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.kernels.write import argmin
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params


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


@functools.partial(jax.jit, static_argnames="temperature")
def sample(logits_BV: Float[Array, "B V"], key: Key[Array, ""], temperature: float) -> Int[Array, " B"]:
    """Draw a token per row from softmax(logits / temperature); the likeliest one at temperature 0."""
    if temperature == 0:
        return argmin(-logits_BV)
    return jax.random.categorical(key, logits_BV / temperature)


def empty_cache(config: ModelConfig, spec: CacheSpec, batch: int, context: int) -> Cache:
    """An empty cache for a model; BadInput if the context is longer than the model's."""
    check_context(config, context)
    return spec.init(batch, config.layers, config.kv_heads, config.head_dim, context)


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


def generate(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    prompts: list[list[int]],
    count: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[tuple[Int[Array, " B"], Cache]]:
    """Continue each prompt by `count` tokens; yields a token per row as it comes, with the cache that has seen those before it.

    The yielded cache is donated to the next step: look at it before asking for the next token. Raises BadInput for an empty prompt.
    """
    if not all(prompts):
        raise BadInput("the prompt is empty")
    tokens_BT, positions_BT = pad(prompts)
    keys = jax.random.split(jax.random.key(seed), count)
    logits_BV, cache = prefill(config, params, cache, jnp.asarray(tokens_BT), jnp.asarray(positions_BT))
    position_B = jnp.asarray(positions_BT.max(-1))
    for index in range(count):
        token_B = sample(logits_BV, keys[index], temperature)
        yield token_B, cache
        if index + 1 < count:
            position_B = position_B + 1
            logits_BV, cache = decode_step(config, params, cache, token_B, position_B)
