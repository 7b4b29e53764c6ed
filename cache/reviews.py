"""The numbers that depend on all tokens that a head holds: reckoned anew every so many positions, which spreads what that costs over them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvcascade.cache.queries import (
    LastQueries,
    QueryMean,
    QueryMoments,
    QueryPairs,
    ahead,
    before_rope,
    pairs,
    shares,
    turned,
    turned_variance,
)
from kvcascade.cache.segments import Segments
from kvcascade.cache.statistic import FIRST, GRACE, Statistic, Tokens

KEYS = 128
"""Keys that are compared with all others at once."""


@dataclasses.dataclass(frozen=True)
class Reviewed(Statistic):
    """A number that is reckoned anew every so many positions; a token stays until its first review."""

    def enter(self, new):
        return jnp.full(new.pos_BKS.shape, GRACE, new.k_BKSH.dtype)


@dataclasses.dataclass(frozen=True)
class KeyDifference(Reviewed):
    """Minus the cosine of the key and the mean direction of the head's keys."""

    def review(self, number_BKS, held):
        unit = held.k_BKSH / jnp.maximum(jnp.linalg.norm(held.k_BKSH, axis=-1, keepdims=True), 1e-12)
        mean = jnp.where(_there(held), unit, 0).sum(2, keepdims=True)
        return -(unit * mean).sum(-1) / jnp.maximum(jnp.linalg.norm(mean, axis=-1), 1e-12)


@dataclasses.dataclass(frozen=True)
class LagDeviation(Reviewed):
    """How far a token's channels are spread on the scale of the `size` tokens that follow its segment, ranked in the segment: 0 to 1.

    Tokens before the first segment, and those of the last segments, which nothing follows, are out of question.
    """

    size: int = 128
    sinks: int = 4

    def review(self, number_BKS, held):
        segments = Segments.of(held.pos_BKS, self.size, self.sinks)

        def spread(x):
            x = segments.cut(x)  # [B, K, segments, size, H]
            following = jnp.roll(x, -1, 2)
            low, high = following.min(3, keepdims=True), following.max(3, keepdims=True)
            deviation = ((x - low) / jnp.maximum(high - low, 1e-12)).std(-1, ddof=1)
            weights = jnp.exp(deviation - deviation.max(-1, keepdims=True))
            return weights / weights.sum(-1, keepdims=True)

        rank = (spread(held.k_BKSH) + spread(held.v_BKSW)).argsort(-1).argsort(-1) / self.size
        return segments.put(jnp.where(segments.whole(following=1), rank, GRACE), FIRST)


@dataclasses.dataclass(frozen=True)
class LocalLeverage(Reviewed):
    """The shares of the squared norms of key and value in those of their segment of `size` tokens, multiplied."""

    size: int = 16

    def review(self, number_BKS, held):
        segments = Segments.of(held.pos_BKS, self.size)

        def share(x):
            squares = jnp.where(segments.there, (segments.cut(x) ** 2).sum(-1), 0)
            return squares / jnp.maximum(squares.sum(-1, keepdims=True), 1e-12)

        return segments.put(share(held.k_BKSH) * share(held.v_BKSW), 0.0)


@dataclasses.dataclass(frozen=True)
class Leverage(Reviewed):
    """The statistical leverage of the key before RoPE among the head's keys, in a random subspace of `sketch` dimensions.

    The first `sinks` tokens are out of question, and take no part.
    """

    sketch: int = 48
    sinks: int = 0

    def review(self, number_BKS, held):
        there, H = (held.pos_BKS >= self.sinks)[..., None] & _there(held), held.k_BKSH.shape[-1]
        keys = jnp.where(there, before_rope(held.k_BKSH, held.pos_BKS, held.heads), 0)
        keys = jnp.where(there, keys - keys.sum(2, keepdims=True) / jnp.maximum(there.sum(2, keepdims=True), 1), 0)
        drawn = np.random.default_rng(0).standard_normal((H, self.sketch)) / self.sketch**0.5
        x = keys @ jnp.asarray(drawn, keys.dtype)
        gram = jnp.einsum("BKSR,BKSQ->BKRQ", x, x) + 0.01 * jnp.eye(self.sketch, dtype=x.dtype)
        return jnp.where(held.pos_BKS < self.sinks, FIRST, _against(gram, x))


@dataclasses.dataclass(frozen=True)
class ExpectedMass(Reviewed):
    """The attention expected of the queries at the next `future` positions, if they were Gaussian with the moments of those before, times the value's norm.

    The first tokens are out of question, and take no part: they would get most of a head's attention, and heads be weighed by what they leave.
    """

    future: int = 512
    covariance: bool = False
    sinks: int = 0

    def reads(self):
        return (QueryMoments(self.covariance, self.sinks),)

    def review(self, number_BKS, held):
        count_BK, sum_BKGH, squares = held.memories[0]
        count = jnp.maximum(count_BK, 1)[..., None, None]
        mean = sum_BKGH / count
        by, k, scale = ahead(held, np.arange(self.future)), held.k_BKSH, held.heads.scale
        logits = scale * jnp.einsum("BKSH,BKGH->BKGS", k, turned(mean, by))
        if self.covariance:
            spread = squares / count[..., None] - mean[..., None] * mean[..., None, :]
            spread = turned(turned(spread, by).swapaxes(-1, -2), by)
            logits += scale**2 / 2 * jnp.einsum("BKSH,BKGHJ,BKSJ->BKGS", k, spread, k)
        else:
            spread = turned_variance(squares / count - mean**2, by)
            logits += scale**2 / 2 * jnp.einsum("BKSH,BKGH->BKGS", k**2, spread)
        expected = _softmax(logits, jnp.where(held.pos_BKS < self.sinks, -1, held.pos_BKS)).sum(2)
        return jnp.where(held.pos_BKS < self.sinks, FIRST, expected * jnp.linalg.norm(held.v_BKSW, axis=-1))


@dataclasses.dataclass(frozen=True)
class PairMass(Reviewed):
    """What the mean query would give the key at each of the next 1, 2, 4, … up to `future` positions, on average, in logits; a pair of
    channels in which queries vary counts for what it can give.

    With q the mean query before RoPE, as complex pairs f turned to each position, and |q|_f the mean size of a pair: Re Σ_f q_f k̄_f +
    Σ_f (E|q|_f - |E q_f|) |k|_f.
    """

    future: int = 1024

    def reads(self):
        return (QueryPairs(),)

    def review(self, number_BKS, held):
        count_BK, sum_BKGH, sizes_BKGF = held.memories[0]
        count = jnp.maximum(count_BK, 1)[..., None, None]
        mean, k = sum_BKGH / count, held.k_BKSH
        steps = 2 ** np.arange(self.future.bit_length())
        ahead_BKS = jnp.einsum("BKSH,BKGH->BKS", k, turned(mean, ahead(held, steps[steps <= self.future] - 1)))
        apart = (sizes_BKGF / count - pairs(mean)).sum(2)
        return ahead_BKS + jnp.einsum("BKSF,BKF->BKS", pairs(k), apart)


@dataclasses.dataclass(frozen=True)
class ChunkMass(Reviewed):
    """The attention that all heads gave the token's chunk of `size` positions, shared by those of the chunk that are held in this tier or above."""

    size: int = 20

    def enter(self, new):
        return jnp.zeros(new.pos_BKS.shape, new.k_BKSH.dtype)

    def watch(self, number_BKS, mass_BKS, pos_BKS, now_B11, new_B11):
        return number_BKS + mass_BKS

    def review(self, number_BKS, held):
        segments, (B, K, S) = Segments.of(held.pos_BKS, 1), number_BKS.shape
        pos = segments.sorted(held.pos_BKS)
        number = segments.sorted(number_BKS)
        there = (pos >= 0) & ~jnp.isnan(number)
        begins = jnp.diff(pos // self.size, axis=-1, prepend=-2) != 0
        index = begins.cumsum(-1) - 1  # which of the chunks that are held
        total = lambda x: jnp.zeros((B, K, S), number_BKS.dtype).at[_at(index)].add(jnp.where(there, x, 0))
        number = number.mean(1, keepdims=True)  # sorted, a token is at the same place in all heads
        mean = total(number) / jnp.maximum(total(1.0), 1)
        return segments.unsorted(jnp.take_along_axis(mean, index, -1))


@dataclasses.dataclass(frozen=True)
class Capacity(Reviewed):
    """What a value adds to the volume that the head's values span, each weighed by how near its key is to the mean query to come.

    The first tokens are out of question, and take no part.
    """

    future: int = 512
    sharpness: float = 5.0
    sinks: int = 0

    def reads(self):
        return (QueryMean(self.sinks),)

    def review(self, number_BKS, held):
        unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        anchor = unit(turned(held.memories[0], ahead(held, np.arange(self.future))))
        near = self.sharpness * jnp.einsum("BKSH,BKGH->BKGS", unit(held.k_BKSH), anchor)
        near = jnp.where((held.pos_BKS >= self.sinks)[:, :, None] & _there(held)[:, :, None, :, 0], near, -jnp.inf)
        most = jnp.maximum(near.max(-1, keepdims=True), -1e30)
        weights, v = jnp.exp(near - most), held.v_BKSW
        (B, K, G, S), W = weights.shape, v.shape[-1]
        # One product of matrices for all heads of a group, in both places.
        weighed = weights.swapaxes(2, 3)[..., None] * v[:, :, :, None]
        spanned = jnp.einsum("BKSGW,BKSX->BKGWX", weighed, v) + jnp.eye(W, dtype=v.dtype)
        inverse = _inverse_root(spanned).reshape(B, K, G * W, W)
        away = jnp.einsum("BKZX,BKSX->BKZS", inverse, v).reshape(B, K, G, W, S)
        added = (weights * (away**2).sum(3)).sum(2)
        return jnp.where(held.pos_BKS < self.sinks, FIRST, added)


@dataclasses.dataclass(frozen=True)
class OutputChange(Reviewed):
    """How far the outputs of the last `window` queries would move without the token: Σ (p / (1 - p))² · |v - o|², with 1 - p at least 1/100."""

    window: int = 32

    def reads(self):
        return (LastQueries(self.window),)

    def review(self, number_BKS, held):
        p_BKGQS, v = _seen(held), held.v_BKSW
        out = jnp.einsum("BKGQS,BKSW->BKGQW", p_BKGQS, v)
        apart = (v**2).sum(-1)[:, :, None, None] - 2 * jnp.einsum("BKGQW,BKSW->BKGQS", out, v)
        apart = jnp.maximum(apart + (out**2).sum(-1, keepdims=True), 0)
        # A difference near 0 is lost in that; the token that gets most is where it would count, divided by (1 - p)².
        most_BKGQ = p_BKGQS.argmax(-1)
        own = jnp.take_along_axis(v[:, :, None, None], most_BKGQ[..., None, None], 4)[..., 0, :]
        nearest = ((own - out) ** 2).sum(-1, keepdims=True)
        apart = jnp.where(most_BKGQ[..., None] == jnp.arange(v.shape[2]), nearest, apart)
        moved = (p_BKGQS / jnp.maximum(1 - p_BKGQS, 0.01)) ** 2
        return (moved * apart).sum((2, 3))


@dataclasses.dataclass(frozen=True)
class Redundancy(Reviewed):
    """The attention of the last queries less how like the other keys the key is: λ·importance - (1 - λ)·redundancy."""

    window: int = 8
    importance: float = 0.07
    alike: float = 0.5

    def reads(self):
        return (LastQueries(self.window),)

    def review(self, number_BKS, held):
        segments, there_BKS = Segments.of(held.pos_BKS, 1), held.pos_BKS >= 0
        unit = held.k_BKSH / jnp.maximum(jnp.linalg.norm(held.k_BKSH, axis=-1, keepdims=True), 1e-12)
        unit = segments.sorted(jnp.where(there_BKS[..., None], unit, 0))
        alike = (unit * (unit.sum(2, keepdims=True) - unit)).sum(-1)
        # Of the keys that a key is like, the latest is spared what this one would hold against it.
        latest = _latest(unit, segments.there[..., 0], self.alike)
        spared = (unit * jnp.take_along_axis(unit, jnp.maximum(latest, 0)[..., None], 2)).sum(-1)
        alike = alike.at[_at(latest)].add(jnp.where(latest < 0, 0, -spared))
        count = jnp.maximum(there_BKS.sum(-1, keepdims=True), 1)
        like = _softmax(segments.unsorted(alike / count)[:, :, None], held.pos_BKS)[:, :, 0]
        mass = jnp.where(there_BKS, _seen(held, pooled=True).mean((2, 3)), 0)
        wide = jnp.pad(segments.sorted(mass), ((0, 0), (0, 0), (3, 3)))
        mass = segments.unsorted(jnp.stack([wide[..., i : i + mass.shape[-1]] for i in range(7)]).max(0))
        return self.importance * mass - (1 - self.importance) * like


def _latest(unit_BKSH: Float[Array, "B K S H"], there_BKS: Bool[Array, "B K S"], alike: float) -> Int[Array, "B K S"]:
    """Of the vectors with which one's product is above `alike`, itself not among them, the place of the last; -1 where there is none.

    All are compared with the last KEYS of them, where most find theirs, as keys of a head are much alike; the others with all, KEYS at a time.
    """
    S, index_S = unit_BKSH.shape[2], jnp.arange(unit_BKSH.shape[2])

    def like(index_BKQ):
        """Which of all are like some of them."""
        cosine_BKQS = jnp.einsum("BKQH,BKSH->BKQS", unit_BKSH[_at(index_BKQ)], unit_BKSH)
        return (cosine_BKQS > alike) & (index_BKQ[..., None] != index_S) & there_BKS[:, :, None]

    def others(state):
        found_BKS, left_BKS = state
        place_BKS = jnp.where(left_BKS, left_BKS.cumsum(-1) - 1, S)
        some_BKQ = jnp.full((*left_BKS.shape[:2], min(KEYS, S)), S).at[_at(place_BKS)].set(index_S, mode="drop")
        last_BKQ = jnp.where(like(jnp.minimum(some_BKQ, S - 1)), index_S, -1).max(-1)
        put = lambda x, value: x.at[_at(some_BKQ)].set(value, mode="drop")
        return put(found_BKS, last_BKQ), put(left_BKS, False)

    latest_BKQ = jnp.maximum(there_BKS.sum(-1, keepdims=True) - 1 - jnp.arange(min(KEYS, S)), 0)
    found_BKS = jnp.where(like(latest_BKQ), latest_BKQ[..., None], -1).max(2)
    found_BKS, _ = lax.while_loop(lambda state: state[1].any(), others, (found_BKS, there_BKS & (found_BKS < 0)))
    return found_BKS


def _at(place_BKQ: Int[Array, "B K Q"]) -> tuple[Int[Array, "B 1 1"], Int[Array, "K 1"], Int[Array, "B K Q"]]:
    """The index of places of each head of each row."""
    B, K, _ = place_BKQ.shape
    return jnp.arange(B)[:, None, None], jnp.arange(K)[:, None], place_BKQ


def _against(gram: Float[Array, "... R R"], x: Float[Array, "... S R"]) -> Float[Array, "... S"]:
    """x·G⁻¹·x of each x, by the inverse of G's root, which takes less time than a solution for each x."""
    return ((x @ _inverse_root(gram).swapaxes(-1, -2)) ** 2).sum(-1)


def _inverse_root(gram: Float[Array, "... R R"]) -> Float[Array, "... R R"]:
    """L⁻¹ of G = L·Lᵀ, by eliminating below the diagonal of G beside 1.

    Not by LAPACK: its threads go on turning for a tenth of a second, in which a step takes half as long again.
    """
    R = gram.shape[-1]

    def eliminate(index, rows):
        row = lax.dynamic_slice_in_dim(rows, index, 1, -2)
        row = row * lax.rsqrt(lax.dynamic_slice_in_dim(row, index, 1, -1))
        factor = jnp.where(jnp.arange(R)[:, None] > index, row[..., :R].swapaxes(-1, -2), 0)
        return jnp.where(jnp.arange(R)[:, None] == index, row, rows - factor * row)

    beside = jnp.concatenate([gram, jnp.broadcast_to(jnp.eye(R, dtype=gram.dtype), gram.shape)], -1)
    return lax.fori_loop(0, R, eliminate, beside)[..., R:]


def _there(held: Tokens) -> Bool[Array, "B K S 1"]:
    return (held.pos_BKS >= 0)[..., None]


def _softmax(logits_BKGS: Float[Array, "B K G S"], pos_BKS: Int[Array, "B K S"]) -> Float[Array, "B K G S"]:
    """Over the tokens that are there; nothing where none is."""
    logits = jnp.where((pos_BKS >= 0)[:, :, None], logits_BKGS, -jnp.inf)
    weights = jnp.exp(logits - jnp.maximum(logits.max(-1, keepdims=True), -1e30))
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)


def _seen(held: Tokens, pooled: bool = False) -> Float[Array, "B K G Q S"]:
    """What the remembered queries give the tokens of their attention; `pooled`: by the largest logit of a group's heads."""
    q_BKQGH, pos_BKQ = held.memories[0]
    return shares(q_BKQGH, pos_BKQ, held.k_BKSH, held.pos_BKS, held.heads, pooled)
