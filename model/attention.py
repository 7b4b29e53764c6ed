"""Self-attention with `kv_heads` as the one dial from MHA (K = N) over GQA to MQA (K = 1)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvcascade.cache.prompt import Prompt, Reread
from kvcascade.cache.rows import Lines
from kvcascade.cache.whole import Cache, Draft
from kvcascade.kernels.causal import causal_attention
from kvcascade.kernels.rotation import Rotation, turn
from kvcascade.model.config import ModelConfig
from kvcascade.model.linear import Linear, together
from kvcascade.model.norm import RMSNorm


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
            norm = functools.partial(RMSNorm, heads.width, epsilon=config.norm_eps, dtype=jnp.float32, rngs=rngs)
            self.q_norm, self.k_norm = norm(), norm()
        self.heads, self.index = heads, index

    def __call__(
        self,
        x_BTM: Float[Array, "B T M"],
        positions_BT: Int[Array, "B T"],
        by: Rotation | None,
        cache: Cache | Draft | Lines | Prompt | Reread | None,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B T M"], Cache | Draft | Lines | Prompt | Reread | None]:
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
            written_BTK = self.written(v_BTKW)  # no work where no policy asks for it
            out_BTNW, cache = cache.step(self.index, q_BTNH, k_BTKH, v_BTKW, positions_BT, fresh, written_BTK)
        with jax.named_scope("output"):
            out_BTM = self.o(out_BTNW.reshape(B, T, -1))
        return (cache.gauged(self.index, out_BTM) if isinstance(cache, Reread) else out_BTM), cache

    def written(self, v_BTKW: Float[Array, "B T K W"]) -> Float[Array, "B T K"]:
        """The L1 norm of what each value adds to the residual stream where a query gives it all of its attention, the mean over its query heads."""
        return jnp.abs(self.added(v_BTKW)).sum(-1).mean(-1)

    def added(self, v_BTKW: Float[Array, "B T K W"]) -> Float[Array, "B T K G M"]:
        """What each value adds to the residual stream by each of its query heads."""
        o_MKGW = self.o.rows().reshape(-1, self.heads.kv, self.heads.queries // self.heads.kv, self.heads.value_width)
        return jnp.einsum("BTKW,MKGW->BTKGM", v_BTKW.astype(jnp.float32), o_MKGW.astype(jnp.float32))
