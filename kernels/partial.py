"""Attention over one set of slots, unnormalised, so that results over several sets merge exactly."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.kernels.slots import Format, Slots

NEVER = -1e30  # the maximum of no logits: finite, so that exp(NEVER - NEVER) is 1 and not NaN
TERMS = 3  # of eight significant bits each, as many together as float32 has


class Partial(NamedTuple):
    """Softmax attention over some slots before division: out = Σ exp(logit - max)·v, sum = Σ exp(logit - max); all float32."""

    out_BTNH: Float[Array, "B T N H"]
    max_BTN: Float[Array, "B T N"]
    sum_BTN: Float[Array, "B T N"]


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    q_pos_BT: Int[Array, "B T"],
    pos_BKS: Int[Array, "B K S"],
    window: int = 0,
) -> tuple[Partial, Float[Array, "B K G T S"]]:
    """Attend from queries to the slots that hold a position at or before theirs; position -1 is an empty slot or a padded query.

    Of a `window` only the last positions are seen, the query's own included; 0 is no window.
    Logits are scaled by 1/sqrt(H). Also returns the unnormalised weights exp(logit - max), from which `mass` is made.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = (q_BTNH.astype(jnp.float32) * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    age_BKTS = q_pos_BT[:, None, :, None] - pos_BKS[:, :, None]
    seen_BKTS = (pos_BKS[:, :, None] >= 0) & (age_BKTS >= 0)
    if window:
        seen_BKTS &= age_BKTS < window
    logits = _product("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
    logits = jnp.where(seen_BKTS[:, :, None], logits, -jnp.inf)
    max_BKGT = jnp.maximum(logits.max(-1), NEVER)
    weights = jnp.exp(logits - max_BKGT[..., None])
    out = _product("BKGTS,BKSH->BKGTH", weights, v_BKSH).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    to_BTN = lambda x_BKGT: x_BKGT.transpose(0, 3, 1, 2).reshape(B, T, N)
    return Partial(out, to_BTN(max_BKGT), to_BTN(weights.sum(-1))), weights


def terms(x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """TERMS bf16 arrays whose sum is a float32 array, and whose products with bf16 are exact in float32."""
    found = []
    for _ in range(TERMS):
        found.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - found[-1]
    return [term.astype(jnp.bfloat16) for term in found]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(letters: str, x: Float[Array, "B K G T _"], slots: Float[Array, "B K S H"]) -> Float[Array, "B K G T _"]:
    """A float32 array times slots, accumulated in float32.

    Slots in bf16 are not converted, which would write a copy of them twice their size: x is taken as the sum of three bf16
    arrays.
    """
    if slots.dtype != jnp.bfloat16:
        return jnp.einsum(letters, x, slots.astype(jnp.float32))
    parts = jnp.concatenate(terms(x), 2)
    high, middle, low = jnp.split(jnp.einsum(letters, parts, slots, preferred_element_type=jnp.float32), 3, 2)
    return high + (middle + low)


@_product.defjvp
def _(letters, primals, tangents):
    # A term by itself has a gradient of eight bits.
    (x, slots), (dx, dslots) = primals, tangents
    product = functools.partial(jnp.einsum, letters, preferred_element_type=jnp.float32)
    return _product(letters, x, slots), product(dx, slots.astype(dx.dtype)) + product(x, dslots.astype(x.dtype))


def merge(partials: list[Partial]) -> tuple[Float[Array, "B T N H"], list[Float[Array, "B T N"]]]:
    """Combine partials by log-sum-exp into normalised attention, and the factor that normalises each one's weights.

    A query that sees nothing anywhere gets zeros.
    """
    out_BTNH, top_BTN, total_BTN = combine(Partial(*map(jnp.stack, zip(*partials, strict=True))))
    return out_BTNH, [jnp.exp(p.max_BTN - top_BTN) / total_BTN for p in partials]


def combine(parts: Partial) -> Partial:
    """Merge the partials along a leading axis into one that is normalised: out is divided by the sum, which is 1 where nothing is seen.

    (Flash-decoding; FlashAttention-2, Dao 2023, §2.3.)
    """
    top = parts.max_BTN.max(0)
    scale = jnp.exp(parts.max_BTN - top)
    total = (scale * parts.sum_BTN).sum(0)
    total = jnp.where(total == 0, 1, total)
    return Partial((scale[..., None] * parts.out_BTNH).sum(0) / total[..., None], top, total)


def mass(weights_BKGTS: Float[Array, "B K G T S"], factor_BTN: Float[Array, "B T N"]) -> Float[Array, "B K S"]:
    """The attention that each slot received from this call's queries, summed over the query heads of its KV head."""
    B, K, G, T, _ = weights_BKGTS.shape
    return jnp.einsum("BKGTS,BTKG->BKS", weights_BKGTS, factor_BTN.reshape(B, T, K, G))


def attend_all(
    q_BTNH: Float[Array, "B T N H"],
    q_pos_BT: Int[Array, "B T"],
    held: Sequence[tuple[Slots, Format]],
    observed: bool,
    window: int = 0,
) -> tuple[Float[Array, "B T N H"], list[Float[Array, "B K _"]]]:
    """Softmax attention over several sets of slots together, in float32; with `observed` also the mass that each slot received.

    A query attends to the slots that hold a position at or before its own; one that sees nothing gets zeros.
    """
    partials, weights = [], []
    for slots, form in held:
        # A turned format turns the query and the output instead of every stored vector.
        part, w = attend(form.turn(q_BTNH), form.read(slots.k), form.read(slots.v), q_pos_BT, slots.pos_BKS, window)
        partials.append(part._replace(out_BTNH=form.turn(part.out_BTNH)))
        weights.append(w)
    out_BTNH, factors = merge(partials)
    return out_BTNH, [mass(w, f) for w, f in zip(weights, factors, strict=True)] if observed else []
