"""Attention of one query per row over everything that a cache holds: the step that every new token pays for."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvcascade.kernels import launch, native
from kvcascade.kernels.backend import Implementation, Kernel, run
from kvcascade.kernels.partial import Partial, attend_all, combine
from kvcascade.kernels.slots import Format, Slots

type Result = tuple[Float[Array, "B N H"], list[Float[Array, "B K _"]]]


@jax.named_scope("attention")
def decode(
    q_BNH: Float[Array, "B N H"],
    q_pos_B: Int[Array, " B"],
    held: Sequence[tuple[Slots, Format]],
    observed: bool,
    window: int = 0,
    implementation: Implementation | None = None,
) -> Result:
    """`partial.attend_all` for one query per row: normalised attention in float32, and each slot's mass if `observed`.

    `xla` runs everywhere, `native` is C++ for a CPU, `mosaic` takes all tiers in one launch on Hopper, `triton` a tier in each on other
    GPUs; None takes the best that there is on the platform compiled for.
    """
    slots, formats = zip(*held, strict=True)
    reference, on_cpu, on_hopper, on_gpu = (
        functools.partial(each, formats, observed, window) for each in (_xla, _native, _mosaic, _triton)
    )
    known = lambda q, q_pos, slots: all(native.reads(tier.k) for tier in slots)
    kernels = {
        "native": native.kernel(on_cpu, known),
        "mosaic": Kernel(on_hopper, _mosaic_refuses),
        "triton": Kernel(on_gpu, lambda q, q_pos, slots: triton_refuses(*slots)),
    }
    return run(implementation, reference, kernels, q_BNH, q_pos_B, slots)


def _xla(formats, observed, window, q_BNH, q_pos_B, slots) -> Result:
    held = list(zip(slots, formats, strict=True))
    out_BTNH, masses = attend_all(q_BNH[:, None], q_pos_B[:, None], held, observed, window)
    return out_BTNH[:, 0], masses


def _native(formats, observed, window, q_BNH, q_pos_B, slots) -> Result:
    flat = [x for tier in slots for x in (tier.pos_BKS, *native.arrays(tier.k), *native.arrays(tier.v))]
    like = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
    call = jax.ffi.ffi_call("kvcascade_decode", [like(q_BNH), *(like(tier.pos_BKS) for tier in slots if observed)])
    out_BNH, *masses = call(
        q_BNH.astype(jnp.float32),
        q_pos_B,
        *flat,
        arrays=np.array([len(tier.k) for tier in slots], np.int64),
        turned=np.array([form.turned for form in formats], np.int64),
        window=np.int64(window),
    )
    return out_BNH, masses


def _mosaic(formats, observed, window, q_BNH, q_pos_B, slots, interpret) -> Result:
    from kvcascade.kernels import decode_mosaic

    turned = [form.turn(q_BNH) for form in formats]
    return _merge(formats, *decode_mosaic.attend(turned, q_pos_B, slots, observed, window, interpret))


def _mosaic_refuses(q_BNH, q_pos_B, slots) -> str | None:
    from kvcascade.kernels import decode_mosaic

    return decode_mosaic.refuses(q_BNH, slots)


def _triton(formats, observed, window, q_BNH, q_pos_B, slots, interpret) -> Result:
    from kvcascade.kernels import decode_triton

    found = [
        decode_triton.attend(form.turn(q_BNH), q_pos_B, tier, observed, window, interpret)
        for form, tier in zip(formats, slots, strict=True)
    ]
    return _merge(formats, [part for part, _ in found], [logits for _, logits in found if logits is not None])


def triton_refuses(*slots: Slots) -> str | None:
    """Why the Triton kernel cannot read these slots here, or None."""
    if reason := launch.refuses():
        return reason
    from kvcascade.kernels import decode_triton

    return next(filter(None, map(decode_triton.refuses, slots)), None)


def _merge(formats, parts: list[Partial], logits: list[Float[Array, "B K G _"]]) -> Result:
    """All splits of all tiers, those along a leading axis, in one; and what the logits say of each slot's mass."""
    parts = [p._replace(out_BTNH=form.turn(p.out_BTNH)) for form, p in zip(formats, parts, strict=True)]
    out_BTNH, top_BTN, total_BTN = combine(Partial(*map(jnp.concatenate, zip(*parts, strict=True))))
    over_slots = lambda x_BTN, logits_BKGS: x_BTN.reshape(*logits_BKGS.shape[:-1], 1)
    mass = lambda x: (jnp.exp(x - over_slots(top_BTN, x)) / over_slots(total_BTN, x)).sum(2)
    return out_BTNH[:, 0], [mass(x) for x in logits]
