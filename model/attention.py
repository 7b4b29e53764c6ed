"""Self-attention with `kv_heads` as the one dial from MHA (K = N) over GQA to MQA (K = 1)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.cache.cascade import LayerCache
from kvcascade.kernels.causal import causal_attention
from kvcascade.model.config import ModelConfig
from kvcascade.model.linear import Linear, together

type Rotation = tuple[Float[Array, "B T 1 1 H2"], Float[Array, "B T 1 2 H2"]]
"""Cosines, and sines with the sign that each half takes."""


@jax.named_scope("rope")
def rotation(positions_BT: Int[Array, "B T"], H: int, base: float, factors: tuple[float, ...] = ()) -> Rotation:
    """What RoPE turns pair h at each position by: position times base^(-2h/H) / factors[h] radians (RoFormer, Su et al. 2021, eq. 34)."""
    # In float64 on the host: at position 8,000 a frequency that is off in its last float32 digit turns by 0.001 radians.
    frequency = base ** (-np.arange(0, H, 2) / H) / np.asarray(factors or 1.0)
    angle = positions_BT[:, :, None, None, None] * jnp.asarray(frequency, jnp.float32)
    # Without the barrier XLA would compute them again in every layer, for queries and for keys.
    return lax.optimization_barrier((jnp.cos(angle), jnp.asarray([[-1.0], [1.0]]) * jnp.sin(angle)))


@jax.named_scope("rope")
def turn(x_BTNH: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Turn each pair (h, h + H/2) of a vector."""
    # Both halves in one expression, the other one reached by reversing: XLA makes a single loop of it, with no concatenation.
    halves = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], 2, -1)
    cos, sin = by
    turned = halves * cos + halves[..., ::-1, :] * sin
    return turned.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


class Attention(nnx.Module):
    """Projections, RoPE, and attention over this call's tokens or through one layer of a cache."""

    def __init__(self, config: ModelConfig, out_init, rngs: nnx.Rngs):
        width, head_dim = config.width, config.head_dim
        linear = functools.partial(Linear, config=config, rngs=rngs)
        project = functools.partial(linear, init=nnx.initializers.normal(0.02), use_bias=config.biases != "none")
        self.q = project(width, config.heads * head_dim)
        self.k = project(width, config.kv_heads * head_dim)
        self.v = project(width, config.kv_heads * head_dim)
        self.o = linear(config.heads * head_dim, width, init=out_init, use_bias=config.biases == "all")
        if config.qk_norm:
            norm = functools.partial(nnx.RMSNorm, head_dim, epsilon=config.norm_eps, dtype=jnp.float32, rngs=rngs)
            self.q_norm, self.k_norm = norm(), norm()
        self.config = config

    def __call__(
        self,
        x_BTM: Float[Array, "B T M"],
        positions_BT: Int[Array, "B T"],
        by: Rotation | None,
        cache: LayerCache | None,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B T M"], LayerCache | None]:
        """RoPE, `by`, is applied before a key is stored, so positions stay true after eviction; `fresh` says that the cache is empty."""
        B, T, _ = x_BTM.shape
        config = self.config
        with jax.named_scope("qkv"):
            projected = together(x_BTM, self.q, self.k, self.v)
            q_BTNH, k_BTKH, v_BTKH = (x.reshape(B, T, -1, config.head_dim) for x in projected)
        if config.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH).astype(q_BTNH.dtype), self.k_norm(k_BTKH).astype(k_BTKH.dtype)
        if by is not None:
            q_BTNH, k_BTKH = turn(q_BTNH, by), turn(k_BTKH, by)
        if cache is None:
            out_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, config.window)
        else:
            out_BTNH, cache = cache.step(q_BTNH, k_BTKH, v_BTKH, positions_BT, config.window, fresh)
        with jax.named_scope("output"):
            return self.o(out_BTNH.reshape(B, T, -1)), cache
