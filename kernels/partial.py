"""Attention over one set of slots, unnormalised, so that results over several sets merge exactly."""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.kernels.heads import Heads
from kvcascade.kernels.slots import Held

NEVER = -1e30  # the maximum of no logits: finite, so that exp(NEVER - NEVER) is 1 and not NaN
TERMS = 3  # of eight significant bits each, as many together as float32 has


class Partial(NamedTuple):
    """Softmax attention over some slots before division: out = Σ exp(logit - max)·v, sum = Σ exp(logit - max); all float32."""

    out_BTNW: Float[Array, "B T N W"]
    max_BTN: Float[Array, "B T N"]
    sum_BTN: Float[Array, "B T N"]


type Weights = Float[Array, "B K G T _"]
"""exp(logit - max) of some slots, for the partial that has this max: what `mass` is made from."""


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSW: Float[Array, "B K S W"],
    q_pos_BT: Int[Array, "B T"],
    pos_BKS: Int[Array, "B K S"],
    heads: Heads,
) -> tuple[Partial, Weights]:
    """Attend from queries to the slots that hold a position that they see; position -1 is an empty slot or a padded query."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = (q_BTNH.astype(jnp.float32) * heads.scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    seen_BKTS = (pos_BKS[:, :, None] >= 0) & heads.sees(q_pos_BT[:, None, :, None] - pos_BKS[:, :, None])
    logits = heads.capped(_product("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH))
    logits = jnp.where(seen_BKTS[:, :, None], logits, -jnp.inf)
    max_BKGT = jnp.maximum(logits.max(-1), NEVER)
    weights = jnp.exp(logits - max_BKGT[..., None])
    out = _product("BKGTS,BKSW->BKGTW", weights, v_BKSW).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
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
        return jnp.einsum(letters, x, slots.astype(jnp.float32), precision="highest")  # on a GPU it would be TF32
    parts = jnp.concatenate(terms(x), 2)
    high, middle, low = jnp.split(jnp.einsum(letters, parts, slots, preferred_element_type=jnp.float32), 3, 2)
    return high + (middle + low)


@_product.defjvp
def _(letters, primals, tangents):
    # A term by itself has a gradient of eight bits.
    (x, slots), (dx, dslots) = primals, tangents
    product = functools.partial(jnp.einsum, letters, preferred_element_type=jnp.float32)
    return _product(letters, x, slots), product(dx, slots.astype(dx.dtype)) + product(x, dslots.astype(x.dtype))


def join(parts: Partial) -> Partial:
    """The partials along a leading axis as one, relative to the largest of their maxima (flash-decoding; FlashAttention-2, Dao 2023, §2.3)."""
    top = parts.max_BTN.max(0)
    scale = jnp.exp(parts.max_BTN - top)
    return Partial((scale[..., None] * parts.out_BTNW).sum(0), top, (scale * parts.sum_BTN).sum(0))


def joined(found: Sequence[tuple[Partial, Sequence[Weights]]]) -> tuple[Partial, list[Weights]]:
    """Several partials as one, and the weights that belong to each as weights of the whole."""
    if len(found) == 1:
        return found[0][0], list(found[0][1])
    whole = join(Partial(*map(jnp.stack, zip(*(part for part, _ in found), strict=True))))
    rescaled = [times(each, jnp.exp(part.max_BTN - whole.max_BTN)) for part, weights in found for each in weights]
    return whole, rescaled


def normalise(
    found: Sequence[tuple[Partial, Sequence[Weights]]],
) -> tuple[Float[Array, "B T N W"], list[Float[Array, "B K T _"]]]:
    """Attention over all that the partials are about: the one division, whatever they come from.

    Also the mass that each query gave each slot, summed over the query heads of its KV head, for as many sets of slots as there are
    weights. A query that sees nothing anywhere gets zeros.
    """
    whole, weights = joined(found)
    share_BTN = 1 / jnp.where(whole.sum_BTN == 0, 1, whole.sum_BTN)
    # A reduction over so few is slow on a CPU: five times as long as the additions.
    mass = [functools.reduce(operator.add, jnp.unstack(times(each, share_BTN), axis=2)) for each in weights]
    return whole.out_BTNW * share_BTN[..., None], mass


def times(weights_BKGTS: Weights, factor_BTN: Float[Array, "B T N"]) -> Weights:
    """The weights of each query and head times a factor of its own."""
    B, K, G, T, _ = weights_BKGTS.shape
    return weights_BKGTS * factor_BTN.reshape(B, T, K, G).transpose(0, 2, 3, 1)[..., None]


def attend_each(
    q_BTNH: Float[Array, "B T N H"],
    q_pos_BT: Int[Array, "B T"],
    held: Sequence[Held],
    heads: Heads,
    observed: bool,
) -> list[tuple[Partial, list[Weights]]]:
    """A partial for each of several sets of slots, in float32, to be `normalise`d together; with `observed` also the weights."""
    found = []
    for slots, codecs in held:
        # A turned codec turns the query and the output instead of every stored vector.
        k, v = codecs.k.read(slots.k), codecs.v.read(slots.v)
        part, weights = attend(codecs.k.turn(q_BTNH), k, v, q_pos_BT, slots.pos_BKS, heads)
        part = part._replace(out_BTNW=codecs.v.turn(part.out_BTNW))
        found.append((part, [weights] if observed else []))
    return found
