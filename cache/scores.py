"""The numbers that published methods rank tokens by: those that attention makes, and those that a token has by itself.

Rules are of one KV head at a time; what a paper says of a query head is summed over those that share the KV head, which ranks alike.
"""

import dataclasses

import jax.numpy as jnp

from kvcascade.cache.segments import Segments, neighbours
from kvcascade.cache.statistic import FIRST, Statistic

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
        # The last queries attend to one another most, and what stands before them has earned none of that.
        before = pos_BKT <= pos_BKT.max(-1, keepdims=True) - self.last
        mean = lambda of: neighbours(jnp.where(of, mass_BKT, 0), pos_BKT, self.kernel)
        return jnp.where(before, mean(before), mean(~before))

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


@dataclasses.dataclass(frozen=True)
class Repeated(Statistic):
    """The largest share of its attention that a query head gives the token of a prompt that is read a second time."""

    def reread(self, number_BKS, share_BKGQS):
        return jnp.maximum(number_BKS, share_BKGQS.max((2, 3)))


@dataclasses.dataclass(frozen=True)
class Sensitivity(Repeated):
    """The largest effect on the last hidden states that a second reading has through the token."""

    part = 512
    sensitive = True


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


@dataclasses.dataclass(frozen=True)
class NonCausalMass(Statistic):
    """What the queries of a call's blocks of `size` tokens give each token of the block, before and after it, by logits that are not scaled,
    times the value's norm; the mean over the group's heads and over three neighbours.

    A token that comes alone gives all to itself. The first `sinks` tokens are out of question, and take no part.
    """

    size: int = 256
    sinks: int = 0

    def enter(self, new):
        norm_BKT, (B, K, T) = jnp.linalg.norm(new.v_BKSW, axis=-1), new.pos_BKS.shape
        first = (new.pos_BKS >= 0) & (new.pos_BKS < self.sinks)
        if T == 1:
            return jnp.where(first, FIRST, norm_BKT)
        assert new.q_BTNH is not None
        pos_BKT = jnp.where(first, -1, new.pos_BKS)
        blocks = Segments.of(pos_BKT, min(self.size, T))
        there_BKCS = blocks.there
        q_BKTX = new.q_BTNH.reshape(B, T, K, -1).swapaxes(1, 2)  # a KV head's queries side by side
        q_BKCQGH = blocks.cut(q_BKTX).reshape(*there_BKCS.shape, -1, new.k_BKSH.shape[-1])
        logits = jnp.einsum("BKCQGH,BKCSH->BKCQGS", q_BKCQGH, blocks.cut(new.k_BKSH))
        logits = jnp.where(there_BKCS[:, :, :, None, None], logits, -1e30)
        weights = jnp.exp(logits - logits.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True) * there_BKCS[..., None, None]
        mass_BKT = blocks.put(weights.mean(4).sum(3), 0.0)
        return jnp.where(first, FIRST, neighbours(mass_BKT * norm_BKT, pos_BKT, 3))
