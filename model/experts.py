"""Mixtures of experts: an MLP of which each token goes through a few parts, chosen by a router (Shazeer et al. 2017; Mixtral, Jiang et al. 2024)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.kernels import linear
from kvcascade.kernels.activation import activate
from kvcascade.model.config import ModelConfig
from kvcascade.model.linear import Linear

MOST = 64
"""Rows that go through an expert at once."""


class Experts(nnx.Module):
    """E experts, each a gated MLP, and the router. Their matrices stand one below the other, so each kind is stored as one."""

    def __init__(self, config: ModelConfig, out_init, rngs: nnx.Rngs):
        E, init = config.experts, nnx.initializers.normal(0.02)
        # Which experts are chosen hangs on differences that are lost in fewer bits.
        self.router = Linear(config.width, E, config, False, init, rngs, "float32")
        self.up = Linear(config.width, E * config.mlp, config, False, init, rngs)
        self.gate = Linear(config.width, E * config.mlp, config, False, init, rngs)
        self.down = Linear(config.mlp, E * config.width, config, False, out_init, rngs)
        self.count, self.chosen, self.normalised = E, config.experts_per_token, config.experts_normalised
        self.activation, self.dtype = config.activation, jnp.dtype(config.dtype)

    def __call__(self, x_BTM: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        """Each token through its experts, weighted; an expert is read only if a token goes through it. Not differentiable."""
        x_NM = x_BTM.reshape(-1, x_BTM.shape[-1])
        share_NE = jax.nn.softmax(linear.products(x_NM.astype(jnp.float32), [self.router.matrix])[0])
        share_NC, expert_NC = lax.top_k(share_NE, self.chosen)
        if self.normalised:
            share_NC /= share_NC.sum(-1, keepdims=True)
        y_NCM = self._through(x_NM.astype(self.dtype), expert_NC)
        return (y_NCM * share_NC[..., None]).sum(1).astype(x_BTM.dtype).reshape(x_BTM.shape)

    def _through(self, x_NM: Float[Array, "N M"], expert_NC: Int[Array, "N C"]) -> Float[Array, "N C M"]:
        """What each token's experts make of it: tokens are sorted by expert, and go through in blocks of one expert."""
        expert_P = expert_NC.reshape(-1)
        P, E = len(expert_P), self.count
        rows = min(1 << (-(-P // E) - 1).bit_length(), MOST)
        counts_E = jnp.zeros(E, jnp.int32).at[expert_P].add(1)
        ends_E = jnp.cumsum(-(-counts_E // rows))  # in blocks: each expert begins one
        order_P = jnp.argsort(expert_P)
        sorted_P = expert_P[order_P]
        rank_P = jnp.arange(P) - (jnp.cumsum(counts_E) - counts_E)[sorted_P]
        place_P = jnp.zeros(P, jnp.int32).at[order_P].set((ends_E - -(-counts_E // rows))[sorted_P] * rows + rank_P)
        blocks = -(-P // rows) + min(E, P)
        x_SM = jnp.zeros((blocks * rows, x_NM.shape[-1]), x_NM.dtype).at[place_P].set(jnp.repeat(x_NM, self.chosen, 0))

        def body(index, y_SM):
            expert = jnp.searchsorted(ends_E, index, side="right")
            x = lax.dynamic_slice_in_dim(x_SM, index * rows, rows)
            up, gate = linear.products(x, [self._part(self.up, expert), self._part(self.gate, expert)])
            hidden = activate(up, gate, self.activation, 0.0, None, None, None).astype(self.dtype)
            y = linear.products(hidden, [self._part(self.down, expert)])[0]
            return lax.dynamic_update_slice_in_dim(y_SM, y.astype(jnp.float32), index * rows, 0)

        y_SM = lax.fori_loop(0, ends_E[-1], body, jnp.zeros(x_SM.shape, jnp.float32))
        return y_SM[place_P].reshape(*expert_NC.shape, -1)

    def _part(self, of: Linear, expert: Int[Array, ""]) -> linear.Matrix:
        """The rows of a matrix that are this expert's."""
        cut = lambda array: lax.dynamic_slice_in_dim(
            array, expert * (len(array) // self.count), len(array) // self.count
        )
        return {name: array if name == "order" else cut(array) for name, array in of.matrix.items()}
