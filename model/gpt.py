"""The GPT: a norm before each block, positions, grouped-query attention, an MLP; one class for every architecture, told apart by data."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key

from kvcascade.cache.errors import BadInput
from kvcascade.cache.prompt import Prompt, Reread
from kvcascade.cache.statistic import Statistic
from kvcascade.cache.whole import Cache, Draft
from kvcascade.kernels.activation import activate
from kvcascade.kernels.heads import capped
from kvcascade.kernels.loss import token_nll
from kvcascade.kernels.nonlinear import GATED
from kvcascade.kernels.rotation import rotation
from kvcascade.model.attention import Attention
from kvcascade.model.config import ModelConfig
from kvcascade.model.experts import Experts
from kvcascade.model.linear import Embedding, Linear, head_weights, products
from kvcascade.model.norm import LayerNorm, RMSNorm

type Params = dict[str, Any]

LEAD = 8
"""Tokens before a part that come with it when a prompt is read again (KVzip, §3.3)."""


def make_norm(config: ModelConfig, rngs: nnx.Rngs):
    """The norm before a block or the head; computed in float32."""
    norm = {"rms": RMSNorm, "layer": LayerNorm}[config.norm]
    return norm(config.width, epsilon=config.norm_eps, dtype=jnp.float32, rngs=rngs)


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); with norms after both, x + norm(attention(norm(x))) and so on."""

    def __init__(self, config: ModelConfig, index: int, rngs: nnx.Rngs):
        out_init = nnx.initializers.normal(0.02 / (2 * config.layers) ** 0.5)
        project = functools.partial(Linear, config=config, use_bias=config.biases == "all", rngs=rngs)
        self.attention_norm, self.mlp_norm = make_norm(config, rngs), make_norm(config, rngs)
        if config.post_norms:
            self.attention_post_norm, self.mlp_post_norm = make_norm(config, rngs), make_norm(config, rngs)
        self.attention = Attention(config, index, out_init, rngs)
        if config.experts:
            self.experts = Experts(config, out_init, rngs)
            return
        self.up = project(config.width, config.mlp, init=nnx.initializers.normal(0.02))
        if config.activation in GATED:
            self.gate = project(config.width, config.mlp, init=nnx.initializers.normal(0.02))
        self.down = project(config.mlp, config.width, init=out_init)
        self.activation, self.dropout = config.activation, config.dropout

    def __call__(self, x_BTM, positions_BT, by, cache, dropout_key, fresh):
        with jax.named_scope("norm"):
            h = self.attention_norm(x_BTM)
        out, cache = self.attention(h, positions_BT, by, cache, fresh)
        with jax.named_scope("norm"):
            x_BTM = self.add(x_BTM, out, "attention_post_norm")
            h = self.mlp_norm(x_BTM)
        with jax.named_scope("mlp"):
            return self.add(x_BTM, self.mlp(h, dropout_key), "mlp_post_norm"), cache

    def add(self, x_BTM, out, norm: str):
        """x and a block's output, which goes through that norm where there is one."""
        return x_BTM + (getattr(self, norm)(out).astype(x_BTM.dtype) if hasattr(self, norm) else out)

    def mlp(self, h, dropout_key):
        """Up and gate, the activation, down, or a mixture of such."""
        if hasattr(self, "experts"):
            return self.experts(h)
        # Their biases are added in the one pass that the activation makes over the products.
        if self.activation in GATED:
            (up, gate), gate_bias = products(h, self.up, self.gate), self.gate.added
        else:
            (up,), gate, gate_bias = products(h, self.up), None, None
        hidden = activate(up, gate, self.activation, self.dropout, dropout_key, self.up.added, gate_bias)
        return self.down(hidden)


class GPT(nnx.Module):
    """Embeddings, `layers` blocks, a last norm, and logits against the same embeddings."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embed = Embedding(config, rngs)
        if config.positions == "learned":
            self.position = nnx.Embed(
                config.context, config.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
            )
        self.layers = nnx.List([Block(config, index, rngs) for index in range(config.layers)])
        self.norm = make_norm(config, rngs)
        if not config.tied:
            init = nnx.initializers.normal(0.02)
            self.head = Linear(config.width, config.vocab, config, False, init, rngs, head_weights(config))
        self.config = config

    def hidden(self, tokens_BT, positions_BT, cache, dropout_key=None, fresh=False) -> tuple[Any, Any]:
        """What the head is applied to, and the cache that has seen the tokens."""
        x_BTM, cache = self.stream(tokens_BT, positions_BT, cache, dropout_key, fresh)
        with jax.named_scope("norm"):
            return self.norm(x_BTM), cache

    def stream(self, tokens_BT, positions_BT, cache, dropout_key=None, fresh=False) -> tuple[Any, Any]:
        """The residual stream after all layers, and the cache that has seen the tokens."""
        config = self.config
        with jax.named_scope("embedding"):
            x_BTM = self.embed(tokens_BT)
            if config.scaled_embedding:
                # By a number of the same type, as it was trained: in bfloat16 the root is rounded too.
                x_BTM = x_BTM * jnp.asarray(config.width**0.5, x_BTM.dtype)
            if config.positions == "learned":
                x_BTM = x_BTM + self.position(jnp.maximum(positions_BT, 0)).astype(x_BTM.dtype)
        # Layers that turn alike share what they turn by.
        turns = {(each.width, each.rope): each.rope for each in config.layer_heads}
        context = tokens_BT.shape[1] if cache is None else cache.context
        by = {each: rope and rotation(positions_BT, each[0], rope.at(context)) for each, rope in turns.items()}
        for index, (block, heads) in enumerate(zip(self.layers, config.layer_heads, strict=True)):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            x_BTM, cache = block(x_BTM, positions_BT, by[heads.width, heads.rope], cache, key, fresh)
        return x_BTM, cache

    @property
    def head_matrix(self):
        """What the logits are products with."""
        return self.embed if self.config.tied else self.head

    @jax.named_scope("head")
    def logits(self, x_BTM):
        """The head: products with its matrix, or with the embeddings."""
        return capped(self.head_matrix.product(x_BTM), self.config.final_soft_cap)


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
    head_VM = model.head_matrix.rows().astype(config.dtype)
    x = x_BTM.reshape(-1, config.width).astype(config.dtype)
    return token_nll(x, head_VM, targets_BT.reshape(-1), config.final_soft_cap).reshape(targets_BT.shape)


def _from_zero(tokens_BT):
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)


def step[C: (Cache, Draft)](
    config: ModelConfig, params: Params, cache: C, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T V"], C]:
    """Run the model on the next tokens of rows that a cache has seen the past of; return the logits of the token after each, and the cache.

    `positions_BT` says where each token stands (-1: padding). T = 1 is a decode step, T > 1 a prefill of that many tokens; through a
    draft of a cache the tokens only look.
    """
    model = nnx.merge(graph(config)[0], params)
    x_BTM, cache = model.hidden(tokens_BT, positions_BT, cache)
    return model.logits(x_BTM), cache


def first_step[C: (Cache, Prompt)](
    config: ModelConfig,
    params: Params,
    cache: C,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    chunk: int = 0,
) -> tuple[Float[Array, "B V"], C]:
    """`step` on rows whose cache is still empty, padded on the right, with the logits after each row's last token alone.

    With a `chunk` so many tokens enter at once, each such part before the next one is read: the memory that this takes is the cache's
    and a chunk's, however long the rows are, and tokens see of the past what the cache kept of it.
    """
    if 0 < chunk < tokens_BT.shape[1]:
        return next_step(config, params, cache, tokens_BT, positions_BT, chunk)
    if isinstance(cache, Cache) and cache.rereads:
        whole = Prompt(config.layer_heads, cache.context, cache.rereads)
        last_BV, whole = first_step(config, params, whole, tokens_BT, positions_BT)
        return last_BV, whole.enter(cache, positions_BT)
    model = nnx.merge(graph(config)[0], params)
    x_BTM, cache = model.hidden(tokens_BT, positions_BT, cache, fresh=True)
    last_BV = model.logits(_last(x_BTM, positions_BT)[:, None])[:, 0]
    if isinstance(cache, Prompt) and cache.rereads:
        cache = _read_again(model, cache, tokens_BT, positions_BT)
    return last_BV, cache.answering()


def _read_again(model: GPT, prompt: Prompt, tokens_BT, positions_BT) -> Prompt:
    """The prompt with the numbers that a second reading makes, those of parts of one size at a time."""
    found: dict[Statistic, Any] = {}
    for part in dict.fromkeys(each.part for each in prompt.rereads):
        some = dataclasses.replace(prompt, rereads=tuple(each for each in prompt.rereads if each.part == part))
        numbers = _read_parts(model, some, tokens_BT, positions_BT, min(part, tokens_BT.shape[1]))
        found |= zip(some.rereads, zip(*numbers, strict=True), strict=True)
    numbers = tuple(zip(*(found[each] for each in prompt.rereads), strict=True))
    return dataclasses.replace(prompt, numbers=numbers)


def _read_parts(model: GPT, prompt: Prompt, tokens_BT, positions_BT, size: int) -> Any:
    """Each layer's numbers by a second reading, part by part, each after the last tokens of the one before."""
    B, T = tokens_BT.shape
    padded = -T % size
    wide = lambda x, fill: jnp.pad(x, ((0, 0), (LEAD, padded)), constant_values=fill)
    tokens, there = wide(tokens_BT, 0), wide(positions_BT, -1) >= 0
    longer = lambda x: jnp.pad(x, ((0, 0), (0, padded), *((0, 0),) * (x.ndim - 2)))
    parts = jax.tree.map(longer, prompt.parts)
    whole = dataclasses.replace(prompt, parts=parts)
    none = tuple(tuple(jnp.zeros((B, heads.kv, T + padded)) for _ in prompt.rereads) for heads in prompt.heads)
    length_B1 = (positions_BT >= 0).sum(-1, keepdims=True)

    def again(numbers, start):
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, LEAD + size, 1)
        positions = jnp.where(cut(there), length_B1 + cut(there).cumsum(-1) - 1, -1)
        part = Reread(whole, wide(positions_BT, -1)[:, LEAD:], start, numbers, size)
        if any(each.sensitive for each in prompt.rereads):
            slopes = jax.grad(functools.partial(size_of, part, cut(tokens), positions))(
                (0 * positions.astype(jnp.float32),) * len(whole.parts)
            )
            part = dataclasses.replace(part, effects=effects, slopes=slopes)
        _, part = model.hidden(cut(tokens), positions, part)
        return part.numbers, None

    def size_of(part: Reread, tokens, positions, gauges):
        """The squared residual stream of a part's tokens."""
        x_BTM, _ = model.stream(tokens, positions, dataclasses.replace(part, numbers=(), gauges=gauges))
        return jnp.where(positions[..., None] >= 0, x_BTM.astype(jnp.float32) ** 2, 0).sum()

    def effect(block, part):
        return jnp.linalg.norm(block.attention.added(part[2]), axis=-1).transpose(0, 2, 3, 1)

    effects = tuple(map(effect, model.layers, whole.parts))

    numbers, _ = lax.scan(again, none, jnp.arange(0, T + padded, size))
    return jax.tree.map(lambda x: x[:, :, :T], numbers)


def next_step[C: (Cache, Prompt)](
    config: ModelConfig,
    params: Params,
    cache: C,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, "B V"], C]:
    """`first_step` on rows of which the cache may hold the past; their positions go on from there.

    Raises BadInput for a cache whose prompt is read twice: of that nothing may have left.
    """
    if isinstance(cache, Cache) and cache.rereads:
        raise BadInput("a cache that reads its prompt twice takes it at once, not in parts or turns")
    B, T = tokens_BT.shape
    parts = -(-T // chunk)
    cut = lambda x, fill: (
        jnp.pad(x, ((0, 0), (0, parts * chunk - T)), constant_values=fill).reshape(B, parts, chunk).swapaxes(0, 1)
    )

    def enter(carry, part):
        (last_BM, cache), (tokens_BC, positions_BC) = carry, part
        x_BCM, cache = nnx.merge(graph(config)[0], params).hidden(tokens_BC, positions_BC, cache)
        there_B1 = (positions_BC >= 0).any(-1, keepdims=True)
        return (jnp.where(there_B1, _last(x_BCM, positions_BC), last_BM), cache), None

    none_BM = jnp.zeros((B, config.width), config.dtype)
    (last_BM, cache), _ = lax.scan(enter, (none_BM, cache), (cut(tokens_BT, 0), cut(positions_BT, -1)))
    model = nnx.merge(graph(config)[0], params)
    return model.logits(last_BM[:, None])[:, 0], cache.answering()


def _last(x_BTM, positions_BT):
    """What is at each row's newest position."""
    return jnp.take_along_axis(x_BTM, positions_BT.argmax(-1)[:, None, None], 1)[:, 0]
