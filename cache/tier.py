"""A fixed number of slots with a policy and a codec."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvcascade.cache.codec import Codec, Stored, bf16
from kvcascade.cache.errors import BadInput
from kvcascade.cache.policy import Full, Heavy, Policy, PositionAware, Random, Recent, Sink, text


@dataclasses.dataclass(frozen=True)
class Tier:
    """What a tier is: its policy, its slots per KV head (a number, or a share of the context such as `25%`), its codec."""

    policy: Policy
    count: int | str
    codec: Codec = bf16

    def __post_init__(self):
        if isinstance(self.count, str):
            if not re.fullmatch(r"\d+(\.\d+)?%", self.count) or not 0 < float(self.count[:-1]) <= 100:
                raise BadInput(f"{self.count!r} is not a share of the context between 0% and 100%")
        elif self.count < 1:
            raise BadInput(f"a tier needs at least 1 slot, not {self.count}")
        if isinstance(self.policy, Full) and self.count != "100%":
            raise BadInput("full keeps the whole context and takes no number of slots")

    def slots(self, context: int) -> int:
        """Slots per KV head for a context of so many tokens; a share is rounded, to at least one."""
        if isinstance(self.count, str):
            return max(1, round(context * float(self.count[:-1]) / 100))
        return self.count

    def nbytes(self, context: int, head_dim: int, scored: bool) -> int:
        """Predicted bytes per row, layer and KV head: codes and scales of K and V, an int32 position, a float32 score if kept."""
        return self.slots(context) * (2 * self.codec.nbytes(head_dim) + 4 + 4 * scored)

    def __str__(self) -> str:
        count = "" if isinstance(self.policy, Full) else f" {self.count}"
        return text(self.policy) + count + ("" if self.codec == bf16 else f"@{self.codec.name}")


full = Tier(Full(), "100%")
sink = functools.partial(Tier, Sink())
recent = functools.partial(Tier, Recent())
heavy = functools.partial(Tier, Heavy())
random = functools.partial(Tier, Random())
position_aware = functools.partial(Tier, PositionAware())


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "pos_BKT", "score_BKT"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Entry:
    """Tokens on their way into a tier, per KV head; position -1 is no token."""

    k: Float[Array, "B K T H"]
    v: Float[Array, "B K T H"]
    pos_BKT: Int[Array, "B K T"]
    score_BKT: Float[Array, "B K T"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "pos_BKS", "score_BKS"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Slots:
    """What a tier holds in one layer: encoded keys and values, the position in each slot (-1: empty), the score if one is kept."""

    k: Stored
    v: Stored
    pos_BKS: Int[Array, "B K S"]
    score_BKS: Float[Array, "B K S"] | None


def empty(tier: Tier, batch: int, kv_heads: int, head_dim: int, context: int, scored: bool) -> Slots:
    """Slots that hold nothing."""
    shape = (batch, kv_heads, tier.slots(context))
    encode = lambda: tier.codec.encode(jnp.zeros((*shape, head_dim)))
    return Slots(encode(), encode(), jnp.full(shape, -1, jnp.int32), jnp.zeros(shape) if scored else None)


def take_in(
    tier: Tier, slots: Slots, entry: Entry, now_B11: Int[Array, "B 1 1"], keep_now: bool
) -> tuple[Slots, Entry]:
    """Offer T tokens to a tier; return its slots after it kept the S best of S + T, and the T tokens that it did not keep.

    The i-th worst slot is exchanged for the i-th best newcomer while the newcomer's priority is higher: an empty slot always loses,
    a slot that stays is not written again, so nothing is quantised twice, and a tie leaves things as they are.
    With `keep_now` the token at position `now` cannot be refused.
    """
    S, T = slots.pos_BKS.shape[-1], entry.pos_BKT.shape[-1]
    pos = jnp.concatenate([slots.pos_BKS, entry.pos_BKT], -1)
    if slots.score_BKS is None:
        score = jnp.zeros(pos.shape)
    else:
        score = jnp.concatenate([slots.score_BKS, entry.score_BKT], -1)
    priority = jnp.maximum(tier.policy.priority(pos, score, now_B11), jnp.finfo(jnp.float32).min)
    priority = jnp.where(pos < 0, -jnp.inf, priority)
    if keep_now:
        priority = jnp.where((pos >= 0) & (pos == now_B11), jnp.inf, priority)
    rank_slots, rank_new = priority[..., :S], priority[..., S:]
    if T == 1:
        slot, new = _argmin(rank_slots), jnp.zeros_like(entry.pos_BKT)
    else:
        slot, new = jnp.argsort(rank_slots)[..., :T], jnp.argsort(-rank_new)[..., :S]
    swap = jnp.take_along_axis(rank_new, new, -1) > jnp.take_along_axis(rank_slots, slot, -1)

    def exchange(held, offered, encode=lambda x: x, decode=lambda x: x):
        """Both sides after the exchange; rows of `held` and `offered` are slots and tokens, with or without a vector's axis."""
        coming = encode(jnp.take_along_axis(offered, _over(new, offered), 2))
        leaving = decode(jax.tree.map(lambda x: jnp.take_along_axis(x, _over(slot, x), 2), held))
        left = jnp.where(_over(swap, leaving), leaving, jnp.take_along_axis(offered, _over(new, offered), 2))
        held = jax.tree.map(lambda x, y: _put(x, jnp.where(swap, slot, S), y), held, coming)
        return held, left if T == 1 else _put(offered, new, left)

    k, left_k = exchange(slots.k, entry.k, tier.codec.encode, tier.codec.decode)
    v, left_v = exchange(slots.v, entry.v, tier.codec.encode, tier.codec.decode)
    pos, left_pos = exchange(slots.pos_BKS, entry.pos_BKT)
    score, left_score = (
        (None, entry.score_BKT) if slots.score_BKS is None else exchange(slots.score_BKS, entry.score_BKT)
    )
    return Slots(k, v, pos, score), Entry(left_k, left_v, left_pos, left_score)


def _argmin(x_BKS):
    # Two plain reductions: XLA:CPU does not vectorise the (value, index) reduction of `jnp.argmin`.
    least = x_BKS == x_BKS.min(-1, keepdims=True)
    return jnp.where(least, jnp.arange(x_BKS.shape[-1]), x_BKS.shape[-1]).min(-1, keepdims=True)


def _over(index_BKT, like):
    """The index with a last axis of one where `like` has vectors."""
    return index_BKT[..., None] if like.ndim == 4 else index_BKT


def _put(x, index_BKT, values):
    """Write values into slots; an index past the end writes nothing."""
    B, K, _ = index_BKT.shape
    return x.at[jnp.arange(B)[:, None, None], jnp.arange(K)[:, None], index_BKT].set(values, mode="drop")
