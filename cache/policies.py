"""The policies: a frozen dataclass with a `priority` each, and a line in `POLICIES`; its fields are its arguments in a spec's text.

The laws (tests/test_laws.py) draw from `POLICIES`, so they test a new one with no test written. Those of papers are in `published.py`.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp

from kvcascade.cache.learned import Learned
from kvcascade.cache.policy import PINNED, Policy, age, argument
from kvcascade.cache.published import (
    Chunks,
    Compactor,
    Critical,
    CurDkv,
    Decayed,
    Drop,
    Expected,
    HighLeverage,
    Hinted,
    KeyDiff,
    KvGrad,
    KvZip,
    Lag,
    LeastRecentlyUsed,
    LowKeyNorm,
    NonCausal,
    Observed,
    Reasoning,
    Snap,
    Tova,
    Trigonometric,
    ValueAware,
    Volume,
)
from kvcascade.cache.statistic import HeadIds, Mass


@dataclasses.dataclass(frozen=True)
class Full(Policy):
    """Keep everything: a full tier has a slot for every position of the context."""

    append_only: ClassVar[bool] = True

    def alike(self):
        return True

    def priority(self, pos_BKS, read, now_B11):
        return jnp.full(pos_BKS.shape, PINNED, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Recent(Policy):
    """Keep the newest positions: a sliding window (Longformer, Beltagy et al. 2020, §3.1)."""

    def alike(self):
        return True

    def priority(self, pos_BKS, read, now_B11):
        return age(pos_BKS, now_B11)


@dataclasses.dataclass(frozen=True)
class Sink(Policy):
    """Keep the first positions: attention sinks (StreamingLLM, Xiao et al. 2023, §3.2)."""

    append_only: ClassVar[bool] = True

    def alike(self):
        return True

    def priority(self, pos_BKS, read, now_B11):
        return -pos_BKS.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Heavy(Policy):
    """Keep the positions with most accumulated attention: heavy hitters (H2O, Zhang et al. 2023, §4.2)."""

    def reads(self):
        return (Mass(),)


@dataclasses.dataclass(frozen=True)
class Random(Policy):
    """Keep positions by lot: the baseline that every other policy must beat.

    Each (layer, head, position) draws once, so the kept set is a uniform sample of all positions seen and a row does not depend on others.
    """

    seed: int = 0

    def reads(self):
        return (HeadIds(),)

    def priority(self, pos_BKS, read, now_B11):
        # A 32-bit integer hash (Wellons' lowbias32): a counter-based draw that costs six operations a slot.
        u32 = jnp.uint32
        heads_BK1 = read[0].astype(u32)[..., None]
        # The digits of pi keep x from 0, whose hash is 0: the first position of the first head would always go first.
        x = pos_BKS.astype(u32) ^ (heads_BK1 * u32(0x9E3779B9) + u32(self.seed * 0x85EBCA6B + 0x243F6A88 & 0xFFFFFFFF))
        x = (x ^ (x >> 16)) * u32(0x7FEB352D)
        x = (x ^ (x >> 15)) * u32(0x846CA68B)
        return (x ^ (x >> 16)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class PositionAware(Policy):
    """Weigh attention mass, recency and being a sink: mass·m/max(m) + recency·pos/now + sink·[pos < sinks] (NeuroKV's position-aware score)."""

    mass: float = 0.6
    recency: float = 0.3
    sink: float = 0.1
    sinks: int = 1

    def reads(self):
        return (Mass(),)

    def priority(self, pos_BKS, read, now_B11):
        held_BKS = jnp.where(pos_BKS >= 0, read[0], 0)
        mass = held_BKS / jnp.maximum(held_BKS.max(-1, keepdims=True), 1e-30)
        recency = pos_BKS / jnp.maximum(now_B11, 1)
        return self.mass * mass + self.recency * recency + self.sink * (pos_BKS < self.sinks)


@dataclasses.dataclass(frozen=True)
class Pending(Policy):
    """Hold tokens back, and hand all over together when a position comes that is a multiple of their number.

    The tiers behind rank once for so many tokens, as R-KV's buffer has it (Cai et al. 2025), and KIVI's residual (Liu et al. 2024).
    """

    def alike(self):
        return True

    def priority(self, pos_BKS, read, now_B11):
        return age(pos_BKS, now_B11)


def text(policy: Policy) -> str:
    """A policy as it is written in a spec: its name, and its arguments where they differ from the defaults."""
    name = next(name for name, cls in NAMED.items() if cls is type(policy))
    fields = [f for f in dataclasses.fields(policy) if getattr(policy, f.name) != f.default]
    arguments = ",".join(f"{f.name}={argument(f.type).write(getattr(policy, f.name))}" for f in fields)
    return f"{name}[{arguments}]" if arguments else name


POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "sink": Sink,
    "recent": Recent,
    "heavy": Heavy,
    "random": Random,
    "position-aware": PositionAware,
    "observed": Observed,
    "decayed": Decayed,
    "tova": Tova,
    "snap": Snap,
    "lru": LeastRecentlyUsed,
    "vatp": ValueAware,
    "critical": Critical,
    "chunks": Chunks,
    "tri": Trigonometric,
    "key-norm": LowKeyNorm,
    "keydiff": KeyDiff,
    "lag": Lag,
    "curdkv": CurDkv,
    "leverage": HighLeverage,
    "non-causal": NonCausal,
    "compactor": Compactor,
    "expected": Expected,
    "capkv": Volume,
    "drop": Drop,
    "r-kv": Reasoning,
    "kvgrad": KvGrad,
    "kvzip": KvZip,
    "hinted": Hinted,
    "learned": Learned,
}
"""What chooses tokens."""

NAMED: Mapping[str, type[Policy]] = collections.ChainMap({"pending": Pending}, POLICIES)
"""What may stand in a spec's text."""
