"""The numbers that published methods rank tokens by: those that attention makes, and those that a token has by itself.

Rules are of one KV head at a time; what a paper says of a query head is summed over those that share the KV head, which ranks alike.
"""

import dataclasses

import jax.numpy as jnp

from kvcascade.cache.statistic import Statistic

# Numbers that attention makes


@dataclasses.dataclass(frozen=True)
class LastMass(Statistic):
    """The attention of the newest query."""

    last: int = 1

    def watch(self, number_BKS, mass_BKS, pos_BKS, now_B11, new_B11):
        return mass_BKS


@dataclasses.dataclass(frozen=True)
class WindowMass(Statistic):
    """The attention of the queries in every other stretch of `last` positions: together with the other parity, of the last so many to twice that.

    A call of many tokens counts its last so many for the stretch that it ends in; what its own tokens got is averaged over `kernel` neighbours,
    as in SnapKV's code: none is nothing, and the last so many tokens are neighbours of one another alone.
    """

    parity: int = 0
    kernel: int = 1

    def among(self, mass_BKT, pos_BKT):
        T, k = mass_BKT.shape[-1], self.kernel
        if min(T, k) == 1:
            return mass_BKT
        # Tokens and padding may be in any order; padding is nobody's neighbour.
        order = jnp.argsort(jnp.where(pos_BKT < 0, jnp.iinfo(jnp.int32).max, pos_BKT), -1)
        mass, pos = (jnp.take_along_axis(x, order, -1) for x in (mass_BKT, pos_BKT))
        # The last queries attend to one another most, and what stands before them has earned none of that.
        before = pos <= pos.max(-1, keepdims=True) - self.last
        pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (k // 2, k - 1 - k // 2)))
        mean = lambda of: sum(pad(jnp.where(of & (pos >= 0), mass, 0))[..., i : i + T] for i in range(k)) / k
        return jnp.take_along_axis(jnp.where(before, mean(before), mean(~before)), jnp.argsort(order, -1), -1)

    def watch(self, number_BKS, mass_BKS, pos_BKS, now_B11, new_B11):
        latest = lambda now: (stretch := now // self.last) - (stretch - self.parity) % 2  # that is of this parity
        here = latest(now_B11) == now_B11 // self.last
        old = jnp.where(latest(now_B11) == latest(now_B11 - new_B11), number_BKS, 0)
        return old + jnp.where(here, mass_BKS, 0)


@dataclasses.dataclass(frozen=True)
class DecayedMass(Statistic):
    """Attention received, which counts half as much `life` positions later."""

    life: int = 64

    def watch(self, number_BKS, mass_BKS, pos_BKS, now_B11, new_B11):
        return number_BKS * jnp.exp2(-new_B11.astype(number_BKS.dtype) / self.life) + mass_BKS


@dataclasses.dataclass(frozen=True)
class Unused(Statistic):
    """Minus the positions since a query last gave the token at least so large a share of its attention, or since it came."""

    last: int = 1
    least: float = 0.01

    def watch(self, number_BKS, mass_BKS, pos_BKS, now_B11, new_B11):
        return jnp.where(mass_BKS >= self.least, 0, number_BKS - new_B11)


# Numbers that a token has by itself


@dataclasses.dataclass(frozen=True)
class KeyNorm(Statistic):
    """The Euclidean norm of the key."""

    def enter(self, new):
        return jnp.linalg.norm(new.k_BKSH, axis=-1)


@dataclasses.dataclass(frozen=True)
class ValueNorm(Statistic):
    """The norm of the value, of an order."""

    order: int = 1

    def enter(self, new):
        return jnp.linalg.norm(new.v_BKSW, ord=self.order, axis=-1)


@dataclasses.dataclass(frozen=True)
class OutputNorm(Statistic):
    """What the value adds to the residual stream: the L1 norm, the mean over the group's heads."""

    def enter(self, new):
        assert new.written_BKS is not None
        return new.written_BKS
