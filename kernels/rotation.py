"""RoPE: how positions turn queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.kernels.heads import Rope

type Rotation = tuple[Float[Array, "B T 1 1 H2"], Float[Array, "B T 1 2 H2"]]
"""Cosines, and sines with the sign that each half takes."""


@jax.named_scope("rope")
def rotation(positions_BT: Int[Array, "B T"], H: int, rope: Rope) -> Rotation:
    """What RoPE turns each pair of a head of width H by, to 10⁻⁶ radians at every position."""
    # A product of a position and a frequency in float32 is off by 0.04 radians at position 10⁶. Parts of a turn, counted in units of
    # 2⁻³², wrap where a turn does: 32-bit integers multiply without an error, and what a frequency has besides is small enough for float32.
    width = rope.width or H
    frequency = rope.base ** (-np.arange(0, width, 2) / width) / np.asarray(rope.factors or 1.0)
    frequency = np.pad(frequency, (0, (H - width) // 2))
    units = frequency / (2 * np.pi) * 2**32
    whole, rest = jnp.asarray(units, jnp.uint32), jnp.asarray(units % 1.0, jnp.float32)
    position_BT111 = positions_BT[:, :, None, None, None]
    part = position_BT111.astype(jnp.uint32) * whole
    part += jnp.round(position_BT111.astype(jnp.float32) * rest).astype(jnp.int32).astype(jnp.uint32)
    angle = lax.bitcast_convert_type(part, jnp.int32).astype(jnp.float32) * jnp.float32(2 * np.pi / 2**32)
    # Without the barrier XLA would compute them again in every layer, for queries and for keys.
    sign = jnp.asarray([[-1.0], [1.0]], jnp.float32)
    cos, sin = jnp.cos(angle), sign * jnp.sin(angle)
    if rope.scale != 1:
        scale = np.where(np.arange(H // 2) < width // 2, rope.scale, 1.0).astype(np.float32)
        cos, sin = cos * scale, sin * scale
    return lax.optimization_barrier((cos, sin))


@jax.named_scope("rope")
def turn(x_BTNH: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Turn each pair (h, h + H/2) of a vector."""
    # Both halves in one expression, the other one reached by reversing: XLA makes a single loop of it, with no concatenation.
    halves = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], 2, -1)
    cos, sin = by
    turned = halves * cos + halves[..., ::-1, :] * sin
    return turned.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


def turned_back(x_BTNH: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """What `turn` made x of."""
    cos, sin = by
    size = cos**2 + sin[..., :1, :] ** 2  # 1, or the square of the scale
    return turn(x_BTNH, (cos / size, -sin / size))
