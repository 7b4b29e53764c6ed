"""Published methods as policies: each says which numbers it reads, and with what defaults.

Where a paper keeps the first or the newest tokens besides, put `sink 4 | recent 60 |` before the policy.
"""

import dataclasses

import jax.numpy as jnp

from kvcascade.cache.hints import Hints
from kvcascade.cache.policy import PINNED, Policy, Positive, Whole, standardised
from kvcascade.cache.retention import USUAL
from kvcascade.cache.reviews import (
    Capacity,
    ChunkMass,
    ExpectedMass,
    KeyDifference,
    LagDeviation,
    Leverage,
    LocalLeverage,
    OutputChange,
    PairMass,
    Redundancy,
)
from kvcascade.cache.scores import (
    DecayedMass,
    KeyNorm,
    LastMass,
    NonCausalMass,
    OutputNorm,
    Repeated,
    Sensitivity,
    Unused,
    ValueNorm,
    WindowMass,
)
from kvcascade.cache.statistic import GRACE, Mass


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


@dataclasses.dataclass(frozen=True)
class ValueAware(Policy):
    """Keep what has most attention times the value's L1 norm (VATP, Guo et al. 2024, arXiv 2406.12335)."""

    def reads(self):
        return Mass(), ValueNorm(order=1)

    def priority(self, pos_BKS, read, now_B11):
        return read[0] * read[1]


@dataclasses.dataclass(frozen=True)
class KvZip(Policy):
    """Keep of a prompt what some query attends to that reads it a second time, parts of 2,048 each by itself (KVzip, arXiv 2505.23416).

    The paper asks in words to repeat the context; here the text just comes again. What comes after the prompt goes first: `kvzip 25% then recent 128`.
    """

    def reads(self):
        return (Repeated(),)


@dataclasses.dataclass(frozen=True)
class KvGrad(Policy):
    """Keep of a prompt what moves the last hidden states most when it is read again, 512 at once (KVgrad, OpenReview cg1wTCJjjk, as kvpress has it).

    A token counts by the largest share that some query gives it, times the norm of what its value then writes, times that of the gradient
    of the squared hidden states before the last norm with respect to the query's residual stream. Otherwise as `kvzip`.
    """

    def reads(self):
        return (Sensitivity(),)


@dataclasses.dataclass(frozen=True)
class Critical(Policy):
    """Keep what has most attention times what its value writes (the second stage of CriticalKV, Feng et al. 2025, arXiv 2502.03805).

    The first stage keeps half of the slots by attention alone: `heavy 32 | critical 32`. Attention is all that a token got or, with a
    `window`, what `snap` of that window and kernel goes by: `snap 32 | critical[window=32] 32`.
    """

    window: Whole = 0
    kernel: Positive = 5

    def reads(self):
        return (*(Snap(self.window, self.kernel).reads() if self.window > 0 else (Mass(),)), OutputNorm())

    def priority(self, pos_BKS, read, now_B11):
        *mass, norm = read
        rank = (sum(mass) / max(1, self.window) + 1e-4) * norm
        return jnp.where(pos_BKS > now_B11 - self.window, PINNED, rank) if self.window > 0 else rank


@dataclasses.dataclass(frozen=True)
class Chunks(Policy):
    """Keep whole chunks of `size` positions, those that got most attention from all heads (ChunkKV, arXiv 2502.00299, whose id is uncertain).

    With a `window`, of a prompt's attention only that of its last so many queries, which then had better be kept: `recent 32 | chunks[window=32] 96`.
    """

    size: Positive = 20
    every: Whole = 0
    window: Whole = 0

    def alike(self):
        return True

    def reads(self):
        return (ChunkMass(last=self.window, every=self.every, size=self.size),)


@dataclasses.dataclass(frozen=True)
class Trigonometric(Policy):
    """Keep the keys that the mean query would attend to at distances to come (TriAttention, arXiv 2604.04921).

    Query statistics are those of the row so far, where the paper calibrates them on a text; its normalisation of heads, which is
    uncertain, is left out: ranks are within a KV head.
    """

    future: Positive = 1024
    every: Whole = 0

    def reads(self):
        return (PairMass(every=self.every, future=self.future),)


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

    every: Whole = 0

    def reads(self):
        return (KeyDifference(every=self.every),)


@dataclasses.dataclass(frozen=True)
class Lag(Policy):
    """Keep what is spread most on the scale of the `size` tokens after its segment, besides `sinks` and the last segments (LagKV, arXiv 2504.04704)."""

    size: Positive = 128
    sinks: Whole = 4
    every: Whole = 0

    def reads(self):
        return (LagDeviation(every=self.every, size=self.size, sinks=self.sinks),)


@dataclasses.dataclass(frozen=True)
class CurDkv(Policy):
    """Keep keys and values of large norms among their neighbours (CurDKV, arXiv 2509.15038, by kvpress' local approximation of leverage)."""

    size: Positive = 16
    every: Whole = 0

    def reads(self):
        return (LocalLeverage(every=self.every, size=self.size),)


@dataclasses.dataclass(frozen=True)
class HighLeverage(Policy):
    """Keep the keys that others cannot stand in for: high statistical leverage (Compactor, arXiv 2507.08143)."""

    sketch: Positive = 48
    every: Whole = 0

    def reads(self):
        return (Leverage(every=self.every, sketch=self.sketch),)


@dataclasses.dataclass(frozen=True)
class NonCausal(Policy):
    """Keep what a prompt's tokens attend to in blocks of `size`, before and after them (Compactor's non-causal attention, arXiv 2507.08143).

    Tokens that come one by one are ranked by their value's norm, which is what they have where each attends to itself alone.
    """

    size: Positive = 256

    def reads(self):
        return (NonCausalMass(size=self.size),)


@dataclasses.dataclass(frozen=True)
class Compactor(Policy):
    """Keep what has high leverage and gets much non-causal attention, each in standard deviations (Compactor, arXiv 2507.08143).

    `blending` is the weight of leverage, by default that of kvpress where no ratio of compression is given. The first `sinks` tokens stay,
    and take no part.
    """

    blending: float = 0.35
    size: Positive = 256
    sketch: Positive = 48
    every: Whole = 0
    sinks: Whole = 8

    def reads(self):
        leverage = Leverage(every=self.every, sketch=self.sketch, sinks=self.sinks)
        return leverage, NonCausalMass(size=self.size, sinks=self.sinks)

    def priority(self, pos_BKS, read, now_B11):
        known = (pos_BKS >= 0) & (read[0] < GRACE)
        leverage, mass = standardised(jnp.stack(read), known)
        return jnp.where(known, self.blending * leverage + mass, read[0])


@dataclasses.dataclass(frozen=True)
class Expected(Policy):
    """Keep what the queries of the next `future` positions are expected to attend to (Expected Attention, Devoto et al. 2025, arXiv 2510.00636).

    By the variances of query channels, or with `covariance` as in the paper by their covariance, which takes H times the bytes. The first
    `sinks` tokens stay, and neither they nor their queries count.
    """

    every: Whole = 0
    future: Positive = 512
    covariance: bool = False
    sinks: Whole = 4

    def reads(self):
        return (ExpectedMass(every=self.every, future=self.future, covariance=self.covariance, sinks=self.sinks),)


@dataclasses.dataclass(frozen=True)
class Volume(Policy):
    """Keep the values that span most, those near the mean query to come first (CapKV, arXiv 2604.25975, as kvpress has it).

    The first `sinks` tokens stay, and neither they nor their queries count.
    """

    future: Positive = 512
    sharpness: float = 5.0
    every: Whole = 0
    sinks: Whole = 4

    def reads(self):
        return (Capacity(every=self.every, future=self.future, sharpness=self.sharpness, sinks=self.sinks),)


@dataclasses.dataclass(frozen=True)
class Drop(Policy):
    """Keep what the outputs of the last `window` queries would miss most (DropKV, OpenReview MqfNzH3TVH)."""

    window: Positive = 32
    every: Whole = 0

    def reads(self):
        return (OutputChange(every=self.every, window=self.window),)


@dataclasses.dataclass(frozen=True)
class Reasoning(Policy):
    """Keep what the last `window` queries attend to and what is unlike other keys (R-KV, arXiv 2505.24133).

    λ is its repository's default; the paper's is uncertain.
    """

    window: Positive = 8
    importance: float = 0.07
    every: Whole = 0

    def reads(self):
        return (Redundancy(every=self.every, window=self.window, importance=self.importance),)


@dataclasses.dataclass(frozen=True)
class Hinted(Policy):
    """Keep what the caller said is of the highest priority, of equals the newest (the retention priorities of TensorRT-LLM).

    Up to so many `ranges` of positions of each row have one, by `cache.hinted`; the others have 35.
    """

    ranges: Positive = 8

    def alike(self):
        return True

    def reads(self):
        return (Hints(count=self.ranges),)

    def priority(self, pos_BKS, read, now_B11):
        rank = jnp.full(pos_BKS.shape, USUAL, jnp.float32)
        for index in range(
            self.ranges
        ):  # one after the other: a step of one layer takes 0.6 ms, and over an axis of them 1.1
            start, stop, priority, until = (x[..., None] for x in jnp.moveaxis(read[0][:, :, index], -1, 0))
            rank = jnp.where((start <= pos_BKS) & (pos_BKS < stop) & (now_B11 <= until), priority, rank)
        return rank
