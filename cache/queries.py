"""What layers remember of their queries, what those attend to, and queries and keys before and after RoPE."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvcascade.cache.statistic import Memory, Tokens
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.rotation import Rotation, rotation, turn, turned_back


@dataclasses.dataclass(frozen=True)
class QueryMean(Memory):
    """The sum of a layer's queries before RoPE, but for the first so many, of each query head: a direction."""

    skip: int = 0

    def init(self, batch, heads, ids):
        return jnp.zeros((batch, heads.kv, heads.queries // heads.kv, heads.width))

    def update(self, memory, q_BTNH, positions_BT, heads):
        return memory + _grouped(q_BTNH, _from(self.skip, positions_BT), heads, memory.shape[1]).sum(1)


@dataclasses.dataclass(frozen=True)
class QueryMoments(Memory):
    """The number, the sum and the sum of squares, or of outer products, of a layer's queries before RoPE, but for the first so many, of each query head."""

    outer: bool = False
    skip: int = 0

    def init(self, batch, heads, ids):
        shape = (batch, heads.kv, heads.queries // heads.kv, heads.width)
        squares = jnp.zeros((*shape, heads.width) if self.outer else shape)
        return jnp.zeros((batch, heads.kv)), jnp.zeros(shape), squares

    def update(self, memory, q_BTNH, positions_BT, heads):
        count, total, squares = memory
        positions_BT = _from(self.skip, positions_BT)
        q = _grouped(q_BTNH, positions_BT, heads, total.shape[1])
        number_B1 = (positions_BT >= 0).sum(1, keepdims=True)
        more = jnp.einsum("BTKGH,BTKGJ->BKGHJ", q, q) if self.outer else (q**2).sum(1)
        return count + number_B1, total + q.sum(1), squares + more


@dataclasses.dataclass(frozen=True)
class QueryPairs(Memory):
    """The number, the sum, and the sum of the sizes of RoPE's pairs of channels of a layer's queries before RoPE, of each query head."""

    def init(self, batch, heads, ids):
        shape = (batch, heads.kv, heads.queries // heads.kv, heads.width)
        return jnp.zeros((batch, heads.kv)), jnp.zeros(shape), jnp.zeros((*shape[:3], heads.width // 2))

    def update(self, memory, q_BTNH, positions_BT, heads):
        count, total, sizes = memory
        q = _grouped(q_BTNH, positions_BT, heads, total.shape[1])
        return count + (positions_BT >= 0).sum(1, keepdims=True), total + q.sum(1), sizes + pairs(q).sum(1)


@dataclasses.dataclass(frozen=True)
class LastQueries(Memory):
    """The last so many queries of a layer as they attend, and their positions."""

    count: int = 32

    def init(self, batch, heads, ids):
        shape = (batch, heads.kv, self.count)
        return jnp.zeros((*shape, heads.queries // heads.kv, heads.width)), jnp.full(shape, -1, jnp.int32)

    def update(self, memory, q_BTNH, positions_BT, heads):
        held_BKQGH, pos_BKQ = memory
        B, T, N, H = q_BTNH.shape
        K, now_B1 = held_BKQGH.shape[1], positions_BT.max(1, keepdims=True)
        wanted_BQ = now_B1 - (now_B1 - jnp.arange(self.count)) % self.count  # the newest position of each place
        found_BQT = (positions_BT[:, None] == wanted_BQ[..., None]) & (wanted_BQ[..., None] >= 0)
        new_BQ, at_BQ = found_BQT.any(-1), found_BQT.argmax(-1)
        q_BQNH = jnp.take_along_axis(q_BTNH, at_BQ[..., None, None], 1).astype(held_BKQGH.dtype)
        q_BKQGH = q_BQNH.reshape(B, self.count, K, N // K, H).swapaxes(1, 2)
        held = jnp.where(new_BQ[:, None, :, None, None], q_BKQGH, held_BKQGH)
        return held, jnp.where(new_BQ[:, None], wanted_BQ[:, None], pos_BKQ).astype(jnp.int32)


def _from(skip: int, positions_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions, the first so many made padding: at the start of a text queries are unlike all later ones."""
    return jnp.where(positions_BT < skip, -1, positions_BT)


def _grouped(q_BTNH, positions_BT, heads: Heads, K: int) -> Float[Array, "B T K G H"]:
    """Queries before RoPE, by KV head; zeros where padding is."""
    B, T, N, H = q_BTNH.shape
    if heads.rope is not None:
        q_BTNH = turned_back(q_BTNH, rotation(positions_BT, H, heads.rope))
    return jnp.where((positions_BT >= 0)[..., None, None], q_BTNH, 0).reshape(B, T, K, N // K, H)


def shares(
    q_BKQGH: Float[Array, "B K Q G H"],
    pos_BKQ: Int[Array, "B K Q"],
    k_BKSH: Float[Array, "B K S H"],
    pos_BKS: Int[Array, "B K S"],
    heads: Heads,
    pooled: bool = False,
) -> Float[Array, "B K _ Q S"]:
    """What queries give of their attention to each of these keys alone; at position -1 neither is there. `pooled`: by the largest logit of a group's heads."""
    age = pos_BKQ[:, :, None, :, None] - pos_BKS[:, :, None, None]
    sees = heads.sees(age) & (pos_BKQ[:, :, None, :, None] >= 0) & (pos_BKS[:, :, None, None] >= 0)
    logits = heads.capped(heads.scale * jnp.einsum("BKQGH,BKSH->BKGQS", q_BKQGH, k_BKSH))
    if pooled:
        logits = logits.max(2, keepdims=True)
    logits = jnp.where(sees, logits, -jnp.inf)
    weights = jnp.exp(logits - jnp.maximum(logits.max(-1, keepdims=True), -1e30))
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)


def before_rope(k_BKSH, pos_BKS, heads: Heads) -> Float[Array, "B K S H"]:
    """Keys as they were before they were turned to their positions."""
    if heads.rope is None:
        return k_BKSH
    B, K, S, H = k_BKSH.shape
    flat = turned_back(k_BKSH.reshape(B * K, S, 1, H), rotation(pos_BKS.reshape(B * K, S), H, heads.rope))
    return flat.reshape(k_BKSH.shape)


def pairs(x: Float[Array, "... H"]) -> Float[Array, "... F"]:
    """The size of each pair of channels that RoPE turns together."""
    first, second = jnp.split(x, 2, -1)
    return jnp.sqrt(first**2 + second**2)


def ahead(held: Tokens, offsets: np.ndarray) -> Rotation | None:
    """The mean of RoPE's turns to positions so far beyond the next one."""
    if held.heads.rope is None:
        return None
    next_BT = held.now_B11[:, 0] + 1 + jnp.asarray(offsets, jnp.int32)
    cos, sin = rotation(next_BT, held.k_BKSH.shape[-1], held.heads.rope)
    return cos.mean(1, keepdims=True), sin.mean(1, keepdims=True)


def turned(x: Float[Array, "B ... H"], by: Rotation | None) -> Float[Array, "B ... H"]:
    """Vectors of each row turned alike."""
    return x if by is None else turn(x.reshape(len(x), 1, -1, x.shape[-1]), by).reshape(x.shape)


def turned_variance(x: Float[Array, "B ... H"], by: Rotation | None) -> Float[Array, "B ... H"]:
    """The variances of channels that are turned, had those before no covariance."""
    return x if by is None else turned(x, (by[0] ** 2, by[1] ** 2))
