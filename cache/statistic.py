"""What a policy may read of a token besides its position: numbers that tokens carry, and what a layer remembers beside them.

A statistic is a frozen dataclass with some of three rules; the laws (tests/test_laws.py) replay the rules of whatever a policy reads.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvcascade.kernels.heads import Heads

GRACE = 1e29
"""What a reviewed number may be until its first review: its token stays, unless others are pinned or newest."""

FIRST = 5e29
"""The number of one of the first tokens, where a method keeps them whatever comes: they do not go before those that wait for a review."""


class Tokens(NamedTuple):
    """What a rule may look at: tokens of one layer, keys and values in float32, as the model made them or as they are stored."""

    pos_BKS: Int[Array, "B K S"]
    k_BKSH: Float[Array, "B K S H"]
    v_BKSW: Float[Array, "B K S W"]
    now_B11: Int[Array, "B 1 1"]
    """The newest position of each row, -1 where the call has none."""
    memories: tuple[Any, ...]
    """The memories that the statistic reads, in that order."""
    heads: Heads
    written_BKS: Float[Array, "B K S"] | None = None
    """What each value adds to the residual stream, its L1 norm, the mean over the group's heads; of tokens that enter alone."""
    q_BTNH: Float[Array, "B S N H"] | None = None
    """Their queries; of tokens that enter alone."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Something that a layer remembers beside its tokens: arrays [B, K, …], which a policy or a statistic `reads`."""

    def init(self, batch: int, heads: Heads, ids: Sequence[int]) -> Any:
        """What is remembered at first by KV heads of these numbers."""
        raise NotImplementedError

    def update(
        self, memory: Any, q_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], heads: Heads
    ) -> Any:
        """What is remembered after a call with these queries; position -1 is padding.

        Of the heads a device may have some alone: how many there are, the arrays say.
        """
        return memory

    def nbytes(self, heads: Heads) -> int:
        """Bytes per row and layer."""
        shapes = jax.eval_shape(lambda: self.init(1, heads, range(heads.kv)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


LEAST = 32
"""Positions between two reviews, at least."""


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A number that every token carries through the tiers, float32 per KV head; equal statistics are stored once.

    A statistic that says nothing else begins at 0 and stays.
    """

    part: ClassVar[int] = 2048
    """Tokens of a prompt that are read again at once, where it is read a second time (KVzip, §3.3)."""
    sensitive: ClassVar[bool] = False
    """Whether `reread` is told of shares times the L2 norm of what their value then writes, and times that of the gradient of the model's
    last hidden states with respect to what their query's attention wrote."""
    last: int = 0
    """Of a call's queries only the mass of the last so many is watched; 0: of all."""
    every: int = 0
    """A row's numbers are reviewed when it has a position that is a multiple of this, and in each call of many tokens; 0: of `period`."""

    def reads(self) -> tuple[Memory, ...]:
        """The memories that a review looks at."""
        return ()

    def enter(self, new: Tokens) -> Float[Array, "B K T"]:
        """What tokens begin with."""
        return jnp.zeros(new.pos_BKS.shape, jnp.float32)

    def watch(
        self,
        number_BKS: Float[Array, "B K S"],
        mass_BKS: Float[Array, "B K S"],
        pos_BKS: Int[Array, "B K S"],
        now_B11: Int[Array, "B 1 1"],
        new_B11: Int[Array, "B 1 1"],
    ) -> Float[Array, "B K S"]:
        """The numbers after a call whose last queries gave the tokens so much attention, summed over queries and query heads.

        `new` is how many of a row's positions the call has, the last of them `now`.
        """
        return number_BKS

    def among(self, mass_BKT: Float[Array, "B K T"], pos_BKT: Int[Array, "B K T"]) -> Float[Array, "B K T"]:
        """What `watch` is told of a call's own tokens for the attention that they got."""
        return mass_BKT

    def reread(
        self, number_BKS: Float[Array, "B K S"], share_BKGQS: Float[Array, "B K G Q S"]
    ) -> Float[Array, "B K S"]:
        """The numbers of a prompt's tokens after queries that read it a second time gave them such shares of their attention."""
        return number_BKS

    def review(self, number_BKS: Float[Array, "B K S"], held: Tokens) -> Float[Array, "B K S"]:
        """The numbers reckoned anew from all that a head holds and is offered; position -1 is an empty slot.

        A number is NaN of a token in a tier that has not kept it, since nobody there or below reads it.
        """
        return number_BKS

    @property
    def watches(self) -> bool:
        """Whether attention changes the numbers, so that its mass is collected."""
        return type(self).watch is not Statistic.watch

    @property
    def reviews(self) -> bool:
        """Whether the numbers are reviewed."""
        return type(self).review is not Statistic.review

    def period(self, slots: int) -> int:
        """Positions from one review to the next in a layer of so many slots: unless `every` says, an eighth of them, at least LEAST.

        A review looks at all slots, so that a position's share of it stays the same however many there are.
        """
        return self.every or max(LEAST, slots // 8)

    @property
    def rereads(self) -> bool:
        """Whether a prompt must be read a second time, before anything of it leaves."""
        return type(self).reread is not Statistic.reread


@dataclasses.dataclass(frozen=True)
class Mass(Statistic):
    """All the attention that a token has received (H2O, Zhang et al. 2023, §4.2)."""

    def watch(self, number_BKS, mass_BKS, pos_BKS, now_B11, new_B11):
        return number_BKS + mass_BKS


@dataclasses.dataclass(frozen=True)
class HeadIds(Memory):
    """A number for every KV head of every layer, the same however the heads are shared among devices: [B, K] int32."""

    def init(self, batch, heads, ids):
        return jnp.broadcast_to(jnp.asarray([*ids], jnp.int32), (batch, heads.kv))
