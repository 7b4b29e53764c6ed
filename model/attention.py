"""Self-attention with `kv_heads` as the one dial from MHA (K = N) over GQA to MQA (K = 1)."""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvcascade.cache.cascade import LayerCache
from kvcascade.kernels.causal import causal_attention


def rope(x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], base: float) -> Float[Array, "B T N H"]:
    """Turn each pair (h, h + H/2) of a vector by its token's position times base^(-2h/H) radians (RoFormer, Su et al. 2021, eq. 34)."""
    H = x_BTNH.shape[-1]
    angle = positions_BT[:, :, None, None, None] * base ** (-jnp.arange(0, H, 2) / H)
    # Both halves in one expression, the other one reached by reversing: XLA makes a single loop of it, with no concatenation.
    halves = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], 2, H // 2)
    sign = jnp.asarray([[-1.0], [1.0]])
    turned = halves * jnp.cos(angle) + halves[..., ::-1, :] * (sign * jnp.sin(angle))
    return turned.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


class Attention(nnx.Module):
    """Projections, RoPE, and attention over this call's tokens or through one layer of a cache."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope_base: float,
        dtype: str,
        out_init,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.q = linear(width, heads * head_dim, kernel_init=init)
        self.k = linear(width, kv_heads * head_dim, kernel_init=init)
        self.v = linear(width, kv_heads * head_dim, kernel_init=init)
        self.o = linear(heads * head_dim, width, kernel_init=out_init)
        self.head_dim = head_dim
        self.rope_base = rope_base

    def __call__(
        self, x_BTM: Float[Array, "B T M"], positions_BT: Int[Array, "B T"], cache: LayerCache | None
    ) -> tuple[Float[Array, "B T M"], LayerCache | None]:
        """RoPE is applied before a key is stored, so positions stay true after eviction."""
        B, T, _ = x_BTM.shape
        q_BTNH, k_BTKH, v_BTKH = (linear(x_BTM).reshape(B, T, -1, self.head_dim) for linear in (self.q, self.k, self.v))
        q_BTNH, k_BTKH = rope(q_BTNH, positions_BT, self.rope_base), rope(k_BTKH, positions_BT, self.rope_base)
        if cache is None:
            out_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH)
        else:
            out_BTNH, cache = cache.step(q_BTNH, k_BTKH, v_BTKH, positions_BT)
        return self.o(out_BTNH.reshape(B, T, -1)), cache
