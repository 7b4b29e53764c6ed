"""Policies made for the laws: each uses a rule that the others do not, or has ties everywhere."""

import dataclasses

import jax.numpy as jnp

from kvcascade.cache.policy import Policy
from kvcascade.cache.statistic import GRACE, Memory, Statistic


@dataclasses.dataclass(frozen=True)
class Even(Policy):
    """All alike: what stays is decided by ties."""

    def priority(self, pos_BKS, read, now_B11):
        return jnp.zeros(pos_BKS.shape)


@dataclasses.dataclass(frozen=True)
class LastUse(Statistic):
    """The last position whose query gave the token at least this share of its attention, one less for each call with a query since."""

    last: int = 1
    least: float = 0.2

    def enter(self, new):
        return new.pos_BKS.astype(new.k_BKSH.dtype)

    def watch(self, number_BKS, mass_BKS, pos_BKS, now_B11, new_B11):
        return jnp.where(mass_BKS >= self.least, now_B11.astype(number_BKS.dtype), number_BKS - 1)


@dataclasses.dataclass(frozen=True)
class Used(Policy):
    """Keep what was used last: many tokens have the same number."""

    def reads(self):
        return (LastUse(),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class KeyNorm(Statistic):
    """A number that is made when a token enters."""

    def enter(self, new):
        return jnp.sqrt((new.k_BKSH**2).sum(-1))


@dataclasses.dataclass(frozen=True)
class QuerySum(Memory):
    """The sum of a layer's queries, those of a group together."""

    def init(self, batch, heads, ids):
        return jnp.zeros((batch, heads.kv, heads.width))

    def update(self, memory, q_BTNH, positions_BT, heads):
        B, T, N, H = q_BTNH.shape
        there_BTNH = jnp.where((positions_BT >= 0)[..., None, None], q_BTNH, 0)
        return memory + there_BTNH.reshape(B, T, -1, N // memory.shape[1], H).sum((1, 3))


@dataclasses.dataclass(frozen=True)
class Wanted(Statistic):
    """A number that is reviewed, from all keys and from a memory."""

    every: int = 3

    def reads(self):
        return (QuerySum(),)

    def enter(self, new):
        return jnp.full(new.pos_BKS.shape, GRACE, new.k_BKSH.dtype)

    def review(self, number_BKS, held):
        there_BKS1 = (held.pos_BKS >= 0)[..., None]
        mean_BK1H = jnp.where(there_BKS1, held.k_BKSH, 0).sum(2, keepdims=True) / jnp.maximum(
            there_BKS1.sum(2, keepdims=True), 1
        )
        return ((held.k_BKSH - mean_BK1H) * held.memories[0][:, :, None]).sum(-1)


@dataclasses.dataclass(frozen=True)
class Sought(Policy):
    """Two numbers at once, one of them decayed by nothing else than a review."""

    weight: float = 0.5

    def reads(self):
        return Wanted(), KeyNorm()

    def priority(self, pos_BKS, read, now_B11):
        return jnp.minimum(read[0], 1e6) - self.weight * read[1]


PLANTED: dict[str, type[Policy]] = {"even": Even, "used": Used, "sought": Sought}
