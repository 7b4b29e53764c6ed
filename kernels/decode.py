"""Attention of one query per row over everything that a cache holds: the step that every new token pays for."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvcascade.kernels import decode_mosaic, native
from kvcascade.kernels.backend import Implementation, Kernel, run
from kvcascade.kernels.partial import attend_all
from kvcascade.kernels.slots import Format, Slots

type Result = tuple[Float[Array, "B N H"], list[Float[Array, "B K _"]]]


def decode(
    q_BNH: Float[Array, "B N H"],
    q_pos_B: Int[Array, " B"],
    held: Sequence[tuple[Slots, Format]],
    observed: bool,
    window: int = 0,
    implementation: Implementation | None = None,
) -> Result:
    """`partial.attend_all` for one query per row: normalised attention in float32, and each slot's mass if `observed`.

    `xla` runs everywhere, `native` is C++ for a CPU; None takes the best that there is on the platform compiled for.
    """
    slots, formats = zip(*held, strict=True)
    reference, kernel = (functools.partial(each, formats, observed, window) for each in (_xla, _native))
    known = lambda q, q_pos, slots: all(native.reads(tier.k) for tier in slots)
    kernels = {
        "native": native.kernel(kernel, known),
        "mosaic": Kernel(
            functools.partial(decode_mosaic.decode, formats, observed, window),
            functools.partial(decode_mosaic.refuses, formats),
        ),
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
