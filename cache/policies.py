"""The policies: a frozen dataclass with a `priority` each, and a line in `POLICIES`; its fields are its arguments in a spec's text.

The laws (tests/test_laws.py) draw from `POLICIES`, so they test a new one with no test written. Published methods rank by the numbers of
`scores.py`. Where a paper keeps the first or the newest tokens besides, put `sink 4 | recent 60 |` before the policy.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvcascade.cache.policy import PINNED, Policy, Positive, age, argument
from kvcascade.cache.scores import (
    Capacity,
    ChunkMass,
    DecayedMass,
    ExpectedMass,
    KeyDifference,
    KeyNorm,
    LagDeviation,
    LastMass,
    Leverage,
    LocalLeverage,
    OutputChange,
    OutputNorm,
    PairMass,
    Redundancy,
    Unused,
    ValueNorm,
    WindowMass,
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

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


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
class Observed(Policy):
    """Keep what has had most attention per query that saw it (kvpress' observed attention)."""

    def reads(self):
        return (Mass(),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0] / (now_B11 - pos_BKS + 1)


@dataclasses.dataclass(frozen=True)
class Decayed(Policy):
    """Keep what has had most attention of late: it counts half as much `life` positions later (after Scissorhands, arXiv 2305.17118).

    The paper counts the queries that attend more than on average; this sums what they give.
    """

    life: Positive = 64

    def reads(self):
        return (DecayedMass(life=self.life),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class Tova(Policy):
    """Keep what the newest query attends to (TOVA, Oren et al. 2024, arXiv 2401.06104).

    Each head by itself or, as in the paper, all heads of a layer `together`.
    """

    together: bool = False

    def alike(self):
        return self.together

    def reads(self):
        return (LastMass(),)

    def priority(self, pos_BKS, read, now_B11):
        mass = read[0]
        return jnp.broadcast_to(mass.mean(1, keepdims=True), mass.shape) if self.together else mass


@dataclasses.dataclass(frozen=True)
class Snap(Policy):
    """Keep the last `window` tokens and what their queries attend to (SnapKV, Li et al. 2024, arXiv 2404.14469).

    While decoding, the queries are those of the last window or two. A prompt's tokens get the mean over `kernel` neighbours.
    """

    window: Positive = 32
    kernel: Positive = 5

    def reads(self):
        return tuple(WindowMass(last=self.window, parity=parity, kernel=self.kernel) for parity in (0, 1))

    def priority(self, pos_BKS, read, now_B11):
        return jnp.where(pos_BKS > now_B11 - self.window, PINNED, read[0] + read[1])


@dataclasses.dataclass(frozen=True)
class LeastRecentlyUsed(Policy):
    """Let go what no query has given a share of at least `least` for longest."""

    least: float = 0.01

    def reads(self):
        return (Unused(least=self.least),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class ValueAware(Policy):
    """Keep what has most attention times the value's L1 norm (VATP, Guo et al. 2024, arXiv 2406.12335)."""

    def reads(self):
        return Mass(), ValueNorm(order=1)

    def priority(self, pos_BKS, read, now_B11):
        return read[0] * read[1]


@dataclasses.dataclass(frozen=True)
class Critical(Policy):
    """Keep what has most attention times what its value writes (the second stage of CriticalKV, Feng et al. 2025, arXiv 2502.03805).

    The first stage keeps half of the slots by attention alone: `heavy 32 | critical 32`.
    """

    def reads(self):
        return Mass(), OutputNorm()

    def priority(self, pos_BKS, read, now_B11):
        return (read[0] + 1e-4) * read[1]


@dataclasses.dataclass(frozen=True)
class Chunks(Policy):
    """Keep whole chunks of `size` positions, those that got most attention from all heads (ChunkKV, arXiv 2502.00299, whose id is uncertain)."""

    size: Positive = 20
    every: Positive = 32

    def alike(self):
        return True

    def reads(self):
        return (ChunkMass(every=self.every, size=self.size),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class Trigonometric(Policy):
    """Keep the keys that the mean query would attend to at distances to come (TriAttention, arXiv 2604.04921).

    Query statistics are those of the row so far, where the paper calibrates them on a text; its normalisation of heads, which is
    uncertain, is left out: ranks are within a KV head.
    """

    future: Positive = 1024
    every: Positive = 128

    def reads(self):
        return (PairMass(every=self.every, future=self.future),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class LowKeyNorm(Policy):
    """Keep the keys of the lowest norm, which get much attention (Devoto et al. 2024, arXiv 2406.11430)."""

    def reads(self):
        return (KeyNorm(),)

    def priority(self, pos_BKS, read, now_B11):
        return -read[0]


@dataclasses.dataclass(frozen=True)
class KeyDiff(Policy):
    """Keep the keys least like the mean key (KeyDiff, Park et al. 2025, arXiv 2504.15364), compared every so many positions."""

    every: Positive = 32

    def reads(self):
        return (KeyDifference(every=self.every),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class Lag(Policy):
    """Keep what is spread most on the scale of the `size` tokens after its block, besides `sinks` and the last blocks (LagKV, arXiv 2504.04704)."""

    size: Positive = 128
    sinks: int = 4
    every: Positive = 128

    def reads(self):
        return (LagDeviation(every=self.every, size=self.size, sinks=max(0, self.sinks)),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class CurDkv(Policy):
    """Keep keys and values of large norms among their neighbours (CurDKV, arXiv 2509.15038, by kvpress' local approximation of leverage)."""

    size: Positive = 16
    every: Positive = 32

    def reads(self):
        return (LocalLeverage(every=self.every, size=self.size),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class HighLeverage(Policy):
    """Keep the keys that others cannot stand in for: high statistical leverage (Compactor, arXiv 2507.08143)."""

    sketch: Positive = 48
    every: Positive = 128

    def reads(self):
        return (Leverage(every=self.every, sketch=self.sketch),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class Expected(Policy):
    """Keep what the queries of the next `future` positions are expected to attend to (Expected Attention, Devoto et al. 2025, arXiv 2510.00636).

    By the variances of query channels, or with `covariance` as in the paper by their covariance, which takes H times the bytes.
    """

    every: Positive = 32
    future: Positive = 512
    covariance: bool = False

    def reads(self):
        return (ExpectedMass(every=self.every, future=self.future, covariance=self.covariance),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class Volume(Policy):
    """Keep the values that span most, those near the mean query to come first (CapKV, arXiv 2604.25975, as kvpress has it)."""

    future: Positive = 512
    sharpness: float = 5.0
    every: Positive = 128

    def reads(self):
        return (Capacity(every=self.every, future=self.future, sharpness=self.sharpness),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class Drop(Policy):
    """Keep what the outputs of the last `window` queries would miss most (DropKV, OpenReview MqfNzH3TVH)."""

    window: Positive = 32
    every: Positive = 128

    def reads(self):
        return (OutputChange(every=self.every, window=self.window),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class Reasoning(Policy):
    """Keep what the last `window` queries attend to and what is unlike other keys (R-KV, arXiv 2505.24133).

    λ is its repository's default; the paper's is uncertain.
    """

    window: Positive = 8
    importance: float = 0.07
    every: Positive = 128

    def reads(self):
        return (Redundancy(every=self.every, window=self.window, importance=self.importance),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


def text(policy: Policy) -> str:
    """A policy as it is written in a spec: its name, and its arguments where they differ from the defaults."""
    name = next(name for name, cls in POLICIES.items() if cls is type(policy))
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
    "expected": Expected,
    "capkv": Volume,
    "drop": Drop,
    "r-kv": Reasoning,
}
