"""The GPT: RMSNorm before each block, RoPE, grouped-query attention, an MLP, tied embeddings."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from kvcascade.cache.cascade import Cache
from kvcascade.cache.errors import BadInput
from kvcascade.kernels.activation import ACTIVATIONS, activate
from kvcascade.kernels.loss import token_nll
from kvcascade.model.attention import Attention

type Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT; every array of the model follows from it.

    Parameters are float32. Matrices and embeddings start from N(0, 0.02²), the two projections that write into the
    residual stream from N(0, 0.02²/(2·layers)) (GPT-2, Radford et al. 2019), norms from one. Norms, RoPE, softmax and
    the loss are computed in float32 whatever `dtype` says.
    """

    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 8
    """KV heads: = heads is MHA, 1 is MQA, between them GQA."""
    mlp: int = 1024
    vocab: int = 4096
    context: int = 512
    """Tokens that the model is trained on and may be asked for."""
    activation: str = "gelu"
    """relu, gelu or swiglu."""
    dropout: float = 0.0
    """Share of MLP activations dropped in training."""
    rope_base: float = 10_000.0
    dtype: str = "float32"
    """What the matrix products are computed in: float32 or bfloat16."""

    def __post_init__(self):
        for name in ("layers", "width", "heads", "kv_heads", "mlp", "vocab", "context"):
            if getattr(self, name) < 1:
                raise BadInput(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise BadInput(f"model.width {self.width} must be an even multiple of model.heads {self.heads}")
        if self.heads % self.kv_heads:
            raise BadInput(f"model.kv-heads {self.kv_heads} must divide model.heads {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise BadInput(f"model.activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise BadInput(f"model.dtype {self.dtype!r} is not one of float32, bfloat16")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        out_init = nnx.initializers.normal(0.02 / (2 * config.layers) ** 0.5)
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        norm = functools.partial(nnx.RMSNorm, config.width, dtype=jnp.float32, rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(
            config.width, config.heads, config.kv_heads, config.head_dim, config.rope_base, config.dtype, out_init, rngs
        )
        self.up = linear(config.width, config.mlp, kernel_init=nnx.initializers.normal(0.02))
        if config.activation == "swiglu":
            self.gate = linear(config.width, config.mlp, kernel_init=nnx.initializers.normal(0.02))
        self.down = linear(config.mlp, config.width, kernel_init=out_init)
        self.activation, self.dropout = config.activation, config.dropout

    def __call__(self, x_BTM, positions_BT, cache, dropout_key):
        out, cache = self.attention(self.attention_norm(x_BTM), positions_BT, cache)
        x_BTM = x_BTM + out
        h = self.mlp_norm(x_BTM)
        gate = self.gate(h) if self.activation == "swiglu" else None
        return x_BTM + self.down(activate(self.up(h), gate, self.activation, self.dropout, dropout_key)), cache


class GPT(nnx.Module):
    """Embeddings, `layers` blocks, a last norm, and logits against the same embeddings."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embed = nnx.Embed(
            config.vocab,
            config.width,
            dtype=jnp.dtype(config.dtype),
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, dtype=jnp.float32, rngs=rngs)

    def hidden(self, tokens_BT, positions_BT, cache, dropout_key):
        """What the head is applied to, and the cache that has seen the tokens."""
        x_BTM = self.embed(tokens_BT)
        caches = []
        for index, block in enumerate(self.layers):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            x_BTM, layer = block(x_BTM, positions_BT, None if cache is None else cache[index], key)
            caches.append(layer)
        return self.norm(x_BTM), tuple(caches)

    def logits(self, x_BTM):
        """The head: products with the embeddings."""
        return self.embed.attend(x_BTM)


def init(config: ModelConfig, seed: int) -> Params:
    """Draw a model's parameters: a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(seed))))


@functools.lru_cache
def graph(config: ModelConfig):
    """The model's definition, split once from its arrays: (graph definition, abstract parameters)."""
    definition, state = nnx.split(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))
    return definition, nnx.to_pure_dict(state)


def forward(
    config: ModelConfig, params: Params, tokens_BT: Int[Array, "B T"], dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "B T V"]:
    """Run the model on whole rows, from position 0 on, without a cache; return the logits of the token after each. Dropout only with a key."""
    model = nnx.merge(graph(config)[0], params)
    return model.logits(model.hidden(tokens_BT, _from_zero(tokens_BT), None, dropout_key)[0])


def nll(
    config: ModelConfig, params: Params, rows_BT: Int[Array, "B T"], dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "B T-1"]:
    """The negative log-likelihood in nats of each token of whole rows but the first, without a cache. Dropout only with a key."""
    model = nnx.merge(graph(config)[0], params)
    inputs_BT, targets_BT = rows_BT[:, :-1], rows_BT[:, 1:]
    x_BTM, _ = model.hidden(inputs_BT, _from_zero(inputs_BT), None, dropout_key)
    dtype = jnp.dtype(config.dtype)
    head_VM = model.embed.embedding[...].astype(dtype)
    return token_nll(x_BTM.reshape(-1, config.width).astype(dtype), head_VM, targets_BT.reshape(-1)).reshape(
        targets_BT.shape
    )


def _from_zero(tokens_BT):
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)


def step(
    config: ModelConfig, params: Params, cache: Cache, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T V"], Cache]:
    """Run the model on the next tokens of rows that a cache has seen the past of; return the logits of the token after each, and the cache.

    `positions_BT` says where each token stands (-1: padding). T = 1 is a decode step, T > 1 a prefill of that many tokens.
    """
    model = nnx.merge(graph(config)[0], params)
    x_BTM, cache = model.hidden(tokens_BT, positions_BT, cache, None)
    return model.logits(x_BTM), cache
