"""Tiers in a row: what one tier evicts, the next takes in; the last one forgets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvcascade.cache.codec import f32
from kvcascade.cache.errors import BadInput
from kvcascade.cache.policy import Full
from kvcascade.cache.tier import Tier, empty, take_in
from kvcascade.kernels.causal import causal_attention
from kvcascade.kernels.decode import decode
from kvcascade.kernels.partial import attend_all
from kvcascade.kernels.prefill import observed_attention
from kvcascade.kernels.slots import Entry, Format, Slots


@dataclasses.dataclass(frozen=True, init=False)
class Cascade:
    """The cache of one layer as a value: `Cascade(sink(4), recent(60), heavy(64, codec=int8))`."""

    tiers: tuple[Tier, ...]

    def __init__(self, *tiers: Tier):
        if not tiers:
            raise BadInput("a cascade needs at least one tier")
        if any(isinstance(tier.policy, Full) for tier in tiers[:-1]):
            raise BadInput("nothing passes a full tier, so it must be the last")
        object.__setattr__(self, "tiers", tiers)

    def __str__(self) -> str:
        return " | ".join(map(str, self.tiers))

    def scored(self, index: int) -> bool:
        """Whether a tier keeps scores: when it or a tier below reads them, since a token carries its score down."""
        return any(tier.policy.observes for tier in self.tiers[index:])

    def slots(self, context: int) -> int:
        """Tokens kept per KV head, at most the context."""
        return min(context, sum(tier.slots(context) for tier in self.tiers))

    def nbytes(self, context: int, kv_heads: int, head_dim: int) -> int:
        """Predicted bytes of one row in one layer."""
        return kv_heads * sum(tier.nbytes(context, head_dim, self.scored(i)) for i, tier in enumerate(self.tiers))

    def init(self, batch: int, kv_heads: int, head_dim: int, context: int) -> "LayerCache":
        """An empty cache of one layer."""
        slots = (empty(tier, batch, kv_heads, head_dim, context, self.scored(i)) for i, tier in enumerate(self.tiers))
        return LayerCache(self, tuple(slots))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["slots"], meta_fields=["cascade"])
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer's cascade holds."""

    cascade: Cascade
    slots: tuple[Slots, ...]

    def step(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        positions_BT: Int[Array, "B T"],
        window: int = 0,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B T N H"], "LayerCache"]:
        """Put this call's tokens into the cascade and attend from them; position -1 is padding, a `window` limits what they see.

        T = 1 (decode): the token enters, then attends to what the cascade holds.
        T > 1 (prefill): the tokens attend to what the cascade held and causally to each other, then enter all at once.
        `fresh` says that it holds nothing yet, and that padding is on the right.
        """
        B, T, K, H = k_BTKH.shape
        pos_BKT = jnp.broadcast_to(positions_BT[:, None], (B, K, T))
        # Tokens travel in float32 also from a bf16 model: what a tier decodes on the way down must not be rounded again.
        to_slots = lambda x_BTKH: x_BTKH.astype(jnp.float32).transpose(0, 2, 1, 3)
        entry = Entry(to_slots(k_BTKH), to_slots(v_BTKH), pos_BKT, jnp.zeros((B, K, T)))
        now_B11 = positions_BT.max(-1)[:, None, None]
        if T == 1:
            cache = self.append(entry, now_B11)
            out_BNH, mass = decode(q_BTNH[:, 0], positions_BT[:, 0], cache.held, cache.observed, window)
            return out_BNH[:, None].astype(q_BTNH.dtype), cache.observe(mass)
        if fresh:
            if self.observed:
                length_B = (positions_BT >= 0).sum(-1)
                out_BTNH, mass_BKT = observed_attention(q_BTNH, k_BTKH, v_BTKH, length_B, window)
                entry = dataclasses.replace(entry, score_BKT=mass_BKT)
            else:
                out_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, window)
            return out_BTNH, self.append(entry, now_B11)
        among = (Slots(f32.encode(entry.k), f32.encode(entry.v), pos_BKT, None), f32)
        out_BTNH, mass = attend_all(q_BTNH, positions_BT, [*self.held, among], self.observed, window)
        cache = self.observe(mass[:-1])
        entry = dataclasses.replace(entry, score_BKT=mass[-1]) if self.observed else entry
        return out_BTNH.astype(q_BTNH.dtype), cache.append(entry, now_B11)

    @property
    def observed(self) -> bool:
        """Whether some tier keeps scores, so that attention mass is collected."""
        return self.cascade.scored(0)

    @property
    def held(self) -> list[tuple[Slots, Format]]:
        """Every tier's slots, and how they are stored."""
        return [(slots, tier.codec) for tier, slots in zip(self.cascade.tiers, self.slots, strict=True)]

    @jax.named_scope("scores")
    def observe(self, mass: list[Float[Array, "B K _"]]) -> "LayerCache":
        """Add the attention mass that each tier's slots received to their scores, where those are kept."""
        if not self.observed:
            return self
        slots = (
            s if s.score_BKS is None else dataclasses.replace(s, score_BKS=s.score_BKS + m)
            for s, m in zip(self.slots, mass, strict=True)
        )
        return dataclasses.replace(self, slots=tuple(slots))

    def append(self, entry: Entry, now_B11: Int[Array, "B 1 1"]) -> "LayerCache":
        """Tier 0 takes the tokens in, its victims go to tier 1, and so on; what the last tier does not keep is forgotten.

        The token at `now` is never forgotten in its own step: the last tier cannot refuse it.
        """
        held = []
        for index, (tier, slots) in enumerate(zip(self.cascade.tiers, self.slots, strict=True), 1):
            slots, left = take_in(tier, slots, entry, now_B11, last=index == len(self.slots))
            held.append(slots)
            entry = left or entry
        return dataclasses.replace(self, slots=tuple(held))


type Cache = tuple[LayerCache, ...]
"""A model's cache: one cascade's slots per layer."""


def nbytes(cache: Cache) -> int:
    """Measured bytes: the sum over the cache's device buffers, positions and scores included."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
