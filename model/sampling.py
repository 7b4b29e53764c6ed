"""How each row draws its tokens: its settings and its seed are data, so one program serves any mix of them."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.write import argmin

NOT_A_NUMBER = -1
"""The token that is drawn where the logits are none: NaN, +inf, or -inf everywhere."""


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
    seed: int = 0
    """Of the draws; rows that share these settings draw by seed, seed + 1, seed + 2, …"""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf or not 0 < self.repetition_penalty < math.inf:
            raise BadInput("temperature must be at least 0, repetition-penalty above 0, and both finite")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise BadInput("top-k must be at least 0, top-p above 0 and at most 1, min-p between 0 and 1")
        if not 0 <= self.seed < 2**32:
            raise BadInput(f"the seed is {self.seed}; it must be at least 0 and below 2^32")


BIASES = 300
"""The most tokens of a row whose logits something is added to, as OpenAI's interface has it."""


class Restriction(NamedTuple):
    """What a row may draw besides how: the tokens that are allowed and what is added to the logits of some."""

    allowed_W: UInt32[np.ndarray, " W"] | None = None
    """A bit for each token, from the lowest on; None: all are."""
    bias: tuple[tuple[int, float], ...] = ()


FREE = Restriction()
"""None."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Restrictions:
    """`Restriction` of each row, and whether any has one."""

    any: Bool[Array, ""]
    allowed_BW: UInt32[Array, "B W"]
    token_BC: Int[Array, "B C"]
    """Of a bias; past the vocabulary: none."""
    bias_BC: Float[Array, "B C"]


def restrictions(rows: Sequence[Restriction], vocab: int) -> Restrictions:
    """Those of rows; BadInput for a token that is none, or more than BIASES of them."""
    if all(each.allowed_W is None and not each.bias for each in rows):
        return _none(len(rows), vocab)
    allowed = np.full((len(rows), -(-vocab // 32)), 2**32 - 1, np.uint32)
    token, bias = np.full((len(rows), BIASES), vocab, np.int32), np.zeros((len(rows), BIASES), np.float32)
    for index, each in enumerate(rows):
        if len(each.bias) > BIASES or not all(0 <= one < vocab for one, _ in each.bias):
            raise BadInput(f"biases are of {BIASES} tokens at most, each from 0 to {vocab - 1}")
        if each.allowed_W is not None:
            allowed[index] = each.allowed_W
        for place, (one, more) in enumerate(each.bias):
            token[index, place], bias[index, place] = one, more
    return Restrictions(jnp.asarray(True), jnp.asarray(allowed), jnp.asarray(token), jnp.asarray(bias))


@functools.lru_cache
def _none(rows: int, vocab: int) -> Restrictions:
    """No restrictions: arrays that are on the device already, and that nobody reads."""
    zeros = lambda columns, kind: jnp.zeros((rows, columns), kind)
    allowed_BW, token_BC, bias_BC = (
        zeros(-(-vocab // 32), jnp.uint32),
        zeros(BIASES, jnp.int32),
        zeros(BIASES, jnp.float32),
    )
    return Restrictions(jnp.asarray(False), allowed_BW, token_BC, bias_BC)


def restricted(logits_BV: Float[Array, "B V"], by: Restrictions) -> Float[Array, "B V"]:
    """Logits with the biases added, -inf for tokens that are not allowed; no work where no row has any."""

    def apply(logits):
        rows = jnp.arange(len(logits))[:, None]
        logits = logits.at[rows, by.token_BC].add(by.bias_BC, mode="drop")
        bits_BW32 = by.allowed_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
        allowed_BV = bits_BW32.reshape(len(logits), -1)[:, : logits.shape[1]] == 1
        return jnp.where(allowed_BV, logits, -jnp.inf)

    return lax.cond(by.any, apply, lambda logits: logits, logits_BV)


GREEDY = Sampling()
"""The likeliest token each time."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """`Sampling` of each row; 24 bytes a row."""

    temperature_B: Float[Array, " B"]
    top_k_B: Int[Array, " B"]
    top_p_B: Float[Array, " B"]
    min_p_B: Float[Array, " B"]
    penalty_B: Float[Array, " B"]
    seed_B: UInt32[Array, " B"]


def settings(sampling: Sampling | Sequence[Sampling], rows: int) -> Settings:
    """The settings of so many rows: one for each, or one for all, whose row r draws by seed + r. Raises BadInput for another number."""
    if isinstance(sampling, Sampling):
        sampling = [dataclasses.replace(sampling, seed=(sampling.seed + row) % 2**32) for row in range(rows)]
    if len(sampling) != rows:
        raise BadInput(f"there are settings for {len(sampling)} rows, and {rows} rows")
    column = lambda name, kind: jnp.asarray(np.asarray([getattr(each, name) for each in sampling], kind))
    return Settings(
        column("temperature", np.float32),
        jnp.asarray(np.asarray([min(each.top_k, 2**31 - 1) for each in sampling], np.int32)),
        jnp.maximum(column("top_p", np.float32), np.finfo(np.float32).tiny),  # a share of nothing would let no token in
        column("min_p", np.float32),
        column("repetition_penalty", np.float32),
        column("seed", np.uint32),
    )


@jax.jit
@jax.named_scope("sampling")
def sample(
    logits_BV: Float[Array, "B V"], position_B: Int[Array, " B"], by: Settings, seen_BV: Bool[Array, "B V"]
) -> Int[Array, " B"]:
    """Draw the token at a position of each row: temperature, then top-k, top-p, min-p; NOT_A_NUMBER where the logits are none.

    `seen` are the tokens that a repetition penalty holds for. The draw's key is the row's seed folded with the position, so it
    depends on no other row, and not on how many steps are dispatched together.
    """
    logits = penalised(logits_BV, by, seen_BV)
    likeliest_B = argmin(-logits)
    # Only a mix with a row that samples pays for the sort and the noise.
    token_B = lax.cond((by.temperature_B > 0).any(), _drawn, lambda *_: likeliest_B, logits, position_B, by)
    token_B = jnp.where(by.temperature_B > 0, token_B, likeliest_B)
    return jnp.where(jnp.isfinite(logits_BV.max(-1)), token_B, NOT_A_NUMBER)


def penalised(logits_BV: Float[Array, "B V"], by: Settings, seen_BV: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """The logits in float32 after the repetition penalty."""
    logits, penalty_B1 = logits_BV.astype(jnp.float32), by.penalty_B[:, None]
    return jnp.where(seen_BV, jnp.where(logits > 0, logits / penalty_B1, logits * penalty_B1), logits)


def _drawn(logits_BV, position_B, by):
    logits = logits_BV / jnp.where(by.temperature_B > 0, by.temperature_B, 1)[:, None]
    ordered = -jnp.sort(-logits)
    last_B = jnp.where(by.top_k_B > 0, jnp.minimum(by.top_k_B, logits.shape[-1]), logits.shape[-1]) - 1
    inside = ordered >= jnp.take_along_axis(ordered, last_B[:, None], -1)
    share = jax.nn.softmax(jnp.where(inside, ordered, -jnp.inf))
    # A token is in as long as those before it do not reach the share; a sum that rounding makes 1 excludes none.
    inside &= (jnp.cumsum(share, -1) - share < by.top_p_B[:, None]) | (by.top_p_B[:, None] >= 1)
    inside &= ordered >= ordered[:, :1] + jnp.log(by.min_p_B)[:, None]
    least_B1 = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
    logits = jnp.where(logits < least_B1, -jnp.inf, logits)
    keys_B = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(by.seed_B, position_B)
    return jax.vmap(jax.random.categorical)(keys_B, logits).astype(jnp.int32)
