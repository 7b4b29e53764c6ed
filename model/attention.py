"""Self-attention with `kv_heads` as the one dial from MHA (K = N) over GQA to MQA (K = 1)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.cache.whole import Cache, Draft, Prompt
from kvcascade.kernels.causal import causal_attention
from kvcascade.kernels.heads import Rope
from kvcascade.model.config import ModelConfig
from kvcascade.model.linear import Linear, together

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


class Attention(nnx.Module):
    """Projections, RoPE, and attention over this call's tokens or through a layer of a cache."""

    def __init__(self, config: ModelConfig, index: int, out_init, rngs: nnx.Rngs):
        width, heads = config.width, config.layer_heads[index]
        linear = functools.partial(Linear, config=config, rngs=rngs)
        project = functools.partial(linear, init=nnx.initializers.normal(0.02), use_bias=config.biases != "none")
        self.q = project(width, heads.queries * heads.width)
        self.k = project(width, heads.kv * heads.width)
        self.v = project(width, heads.kv * heads.value_width)
        self.o = linear(heads.queries * heads.value_width, width, init=out_init, use_bias=config.biases == "all")
        if config.qk_norm:
            norm = functools.partial(nnx.RMSNorm, heads.width, epsilon=config.norm_eps, dtype=jnp.float32, rngs=rngs)
            self.q_norm, self.k_norm = norm(), norm()
        self.heads, self.index = heads, index

    def __call__(
        self,
        x_BTM: Float[Array, "B T M"],
        positions_BT: Int[Array, "B T"],
        by: Rotation | None,
        cache: Cache | Draft | Prompt | None,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B T M"], Cache | Draft | Prompt | None]:
        """RoPE, `by`, is applied before a key is stored, so positions stay true after eviction; `fresh` says that the cache is empty."""
        B, T, _ = x_BTM.shape
        with jax.named_scope("qkv"):
            projected, widths = (
                together(x_BTM, self.q, self.k, self.v),
                (self.heads.width,) * 2 + (self.heads.value_width,),
            )
            q_BTNH, k_BTKH, v_BTKW = (x.reshape(B, T, -1, width) for x, width in zip(projected, widths, strict=True))
        if hasattr(self, "q_norm"):
            q_BTNH, k_BTKH = self.q_norm(q_BTNH).astype(q_BTNH.dtype), self.k_norm(k_BTKH).astype(k_BTKH.dtype)
        if by is not None:
            q_BTNH, k_BTKH = turn(q_BTNH, by), turn(k_BTKH, by)
        if cache is None:
            out_BTNW = causal_attention(q_BTNH, k_BTKH, v_BTKW, self.heads)
        else:
            out_BTNW, cache = cache.step(self.index, q_BTNH, k_BTKH, v_BTKW, positions_BT, fresh)
        with jax.named_scope("output"):
            return self.o(out_BTNW.reshape(B, T, -1)), cache
