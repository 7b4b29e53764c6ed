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
from kvcascade.kernels.slots import Codecs, Held, Pair, Stored, payload

type Flat = tuple[Float[Array, "B N W"], Float[Array, "B N"], Float[Array, "B N"], list[Float[Array, "B K G _"]]]
"""A partial's arrays and the weights of each tier's slots, without the axis of the one query."""


class Members(NamedTuple):
    """KV heads of a layer that hold the same tiers, and whether the weights of their slots are wanted."""

    chosen: tuple[int, ...]
    held: Sequence[Held]
    observed: bool


class _About(NamedTuple):
    """What is known of such heads before anything runs."""

    chosen: tuple[int, ...]
    codecs: tuple[Codecs, ...]
    observed: bool


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
    return decode_groups(q_BNH, q_pos_B, [Members((*range(heads.kv),), held, observed)], heads, implementation)[0]


@jax.named_scope("attention")
def decode_groups(
    q_BNH: Float[Array, "B N H"],
    q_pos_B: Int[Array, " B"],
    groups: Sequence[Members],
    heads: Heads,
    implementation: Implementation | None = None,
) -> list[tuple[Partial, list[Weights]]]:
    """The same of each group of a layer's KV heads, for the query heads that read them; `native` takes all groups in one call."""
    slots = tuple(tuple(each for each, _ in group.held) for group in groups)
    about = tuple(_About(each.chosen, tuple(codecs for _, codecs in each.held), each.observed) for each in groups)
    by_group = lambda call: functools.partial(_by_group, call, about, heads)
    every = lambda slots: [each for some in slots for each in some]
    kernels = {
        "native": native.kernel(
            functools.partial(_native, about, heads),
            lambda q, q_pos, slots: one_width(heads) or native.unread(*every(slots)),
        ),
        "mosaic": Kernel(
            by_group(_mosaic), lambda q, q_pos, slots: one_width(heads) or _mosaic_refuses(about, heads, q, slots)
        ),
        "triton": Kernel(by_group(_triton), lambda q, q_pos, slots: one_width(heads) or triton_refuses(*every(slots))),
    }
    # Groups have unlike numbers of heads, which devices cannot divide among them alike.
    axes = "BK -> BK" if len(groups) == 1 else "B -> B"
    found = run(implementation, by_group(_xla), kernels, q_BNH, q_pos_B, slots, axes=axes)
    return [
        (Partial(out[:, None], top[:, None], total[:, None]), [each[:, :, :, None] for each in weights])
        for out, top, total, weights in found
    ]


def _by_group(call, about: Sequence[_About], heads, q_BNH, q_pos_B, slots, **more) -> list[Flat]:
    """Each group by a call of its own."""
    found = []
    for each, some in zip(about, slots, strict=True):
        q = _of_heads(q_BNH, each.chosen, heads)
        found.append(call(each.codecs, heads.part(len(each.chosen)), each.observed, q, q_pos_B, some, **more))
    return found


def _of_heads(x_BN: Float[Array, "B N ..."], chosen: Sequence[int], heads: Heads) -> Float[Array, "B N2 ..."]:
    """What belongs to the query heads that read these KV heads."""
    if [*chosen] == [*range(heads.kv)]:
        return x_BN
    x_BKG = x_BN.reshape(len(x_BN), heads.kv, -1, *x_BN.shape[2:])
    return x_BKG[:, np.asarray(chosen)].reshape(len(x_BN), -1, *x_BN.shape[2:])


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


def _native(about: Sequence[_About], heads, q_BNH, q_pos_B, slots) -> list[Flat]:
    """All groups by one call."""
    tiers = [
        NativeTier(tier.pos_BKS, tier.k, tier.v, codecs, each.observed, each.chosen)
        for each, some in zip(about, slots, strict=True)
        for tier, codecs in zip(some, each.codecs, strict=True)
    ]
    out, top, total, weights = on_cpu(tiers, heads, q_BNH, q_pos_B)
    left = iter(weights)

    def of(each: _About) -> Flat:
        pick = functools.partial(_of_heads, chosen=each.chosen, heads=heads)
        return pick(out), pick(top), pick(total), [next(left) for _ in each.codecs if each.observed]

    return [*map(of, about)]


class NativeTier(NamedTuple):
    """A tier as the C++ kernel takes it: slots of rows, or of the blocks of a pool."""

    where: Int[Array, "..."]
    """The positions of the slots [R, K, S]; in blocks each row's [R, W]."""
    k: Stored
    v: Stored
    codecs: Codecs
    observed: bool = False
    """Whether the weights of its slots are wanted, which those in blocks have not."""
    chosen: tuple[int, ...] | None = None
    """The KV heads of the layer that it is of; None: all."""
    place: tuple[int, int, int] = (0, 0, 0)
    """In blocks: the slots of one, the layer, and how many slots a row has at most."""


def on_cpu(
    tiers: Sequence[NativeTier],
    heads: Heads,
    q_BNH: Float[Array, "B N H"],
    q_pos_B: Int[Array, " B"],
    row_B: Int[Array, " B"] | None = None,
) -> Flat:
    """Attention of queries over all tiers of their rows, by default of a row each, and the weights of those tiers that are observed."""
    B, N, _ = q_BNH.shape
    buffers = [x for tier in tiers for x in (tier.where, *native.arrays(tier.k), *native.arrays(tier.v))]
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    # Where devices divide the heads among them, each has fewer than the layer.
    alike = all(tier.chosen is None or len(tier.chosen) == heads.kv for tier in tiers)
    K = payload(tiers[0].k).shape[-3] if alike else heads.kv
    index = lambda tier: {head: at for at, head in enumerate(range(K) if alike else tier.chosen)}
    own = [tier.where for tier in tiers if tier.observed]
    weights = [like(B, pos.shape[1], N // K, pos.shape[2]) for pos in own]
    call = jax.ffi.ffi_call("kvcascade_decode", [like(*q_BNH.shape), like(B, N), like(B, N), *weights])
    each = lambda numbers: np.array([number for some in numbers for number in some], np.int64)
    out_BNW, max_BN, sum_BN, *found = call(
        q_BNH.astype(jnp.float32),
        q_pos_B.astype(jnp.int32),
        *([] if row_B is None else [row_B.astype(jnp.int32)]),
        *buffers,
        **native.formats(
            [stored for tier in tiers for stored in (tier.k, tier.v)],
            [codec for tier in tiers for codec in tier.codecs],
        ),
        places=each(tier.place for tier in tiers),
        members=each([index(tier).get(head, -1) for head in range(K)] for tier in tiers),
        observed=each([tier.observed] for tier in tiers),
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


def _mosaic_refuses(about: Sequence[_About], heads, q_BNH, slots) -> str | None:
    from kvcascade.kernels import decode_mosaic

    parts = zip(about, slots, strict=True)
    groups = ((_of_heads(q_BNH, each.chosen, heads), some, heads.part(len(each.chosen))) for each, some in parts)
    return next(filter(None, (decode_mosaic.refuses(*group) for group in groups)), None)


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
