"""Attention of one query per row over everything that a cache holds: the step that every new token pays for."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvcascade.kernels import launch, native
from kvcascade.kernels.backend import Implementation, Kernel, run
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import Partial, Weights, attend_each, join, joined
from kvcascade.kernels.slots import Codecs, Held, Pair, Stored

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
    reference, by_cpu, on_hopper, on_gpu = (
        functools.partial(each, codecs, heads, observed) for each in (_xla, _native, _mosaic, _triton)
    )
    kernels = {
        "native": native.kernel(by_cpu, lambda q, q_pos, slots: one_width(heads) or native.unread(*slots)),
        "mosaic": Kernel(on_hopper, lambda q, q_pos, slots: one_width(heads) or _mosaic_refuses(heads, q, slots)),
        "triton": Kernel(on_gpu, lambda q, q_pos, slots: one_width(heads) or triton_refuses(*slots)),
    }
    out_BNW, max_BN, sum_BN, weights = run(implementation, reference, kernels, q_BNH, q_pos_B, slots)
    return Partial(out_BNW[:, None], max_BN[:, None], sum_BN[:, None]), [each[:, :, :, None] for each in weights]


def one_width(heads: Heads) -> str | None:
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
    tiers = [NativeTier(tier.pos_BKS, tier.k, tier.v, each) for tier, each in zip(slots, codecs, strict=True)]
    return on_cpu(tiers, heads, observed, q_BNH, q_pos_B)


class NativeTier(NamedTuple):
    """A tier as the C++ kernel takes it: slots of rows, or of the blocks of a pool."""

    where: Int[Array, "..."]
    """The positions of the slots [R, K, S]; in blocks each row's [R, W]."""
    k: Stored
    v: Stored
    codecs: Codecs
    place: tuple[int, int, int] = (0, 0, 0)
    """In blocks: the slots of one, the layer, and how many slots a row has at most."""


def on_cpu(
    tiers: Sequence[NativeTier],
    heads: Heads,
    observed: bool,
    q_BNH: Float[Array, "B N H"],
    q_pos_B: Int[Array, " B"],
    row_B: Int[Array, " B"] | None = None,
) -> Flat:
    """Attention of queries over all tiers of their rows, by default of a row each; `observed`: with the weights of slots that are not in blocks."""
    B, N, _ = q_BNH.shape
    buffers = [x for tier in tiers for x in (tier.where, *native.arrays(tier.k), *native.arrays(tier.v))]
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    own = [tier.where for tier in tiers if not tier.place[0]]
    weights = [like(B, pos.shape[1], N // pos.shape[1], pos.shape[2]) for pos in own if observed]
    call = jax.ffi.ffi_call("kvcascade_decode", [like(*q_BNH.shape), like(B, N), like(B, N), *weights])
    each = lambda numbers: np.array([number for some in numbers for number in some], np.int64)
    out_BNW, max_BN, sum_BN, *found = call(
        q_BNH.astype(jnp.float32),
        q_pos_B.astype(jnp.int32),
        *([] if row_B is None else [row_B.astype(jnp.int32)]),
        *buffers,
        arrays=each((len(tier.k), len(tier.v)) for tier in tiers),
        turned=each((tier.codecs.k.turned, tier.codecs.v.turned) for tier in tiers),
        places=each(tier.place for tier in tiers),
        rows=row_B is not None,
        window=np.int64(heads.window),
        scale=np.float32(heads.scale),
        soft_cap=np.float32(heads.soft_cap),
    )
    return out_BNW, max_BN, sum_BN, found


def _mosaic(codecs, heads, observed, q_BNH, q_pos_B, slots, interpret) -> Flat:
    from kvcascade.kernels import decode_mosaic

    turned = [each.k.turn(q_BNH) for each in codecs]
    return of_splits(codecs, *decode_mosaic.attend(turned, q_pos_B, slots, heads, observed, interpret))


def _mosaic_refuses(heads, q_BNH, slots) -> str | None:
    from kvcascade.kernels import decode_mosaic

    return decode_mosaic.refuses(q_BNH, slots, heads)


def _triton(codecs, heads, observed, q_BNH, q_pos_B, slots, interpret) -> Flat:
    from kvcascade.kernels import decode_triton

    found = [
        decode_triton.attend(each.k.turn(q_BNH), q_pos_B, tier, heads, observed, interpret)
        for each, tier in zip(codecs, slots, strict=True)
    ]
    return of_splits(codecs, [part for part, _ in found], [logits for _, logits in found if logits is not None])


def triton_refuses(*slots: Pair) -> str | None:
    """Why the Triton kernel cannot read these slots here, or None."""
    if reason := launch.refuses():
        return reason
    from kvcascade.kernels import decode_triton

    return next(filter(None, map(decode_triton.refuses, slots)), None)


def of_splits(codecs: Sequence[Codecs], parts: list[Partial], logits: list[Float[Array, "B K G _"]]) -> Flat:
    """All splits of all tiers, those along a leading axis, as one; and what the logits say of each slot's weight."""
    parts = [p._replace(out_BTNW=each.v.turn(p.out_BTNW)) for each, p in zip(codecs, parts, strict=True)]
    out_BNW, max_BN, sum_BN, _ = _flat(join(Partial(*map(jnp.concatenate, zip(*parts, strict=True)))), [])
    return out_BNW, max_BN, sum_BN, [jnp.exp(x - max_BN.reshape(*x.shape[:3], 1)) for x in logits]
