"""The numbers that published methods rank tokens by, and what layers remember for them.

Rules are of one KV head at a time; what a paper says of a query head is summed over those that share the KV head, which ranks alike.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvcascade.cache.statistic import GRACE, Memory, Statistic, Tokens
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.rotation import Rotation, rotation, turn, turned_back

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

    A call of many tokens counts its last so many for the stretch that it ends in; what its own tokens got is averaged over `kernel` neighbours.
    """

    parity: int = 0
    kernel: int = 1

    def among(self, mass_BKT, pos_BKT):
        T, k = mass_BKT.shape[-1], self.kernel
        if min(T, k) == 1:
            return mass_BKT
        # Tokens and padding may be in any order; padding is nobody's neighbour.
        order = jnp.argsort(jnp.where(pos_BKT < 0, jnp.iinfo(jnp.int32).max, pos_BKT), -1)
        there = jnp.take_along_axis(pos_BKT >= 0, order, -1)
        mass = jnp.where(there, jnp.take_along_axis(mass_BKT, order, -1), 0)
        pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (k // 2, k - 1 - k // 2)))
        total = lambda x: sum(pad(x)[..., i : i + T] for i in range(k))
        mean = total(mass) / jnp.maximum(total(there.astype(mass.dtype)), 1)
        return jnp.take_along_axis(mean, jnp.argsort(order, -1), -1)

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


# Numbers that depend on all tokens that a head holds


@dataclasses.dataclass(frozen=True)
class Reviewed(Statistic):
    """A number that is reckoned anew every so many positions; a token stays until its first review."""

    every: int = 128

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
    """How far a token's channels are spread on the scale of the `size` tokens that follow its block, ranked in the block: 0 to 1.

    Tokens before the first block, and those of the last blocks, which nothing follows, are out of question.
    """

    size: int = 128
    sinks: int = 4

    def review(self, number_BKS, held):
        blocks = Blocks.of(held.pos_BKS, self.size, self.sinks)

        def spread(x):
            x = blocks.cut(x)  # [B, K, blocks, size, H]
            following = jnp.roll(x, -1, 2)
            low, high = following.min(3, keepdims=True), following.max(3, keepdims=True)
            deviation = ((x - low) / jnp.maximum(high - low, 1e-12)).std(-1, ddof=1)
            weights = jnp.exp(deviation - deviation.max(-1, keepdims=True))
            return weights / weights.sum(-1, keepdims=True)

        rank = (spread(held.k_BKSH) + spread(held.v_BKSW)).argsort(-1).argsort(-1) / self.size
        return blocks.put(jnp.where(blocks.whole(following=1), rank, GRACE), GRACE)


@dataclasses.dataclass(frozen=True)
class LocalLeverage(Reviewed):
    """The shares of the squared norms of key and value in those of their block of `size` tokens, multiplied."""

    size: int = 16

    def review(self, number_BKS, held):
        blocks = Blocks.of(held.pos_BKS, self.size)

        def share(x):
            squares = jnp.where(blocks.there, (blocks.cut(x) ** 2).sum(-1), 0)
            return squares / jnp.maximum(squares.sum(-1, keepdims=True), 1e-12)

        return blocks.put(share(held.k_BKSH) * share(held.v_BKSW), 0.0)


@dataclasses.dataclass(frozen=True)
class Leverage(Reviewed):
    """The statistical leverage of the key before RoPE among the head's keys, in a random subspace of `sketch` dimensions."""

    sketch: int = 48

    def review(self, number_BKS, held):
        there, H = _there(held), held.k_BKSH.shape[-1]
        keys = jnp.where(there, _before_rope(held.k_BKSH, held.pos_BKS, held.heads), 0)
        keys = jnp.where(there, keys - keys.sum(2, keepdims=True) / jnp.maximum(there.sum(2, keepdims=True), 1), 0)
        drawn = np.random.default_rng(0).standard_normal((H, self.sketch)) / self.sketch**0.5
        x = keys @ jnp.asarray(drawn, keys.dtype)
        gram = jnp.einsum("BKSR,BKSQ->BKRQ", x, x) + 0.01 * jnp.eye(self.sketch, dtype=x.dtype)
        return (x * jnp.linalg.solve(gram, x.swapaxes(-1, -2)).swapaxes(-1, -2)).sum(-1)


@dataclasses.dataclass(frozen=True)
class ExpectedMass(Reviewed):
    """The attention expected of the queries at the next `future` positions, if they were Gaussian with the moments of those before, times the value's norm."""

    every: int = 32
    future: int = 512
    covariance: bool = False

    def reads(self):
        return (QueryMoments(self.covariance),)

    def review(self, number_BKS, held):
        count_BK, sum_BKGH, squares = held.memories[0]
        count = jnp.maximum(count_BK, 1)[..., None, None]
        mean = sum_BKGH / count
        by, k, scale = _ahead(held, np.arange(self.future)), held.k_BKSH, held.heads.scale
        logits = scale * jnp.einsum("BKSH,BKGH->BKGS", k, _turned(mean, by))
        if self.covariance:
            spread = squares / count[..., None] - mean[..., None] * mean[..., None, :]
            spread = _turned(_turned(spread, by).swapaxes(-1, -2), by)
            logits += scale**2 / 2 * jnp.einsum("BKSH,BKGHJ,BKSJ->BKGS", k, spread, k)
        else:
            spread = _turned_variance(squares / count - mean**2, by)
            logits += scale**2 / 2 * jnp.einsum("BKSH,BKGH->BKGS", k**2, spread)
        return _softmax(logits, held.pos_BKS).sum(2) * jnp.linalg.norm(held.v_BKSW, axis=-1)


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
        turned = jnp.einsum("BKSH,BKGH->BKS", k, _turned(mean, _ahead(held, steps[steps <= self.future] - 1)))
        apart = (sizes_BKGF / count - _pairs(mean)).sum(2)
        return turned + jnp.einsum("BKSF,BKF->BKS", _pairs(k), apart)


@dataclasses.dataclass(frozen=True)
class ChunkMass(Reviewed):
    """The attention that all heads gave the token's chunk of `size` positions, shared by those of the chunk that are held in this tier or above."""

    every: int = 32
    size: int = 20

    def enter(self, new):
        return jnp.zeros(new.pos_BKS.shape, new.k_BKSH.dtype)

    def watch(self, number_BKS, mass_BKS, pos_BKS, now_B11, new_B11):
        return number_BKS + mass_BKS

    def review(self, number_BKS, held):
        blocks, (B, K, S) = Blocks.of(held.pos_BKS, 1), number_BKS.shape
        pos = blocks.sorted(held.pos_BKS)
        number = blocks.sorted(number_BKS)
        there = (pos >= 0) & ~jnp.isnan(number)
        index = (jnp.diff(pos // self.size, axis=-1, prepend=-2) != 0).cumsum(
            -1
        ) - 1  # which of the chunks that are held
        into = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None], index
        total = lambda x: jnp.zeros((B, K, S), number_BKS.dtype).at[into].add(jnp.where(there, x, 0))
        number = number.mean(1, keepdims=True)  # sorted, a token is at the same place in all heads
        mean = total(number) / jnp.maximum(total(1.0), 1)
        return blocks.unsorted(jnp.take_along_axis(mean, index, -1))


@dataclasses.dataclass(frozen=True)
class Capacity(Reviewed):
    """What a value adds to the volume that the head's values span, each weighed by how near its key is to the mean query to come."""

    future: int = 512
    sharpness: float = 5.0

    def reads(self):
        return (QueryMean(),)

    def review(self, number_BKS, held):
        unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        anchor = unit(_turned(held.memories[0], _ahead(held, np.arange(self.future))))
        near = self.sharpness * jnp.einsum("BKSH,BKGH->BKGS", unit(held.k_BKSH), anchor)
        near = jnp.where(_there(held)[:, :, None, :, 0], near, -jnp.inf)
        most = jnp.maximum(near.max(-1, keepdims=True), -1e30)
        weights, v = jnp.exp(near - most), held.v_BKSW
        spanned = jnp.einsum("BKGS,BKSW,BKSX->BKGWX", weights, v, v) + jnp.eye(v.shape[-1], dtype=v.dtype)
        solved = jnp.linalg.solve(
            spanned, jnp.broadcast_to(v.swapaxes(-1, -2)[:, :, None], (*spanned.shape[:-1], v.shape[2]))
        )
        return (weights * jnp.einsum("BKSW,BKGWS->BKGS", v, solved)).sum(2)


@dataclasses.dataclass(frozen=True)
class OutputChange(Reviewed):
    """How far the outputs of the last `window` queries would move without the token: Σ (p / (1 - p))² · |v - o|², with 1 - p at least 1/100."""

    window: int = 32

    def reads(self):
        return (LastQueries(self.window),)

    def review(self, number_BKS, held):
        p_BKGQS, v = _seen(held), held.v_BKSW
        out = jnp.einsum("BKGQS,BKSW->BKGQW", p_BKGQS, v)
        # Not by |v|² - 2 v·o + |o|², in which a difference near 0 is lost.
        apart = ((v[:, :, None, None] - out[..., None, :]) ** 2).sum(-1)
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
        blocks = Blocks.of(held.pos_BKS, 1)
        there = _there(held)
        unit = held.k_BKSH / jnp.maximum(jnp.linalg.norm(held.k_BKSH, axis=-1, keepdims=True), 1e-12)
        cosine = jnp.einsum("BKSH,BKRH->BKSR", unit, unit) * (1 - jnp.eye(unit.shape[2], dtype=unit.dtype))
        cosine = jnp.where(there & there[..., 0][:, :, None], cosine, 0)
        # Of those that a key is like, the latest is not held against it.
        pos = jnp.where(cosine > self.alike, held.pos_BKS[:, :, None], -1)
        latest = (pos == pos.max(-1, keepdims=True)) & (pos >= 0)
        count = jnp.maximum(there[..., 0].sum(-1, keepdims=True), 1)
        like = _softmax((jnp.where(latest, 0, cosine).sum(2) / count)[:, :, None], held.pos_BKS)[:, :, 0]
        mass = jnp.where(there[..., 0], _seen(held, pooled=True).mean((2, 3)), 0)
        wide = jnp.pad(blocks.sorted(mass), ((0, 0), (0, 0), (3, 3)))
        mass = blocks.unsorted(jnp.stack([wide[..., i : i + mass.shape[-1]] for i in range(7)]).max(0))
        return self.importance * mass - (1 - self.importance) * like


# What layers remember


@dataclasses.dataclass(frozen=True)
class QueryMean(Memory):
    """The sum of a layer's queries before RoPE, of each query head: a direction."""

    def init(self, batch, heads, layer):
        return jnp.zeros((batch, heads.kv, heads.queries // heads.kv, heads.width))

    def update(self, memory, q_BTNH, positions_BT, heads):
        return memory + _grouped(q_BTNH, positions_BT, heads, memory.shape[1]).sum(1)


@dataclasses.dataclass(frozen=True)
class QueryMoments(Memory):
    """The number, the sum and the sum of squares, or of outer products, of a layer's queries before RoPE, of each query head."""

    outer: bool = False

    def init(self, batch, heads, layer):
        shape = (batch, heads.kv, heads.queries // heads.kv, heads.width)
        squares = jnp.zeros((*shape, heads.width) if self.outer else shape)
        return jnp.zeros((batch, heads.kv)), jnp.zeros(shape), squares

    def update(self, memory, q_BTNH, positions_BT, heads):
        count, total, squares = memory
        q = _grouped(q_BTNH, positions_BT, heads, total.shape[1])
        number_B1 = (positions_BT >= 0).sum(1, keepdims=True)
        more = jnp.einsum("BTKGH,BTKGJ->BKGHJ", q, q) if self.outer else (q**2).sum(1)
        return count + number_B1, total + q.sum(1), squares + more


@dataclasses.dataclass(frozen=True)
class QueryPairs(Memory):
    """The number, the sum, and the sum of the sizes of RoPE's pairs of channels of a layer's queries before RoPE, of each query head."""

    def init(self, batch, heads, layer):
        shape = (batch, heads.kv, heads.queries // heads.kv, heads.width)
        return jnp.zeros((batch, heads.kv)), jnp.zeros(shape), jnp.zeros((*shape[:3], heads.width // 2))

    def update(self, memory, q_BTNH, positions_BT, heads):
        count, total, sizes = memory
        q = _grouped(q_BTNH, positions_BT, heads, total.shape[1])
        return count + (positions_BT >= 0).sum(1, keepdims=True), total + q.sum(1), sizes + _pairs(q).sum(1)


@dataclasses.dataclass(frozen=True)
class LastQueries(Memory):
    """The last so many queries of a layer as they attend, and their positions."""

    count: int = 32

    def init(self, batch, heads, layer):
        shape = (batch, heads.kv, self.count)
        return jnp.zeros((*shape, heads.queries // heads.kv, heads.width)), jnp.full(shape, -1, jnp.int32)

    def update(self, memory, q_BTNH, positions_BT, heads):
        held_BKQGH, pos_BKQ = memory
        B, T, N, H = q_BTNH.shape
        K, now_B1 = held_BKQGH.shape[1], positions_BT.max(1, keepdims=True)
        wanted_BQ = now_B1 - (now_B1 - jnp.arange(self.count)) % self.count  # the newest position of each place
        found_BQT = (positions_BT[:, None] == wanted_BQ[..., None]) & (wanted_BQ[..., None] >= 0)
        new_BQ, at_BQ = found_BQT.any(-1), found_BQT.argmax(-1)
        q_BQNH = jnp.take_along_axis(q_BTNH, at_BQ[..., None, None], 1).astype(held_BKQGH.dtype)
        q_BKQGH = q_BQNH.reshape(B, self.count, K, N // K, H).swapaxes(1, 2)
        held = jnp.where(new_BQ[:, None, :, None, None], q_BKQGH, held_BKQGH)
        return held, jnp.where(new_BQ[:, None], wanted_BQ[:, None], pos_BKQ).astype(jnp.int32)


# What the rules above are made of


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A head's tokens in the order of their positions, after the first few in blocks of so many."""

    order: Int[Array, "B K S"]
    count: Int[Array, "B K 1"]
    """Tokens that are there."""
    size: int
    skip: int

    @classmethod
    def of(cls, pos_BKS: Int[Array, "B K S"], size: int, skip: int = 0) -> "Blocks":
        """Blocks of the tokens at these positions; empty slots come last."""
        last = jnp.where(pos_BKS < 0, jnp.iinfo(jnp.int32).max, pos_BKS)
        return cls(jnp.argsort(last, -1), (pos_BKS >= 0).sum(-1, keepdims=True), size, skip)

    @property
    def number(self) -> int:
        """Blocks that there is room for."""
        return -(-max(self.order.shape[-1] - self.skip, 1) // self.size)

    @property
    def there(self) -> Bool[Array, "B K blocks size"]:
        """Where a block has a token."""
        places = jnp.arange(self.number * self.size).reshape(self.number, self.size)
        return places + self.skip < self.count[..., None]

    def whole(self, following: int) -> Bool[Array, "B K blocks 1"]:
        """Whether a block and so many after it have all their tokens."""
        return (jnp.arange(self.number)[:, None] + following + 1) * self.size + self.skip <= self.count[..., None]

    def sorted(self, x: Shaped[Array, "B K S ..."]) -> Shaped[Array, "B K S ..."]:
        """Something of each slot in the order of positions."""
        return jnp.take_along_axis(x, self.order.reshape(*self.order.shape, *(1,) * (x.ndim - 3)), 2)

    def unsorted(self, x_BKS: Float[Array, "B K S"]) -> Float[Array, "B K S"]:
        """A number of each token in the order of slots."""
        return jnp.take_along_axis(x_BKS, jnp.argsort(self.order, -1), 2)

    def cut(self, x: Float[Array, "B K S H"]) -> Float[Array, "B K blocks size H"]:
        """Vectors in blocks; there are zeros where no slots are left."""
        x = self.sorted(x)[:, :, self.skip :]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.number * self.size - x.shape[2]), (0, 0)))
        return x.reshape(*x.shape[:2], self.number, self.size, -1)

    def put(self, x: Float[Array, "B K blocks size"], before: float) -> Float[Array, "B K S"]:
        """A number of each place in a block in the order of slots, and one for those before the first block."""
        S = self.order.shape[-1]
        flat = x.reshape(*x.shape[:2], -1)[:, :, : max(S - self.skip, 0)]
        first = jnp.full((*flat.shape[:2], S - flat.shape[2]), before, flat.dtype)
        return self.unsorted(jnp.concatenate([first, flat], -1))


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
    age = pos_BKQ[:, :, None, :, None] - held.pos_BKS[:, :, None, None]
    sees = held.heads.sees(age) & (pos_BKQ[:, :, None, :, None] >= 0) & (held.pos_BKS[:, :, None, None] >= 0)
    logits = held.heads.capped(held.heads.scale * jnp.einsum("BKQGH,BKSH->BKGQS", q_BKQGH, held.k_BKSH))
    if pooled:
        logits = logits.max(2, keepdims=True)
    logits = jnp.where(sees, logits, -jnp.inf)
    weights = jnp.exp(logits - jnp.maximum(logits.max(-1, keepdims=True), -1e30))
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)


def _grouped(q_BTNH, positions_BT, heads: Heads, K: int) -> Float[Array, "B T K G H"]:
    """Queries before RoPE, by KV head; zeros where padding is."""
    B, T, N, H = q_BTNH.shape
    if heads.rope is not None:
        q_BTNH = turned_back(q_BTNH, rotation(positions_BT, H, heads.rope))
    return jnp.where((positions_BT >= 0)[..., None, None], q_BTNH, 0).reshape(B, T, K, N // K, H)


def _pairs(x: Float[Array, "... H"]) -> Float[Array, "... F"]:
    """The size of each pair of channels that RoPE turns together."""
    first, second = jnp.split(x, 2, -1)
    return jnp.sqrt(first**2 + second**2)


def _before_rope(k_BKSH, pos_BKS, heads: Heads) -> Float[Array, "B K S H"]:
    if heads.rope is None:
        return k_BKSH
    B, K, S, H = k_BKSH.shape
    flat = turned_back(k_BKSH.reshape(B * K, S, 1, H), rotation(pos_BKS.reshape(B * K, S), H, heads.rope))
    return flat.reshape(k_BKSH.shape)


def _ahead(held: Tokens, offsets: np.ndarray) -> Rotation | None:
    """The mean of RoPE's turns to positions so far beyond the next one."""
    if held.heads.rope is None:
        return None
    next_BT = held.now_B11[:, 0] + 1 + jnp.asarray(offsets, jnp.int32)
    cos, sin = rotation(next_BT, held.k_BKSH.shape[-1], held.heads.rope)
    return cos.mean(1, keepdims=True), sin.mean(1, keepdims=True)


def _turned(x: Float[Array, "B ... H"], by: Rotation | None) -> Float[Array, "B ... H"]:
    return x if by is None else turn(x.reshape(len(x), 1, -1, x.shape[-1]), by).reshape(x.shape)


def _turned_variance(x: Float[Array, "B ... H"], by: Rotation | None) -> Float[Array, "B ... H"]:
    """The variances of channels that are turned, had those before no covariance."""
    return x if by is None else _turned(x, (by[0] ** 2, by[1] ** 2))
