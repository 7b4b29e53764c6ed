"""Attention of one query per row over everything that a cache holds: the step that every new token pays for."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvcascade.kernels import launch, native
from kvcascade.kernels.backend import Implementation, Kernel, run
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import Partial, Weights, attend_each, join, joined
from kvcascade.kernels.slots import Codecs, Held, Slots

type Flat = tuple[Float[Array, "B N W"], Float[Array, "B N"], Float[Array, "B N"], list[Float[Array, "B K G _"]]]
"""A partial's arrays and the weights of each tier's slots, without the axis of the one query."""


@jax.named_scope("attention")
def decode(
    q_BNH: Float[Array, "B N H"],
    q_pos_B: Int[Array, " B"],
    held: Sequence[Held],
    heads: Heads,
    observed: bool,
    implementation: Implementation | None = None,
) -> tuple[Partial, list[Weights]]:
    """`partial.attend` of one query per row to all tiers: one partial in float32 and, if `observed`, the weights of each tier's slots.

    It is not normalised, so it merges with what other places hold; `partial.normalise` ends it, alone or with others.
    `xla` runs everywhere, `native` is C++ for a CPU, `mosaic` takes all tiers in one launch on Hopper, `triton` a tier in each on other
    GPUs; None takes the best that there is on the platform compiled for.
    """
    slots, codecs = zip(*held, strict=True)
    reference, on_cpu, on_hopper, on_gpu = (
        functools.partial(each, codecs, heads, observed) for each in (_xla, _native, _mosaic, _triton)
    )
    kernels = {
        "native": native.kernel(on_cpu, lambda q, q_pos, slots: _one_width(heads) or native.unread(*slots)),
        "mosaic": Kernel(on_hopper, lambda q, q_pos, slots: _one_width(heads) or _mosaic_refuses(heads, q, slots)),
        "triton": Kernel(on_gpu, lambda q, q_pos, slots: _one_width(heads) or triton_refuses(*slots)),
    }
    out_BNW, max_BN, sum_BN, weights = run(implementation, reference, kernels, q_BNH, q_pos_B, slots)
    return Partial(out_BNW[:, None], max_BN[:, None], sum_BN[:, None]), [each[:, :, :, None] for each in weights]


def _one_width(heads: Heads) -> str | None:
    """Why a kernel in which keys and values are equally wide refuses these heads, or None."""
    if heads.value_width != heads.width:
        return f"made for one width, not for keys of {heads.width} and values of {heads.value_width} numbers"
    return None


def _flat(part: Partial, weights: list[Weights]) -> Flat:
    return part.out_BTNW[:, 0], part.max_BTN[:, 0], part.sum_BTN[:, 0], [each[:, :, :, 0] for each in weights]


def _xla(codecs: Sequence[Codecs], heads, observed, q_BNH, q_pos_B, slots) -> Flat:
    held = list(zip(slots, codecs, strict=True))
    return _flat(*joined(attend_each(q_BNH[:, None], q_pos_B[:, None], held, heads, observed)))


def _native(codecs: Sequence[Codecs], heads, observed, q_BNH, q_pos_B, slots) -> Flat:
    (B, N, _), K = q_BNH.shape, slots[0].pos_BKS.shape[1]  # a device may have some of the heads alone
    flat = [x for tier in slots for x in (tier.pos_BKS, *native.arrays(tier.k), *native.arrays(tier.v))]
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    weights = [like(B, K, N // K, tier.pos_BKS.shape[-1]) for tier in slots if observed]
    call = jax.ffi.ffi_call("kvcascade_decode", [like(*q_BNH.shape), like(B, N), like(B, N), *weights])
    each = lambda numbers: np.array([number for pair in numbers for number in pair], np.int64)
    out_BNW, max_BN, sum_BN, *found = call(
        q_BNH.astype(jnp.float32),
        q_pos_B.astype(jnp.int32),
        *flat,
        arrays=each((len(tier.k), len(tier.v)) for tier in slots),
        turned=each((one.k.turned, one.v.turned) for one in codecs),
        window=np.int64(heads.window),
        scale=np.float32(heads.scale),
        soft_cap=np.float32(heads.soft_cap),
    )
    return out_BNW, max_BN, sum_BN, found


def _mosaic(codecs, heads, observed, q_BNH, q_pos_B, slots, interpret) -> Flat:
    from kvcascade.kernels import decode_mosaic

    turned = [each.k.turn(q_BNH) for each in codecs]
    return _of_splits(codecs, *decode_mosaic.attend(turned, q_pos_B, slots, heads, observed, interpret))


def _mosaic_refuses(heads, q_BNH, slots) -> str | None:
    from kvcascade.kernels import decode_mosaic

    return decode_mosaic.refuses(q_BNH, slots, heads)


def _triton(codecs, heads, observed, q_BNH, q_pos_B, slots, interpret) -> Flat:
    from kvcascade.kernels import decode_triton

    found = [
        decode_triton.attend(each.k.turn(q_BNH), q_pos_B, tier, heads, observed, interpret)
        for each, tier in zip(codecs, slots, strict=True)
    ]
    return _of_splits(codecs, [part for part, _ in found], [logits for _, logits in found if logits is not None])


def triton_refuses(*slots: Slots) -> str | None:
    """Why the Triton kernel cannot read these slots here, or None."""
    if reason := launch.refuses():
        return reason
    from kvcascade.kernels import decode_triton

    return next(filter(None, map(decode_triton.refuses, slots)), None)


def _of_splits(codecs: Sequence[Codecs], parts: list[Partial], logits: list[Float[Array, "B K G _"]]) -> Flat:
    """All splits of all tiers, those along a leading axis, as one; and what the logits say of each slot's weight."""
    parts = [p._replace(out_BTNW=each.v.turn(p.out_BTNW)) for each, p in zip(codecs, parts, strict=True)]
    out_BNW, max_BN, sum_BN, _ = _flat(join(Partial(*map(jnp.concatenate, zip(*parts, strict=True)))), [])
    return out_BNW, max_BN, sum_BN, [jnp.exp(x - max_BN.reshape(*x.shape[:3], 1)) for x in logits]
