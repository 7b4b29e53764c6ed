"""What published methods rank by is what their papers say, reckoned here a second time, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache import reviews, scores
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.policy import PINNED
from kvcascade.cache.published import Compactor, Critical, Snap
from kvcascade.cache.spec import parse
from kvcascade.cache.statistic import FIRST, GRACE, Mass, Memory, Tokens
from kvcascade.kernels.heads import Heads, Rope
from kvcascade.kernels.rotation import rotation, turn, turned_back
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig

B, K, G, H, S = 2, 2, 2, 8, 24
HEADS = Heads(K * G, K, H, rope=Rope(base=100.0))
DRAW = np.random.default_rng(0)


def turned(x: np.ndarray, positions: np.ndarray, back: bool = False) -> np.ndarray:
    """RoPE in complex numbers, [..., H] at [...]."""
    frequency = 100.0 ** (-np.arange(0, H, 2) / H)
    z = x[..., : H // 2] + 1j * x[..., H // 2 :]
    z = z * np.exp((-1j if back else 1j) * positions[..., None] * frequency)
    return np.concatenate([z.real, z.imag], -1)


@dataclasses.dataclass
class Case:
    """A cache's tokens in any order of slots, some slots empty, and what its layer remembers of the queries before them."""

    pos: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q: np.ndarray
    """[B, positions, N, H]"""
    now: int

    @classmethod
    def drawn(cls) -> "Case":
        pos = np.stack([[DRAW.permutation(40)[:S] for _ in range(K)] for _ in range(B)])
        pos[:, :, DRAW.permutation(S)[:3]] = -1
        k, v = DRAW.standard_normal((2, B, K, S, H))
        return cls(pos, k, v, DRAW.standard_normal((B, 40, K * G, H)), 39)

    def tokens(self, memory: Memory | None = None) -> Tokens:
        memories = ()
        if memory:
            held = memory.init(B, HEADS, range(HEADS.kv))
            for start, stop in ((0, 20), (20, 21), (21, 40)):
                positions = np.broadcast_to(np.arange(start, stop), (B, stop - start))
                held = memory.update(held, jnp.asarray(self.q[:, start:stop]), jnp.asarray(positions), HEADS)
            memories = (held,)
        now = jnp.full((B, 1, 1), self.now)
        return Tokens(jnp.asarray(self.pos), jnp.asarray(self.k), jnp.asarray(self.v), now, memories, HEADS)

    def review(self, statistic) -> np.ndarray:
        memories = statistic.reads()
        with jax.enable_x64(True):
            found = statistic.review(jnp.zeros(self.pos.shape), self.tokens(*memories))
        return np.where(self.pos >= 0, np.asarray(found), 0)

    def each(self):
        """Row, head, the places of its tokens in the order of their positions."""
        for b in range(B):
            for h in range(K):
                order = np.argsort(self.pos[b, h])
                yield b, h, order[self.pos[b, h][order] >= 0]

    def queries(self, b: int, h: int) -> np.ndarray:
        """[positions, G, H]"""
        return self.q[b].reshape(40, K, G, H)[:, h]


@pytest.fixture
def case() -> Case:
    return Case.drawn()


def compare(got: np.ndarray, want: np.ndarray, rtol: float = 1e-4) -> None:
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want[np.abs(want) < GRACE / 2]).max())


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def test_keys_before_rope_are_what_they_were() -> None:
    """`turned_back` undoes `turn`, also where RoPE has a scale or turns a part alone."""
    x = jnp.asarray(DRAW.standard_normal((1, 5, 3, H)), jnp.float32)
    for rope in (Rope(), Rope(scale=1.3), Rope(width=4, scale=0.7)):
        by = rotation(jnp.arange(5)[None] * 1000, H, rope)
        np.testing.assert_allclose(turned_back(turn(x, by), by), x, atol=1e-5)


def test_what_is_remembered_of_queries_is_before_rope_as_the_context_has_it() -> None:
    """Where frequencies depend on the context, a cache's is the one that it was made for."""
    rope = Rope(base=100.0, long_factors=(1.0, 2.0, 3.0, 4.0), short_context=16)
    heads = Heads(K * G, K, H, rope=rope)
    cache = LayerCache.empty(parse("expected[sinks=0] 8").parts[0][2], 1, heads, 32)
    q = jnp.asarray(DRAW.standard_normal((1, 6, K * G, H)), jnp.float32)
    positions = jnp.arange(6)[None]
    by = rotation(positions, H, rope.at(32))
    _, cache = cache.step(turn(q, by), q[:, :, :K], q[:, :, :K], positions)
    np.testing.assert_allclose(cache.memories[0][1][0], q.sum(1).reshape(K, G, H), atol=1e-4)


def test_window_mass_is_the_attention_of_the_last_window_or_two() -> None:
    """Token by token the two stretches are exactly the queries since the last but one boundary, also after a call that crossed some."""
    window = 4
    numbers = {p: jnp.zeros((1, 1, 3)) for p in (0, 1)}
    mass_of = DRAW.random((60, 3))
    now, since = -1, 0
    for size in [7, 1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 12, 1, 1, 1, 1, 1, 1]:
        before, now = now, now + size
        mass = mass_of[max(before + 1, now - window + 1) : now + 1].sum(0)
        for parity in numbers:
            rule = scores.WindowMass(last=window, parity=parity)
            arguments = jnp.asarray(mass)[None, None], jnp.zeros((1, 1, 3), jnp.int32)
            whole = jnp.full((1, 1, 1), now), jnp.full((1, 1, 1), size)
            numbers[parity] = rule.watch(numbers[parity], *arguments, *whole)
        if size > 1:
            since = now  # from here on single steps, until two boundaries are behind it all is exact
        boundary = now // window * window
        if since < boundary - window:
            want = mass_of[boundary - window : now + 1].sum(0)
            np.testing.assert_allclose((numbers[0] + numbers[1])[0, 0], want, rtol=1e-5)


def test_window_mass_of_a_prompt_is_pooled_over_neighbours() -> None:
    """The prompt without its last window and the window each by themselves, zeros around both; padding, wherever it stands, is no neighbour."""
    mass = DRAW.random(9)
    rule = scores.WindowMass(last=4, kernel=5)
    want = np.concatenate([np.convolve(part, np.ones(5) / 5)[2:-2] for part in (mass[:5], mass[5:])])
    there = np.array([0, 1, 3, 4, 5, 8, 9, 10, 12])
    padded, pos = np.full((1, 1, 13), 7.0), np.full((1, 1, 13), -1)
    padded[0, 0, there], pos[0, 0, there] = mass, np.arange(9)
    got = np.asarray(rule.among(jnp.asarray(padded), jnp.asarray(pos)))[0, 0, there]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_decayed_mass_halves_and_unused_counts() -> None:
    one = lambda x: jnp.full((1, 1, 1), x)
    decayed = scores.DecayedMass(life=8)
    got = decayed.watch(one(4.0), one(0.5), one(0), one(20), one(8))
    assert got.item() == pytest.approx(2.5)
    unused = scores.Unused(least=0.25)
    assert unused.watch(one(-3.0), one(0.2), one(0), one(20), one(2)).item() == -5
    assert unused.watch(one(-3.0), one(0.25), one(0), one(20), one(2)).item() == 0


def test_key_difference(case: Case) -> None:
    want = np.zeros(case.pos.shape)
    for b, h, at in case.each():
        unit = case.k[b, h, at] / np.linalg.norm(case.k[b, h, at], axis=-1, keepdims=True)
        mean = unit.mean(0)
        want[b, h, at] = -unit @ mean / np.linalg.norm(mean)
    compare(case.review(reviews.KeyDifference()), want)


def test_lag_deviation(case: Case) -> None:
    """Blocks of 5 after 2 sinks: what the next whole block does not follow is out of question."""
    want = np.zeros(case.pos.shape)
    for b, h, at in case.each():
        want[b, h, at] = GRACE
        want[b, h, at[:2]] = FIRST
        for start in range(2, len(at) - 10 + 1, 5):
            block, after = at[start : start + 5], at[start + 5 : start + 10]
            total = np.zeros(5)
            for x in (case.k[b, h], case.v[b, h]):
                low, high = x[after].min(0), x[after].max(0)
                total += softmax(((x[block] - low) / (high - low)).std(-1, ddof=1))
            want[b, h, block] = total.argsort().argsort() / 5
    compare(case.review(reviews.LagDeviation(size=5, sinks=2)), want)


def test_local_leverage(case: Case) -> None:
    want = np.zeros(case.pos.shape)
    for b, h, at in case.each():
        for start in range(0, len(at), 4):
            block = at[start : start + 4]
            k, v = ((x[b, h, block] ** 2).sum(-1) for x in (case.k, case.v))
            want[b, h, block] = k / k.sum() * v / v.sum()
    compare(case.review(reviews.LocalLeverage(size=4)), want)


@pytest.mark.parametrize("sinks", [0, 9])
def test_leverage_is_the_diagonal_of_the_hat_matrix(case: Case, sinks: int) -> None:
    """The first tokens take no part in it, and stay."""
    want = np.zeros(case.pos.shape)
    sketch = np.random.default_rng(0).standard_normal((H, 5)) / 5**0.5
    for b, h, at in case.each():
        want[b, h, at] = FIRST
        at = at[case.pos[b, h, at] >= sinks]
        keys = turned(case.k[b, h, at], case.pos[b, h, at], back=True)
        x = (keys - keys.mean(0)) @ sketch
        want[b, h, at] = np.diag(x @ np.linalg.inv(x.T @ x + 0.01 * np.eye(5)) @ x.T)
    compare(case.review(reviews.Leverage(sketch=5, sinks=sinks)), want, 1e-3)


def ahead(x: np.ndarray, future: int) -> np.ndarray:
    """The mean of a vector turned to each of the next positions."""
    return np.mean([turned(x, np.full(x.shape[:-1], 40 + i)) for i in range(future)], 0)


@pytest.mark.parametrize("sinks", [0, 9])
@pytest.mark.parametrize("covariance", [True, False])
def test_expected_mass(case: Case, covariance: bool, sinks: int) -> None:
    """E exp(q·k/√H) of a Gaussian query is exp(μ·k/√H + k·Σk/2H); μ and Σ are of the queries before RoPE, turned to what comes.

    Neither sinks nor their queries take part.
    """
    want = np.zeros(case.pos.shape)
    for b, h, at in case.each():
        want[b, h, at] = FIRST * (case.pos[b, h, at] < sinks)
        at = at[case.pos[b, h, at] >= sinks]
        for g in range(G):
            q = turned(case.queries(b, h)[:, g], np.arange(40), back=True)[sinks:]
            spread = np.cov(q.T, bias=True)
            if not covariance:
                spread = np.diag(np.diag(spread))
            matrix = np.stack([ahead(row, 6) for row in np.eye(H)], 1)
            spread = matrix @ spread @ matrix.T
            if not covariance:
                spread = np.diag(np.diag(spread))
            k = case.k[b, h, at]
            logits = k @ ahead(q.mean(0), 6) / H**0.5 + np.einsum("SH,HJ,SJ->S", k, spread, k) / (2 * H)
            want[b, h, at] += softmax(logits) * np.linalg.norm(case.v[b, h, at], axis=-1)
    compare(case.review(reviews.ExpectedMass(future=6, covariance=covariance, sinks=sinks)), want, 1e-3)


@pytest.mark.parametrize("sinks", [0, 9])
def test_capacity(case: Case, sinks: int) -> None:
    """Neither sinks nor their queries take part."""
    want = np.zeros(case.pos.shape)
    for b, h, at in case.each():
        want[b, h, at] = FIRST * (case.pos[b, h, at] < sinks)
        at = at[case.pos[b, h, at] >= sinks]
        k, v = case.k[b, h, at], case.v[b, h, at]
        for g in range(G):
            anchor = ahead(turned(case.queries(b, h)[:, g], np.arange(40), back=True)[sinks:].mean(0), 6)
            near = k @ anchor / np.linalg.norm(k, axis=-1) / np.linalg.norm(anchor)
            w = np.exp(5 * (near - near.max()))
            spanned = np.eye(H) + (v.T * w) @ v
            want[b, h, at] += w * np.einsum("SH,HJ,SJ->S", v, np.linalg.inv(spanned), v)
    compare(case.review(reviews.Capacity(future=6, sinks=sinks)), want, 1e-3)


@pytest.mark.parametrize("window", [0, 4])
def test_what_is_critical_goes_by_all_attention_or_by_that_of_a_window(window: int) -> None:
    """A prompt's last window stays, and of the others those whose pooled mean attention times what they write is largest."""
    policy = Critical(window=window)
    mass, norm = DRAW.random((2, 12))
    parts = [mass / 4, mass * 3 / 4] if window else [mass]
    read = tuple(jnp.asarray(x)[None, None] for x in (*parts, norm))
    pos = jnp.arange(12)[None, None]
    got = np.asarray(policy.priority(pos, read, jnp.full((1, 1, 1), 11)))[0, 0]
    want = (mass / (window or 1) + 1e-4) * norm
    np.testing.assert_allclose(got[: 12 - window], want[: 12 - window], rtol=1e-5)
    assert (got[12 - window :] == np.float32(PINNED)).all()
    assert policy.reads()[:-1] == (Snap(window).reads() if window else (Mass(),))


def seen(case: Case, b: int, h: int, at: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the tokens a query sees, and its logits, [G, S]."""
    return case.pos[b, h, at] <= position, case.queries(b, h)[position] @ case.k[b, h, at].T / H**0.5


def test_output_change_is_how_far_outputs_move_without_the_token(case: Case) -> None:
    """By leaving it out."""
    want = np.zeros(case.pos.shape)
    for b, h, at in case.each():
        v = case.v[b, h, at]
        for position in range(35, 40):
            sees, logits = seen(case, b, h, at, position)
            for g in range(G):
                out = softmax(logits[g, sees]) @ v[sees]
                for j in np.flatnonzero(sees):
                    others = sees & (np.arange(len(at)) != j)
                    want[b, h, at[j]] += ((out - softmax(logits[g, others]) @ v[others]) ** 2).sum()
    compare(case.review(reviews.OutputChange(window=5)), want, 1e-3)


def test_redundancy(case: Case) -> None:
    want = np.zeros(case.pos.shape)
    for b, h, at in case.each():
        k = case.k[b, h, at]
        unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
        cosine = unit @ unit.T
        np.fill_diagonal(cosine, 0)
        for row in cosine:
            if (like := np.flatnonzero(row > 0.2)).size:
                row[like[-1]] = 0
        like = softmax(cosine.mean(0))
        mass = np.zeros(len(at))
        for position in range(37, 40):
            sees, logits = seen(case, b, h, at, position)
            mass[sees] += softmax(logits.max(0)[sees]) / 3
        pooled = np.array([mass[max(0, i - 3) : i + 4].max() for i in range(len(at))])
        want[b, h, at] = 0.25 * pooled - 0.75 * like
    compare(case.review(reviews.Redundancy(window=3, importance=0.25, alike=0.2)), want)


def test_pair_mass_is_the_mean_logit_of_the_mean_query_to_come(case: Case) -> None:
    want = np.zeros(case.pos.shape)
    size = lambda x: np.hypot(x[..., : H // 2], x[..., H // 2 :])
    for b, h, at in case.each():
        k = case.k[b, h, at]
        for g in range(G):
            q = turned(case.queries(b, h)[:, g], np.arange(40), back=True)
            mean = q.mean(0)
            want[b, h, at] += np.mean([k @ turned(mean, np.full((), 39 + step)) for step in (1, 2, 4, 8)], 0)
            want[b, h, at] += size(k) @ (size(q).mean(0) - size(mean))
    compare(case.review(reviews.PairMass(future=8)), want, 1e-3)


def test_chunk_mass_is_shared_by_those_of_the_chunk(case: Case) -> None:
    """All heads hold the same tokens, each at a place of its own; a chunk's tokens get the mean over them and over heads, and its sum stays."""
    case.pos = np.broadcast_to(case.pos[:, :1], case.pos.shape).copy()
    number = DRAW.random(case.pos.shape)
    with jax.enable_x64(True):
        got = np.asarray(reviews.ChunkMass(size=7).review(jnp.asarray(number), case.tokens()))
    for b, h, at in case.each():
        for chunk in range(6):
            mine = at[case.pos[b, h, at] // 7 == chunk]
            if mine.size:
                np.testing.assert_allclose(got[b, h, mine], number[b][:, mine].mean(), rtol=1e-6)


def test_what_a_value_writes_is_the_norm_of_its_product_with_the_output_matrix() -> None:
    """The numbers that tokens of a model carry: the mean over a group's heads of |W_o v|₁."""
    config = ModelConfig(layers=1, width=16, heads=4, kv_heads=2, mlp=32, vocab=64, context=32)
    params = gpt.init(config, 0)
    cache = generate.empty_cache(config, parse("critical 8@f32"), 1, 32)
    tokens = jnp.asarray(DRAW.integers(0, 64, (1, 8)), jnp.int32)
    _, cache = generate.prefill(config, params, cache, tokens, jnp.arange(8)[None])
    slots = cache.layers[0].slots[0]
    v_KSW, o_MNW = (
        np.asarray(slots.v["values"])[0],
        np.asarray(params["layers"][0]["attention"]["o"]["weight"]).reshape(16, 4, 4),
    )
    want = [[np.mean([np.abs(o_MNW[:, 2 * h + g] @ v).sum() for g in range(2)]) for v in v_KSW[h]] for h in range(2)]
    np.testing.assert_allclose(slots.numbers[1][0], want, rtol=1e-4)


@pytest.mark.parametrize("sinks", [0, 9])
def test_non_causal_mass_is_what_a_block_gives_its_tokens(sinks: int) -> None:
    """Query by query over blocks of 4 of 10 tokens that come in any order among padding, without a scale or a mask; one alone has its value's norm.

    The first tokens take no part in it, and stay.
    """
    T, size = 13, 4
    pos = np.stack([DRAW.permutation(np.r_[np.arange(7, 17), -1, -1, -1]) for _ in range(B)])
    k, v = DRAW.standard_normal((2, B, K, T, H))
    q = DRAW.standard_normal((B, T, K * G, H))
    now = jnp.full((B, 1, 1), 16)
    pos_BKT = jnp.broadcast_to(jnp.asarray(pos)[:, None], (B, K, T))
    statistic = scores.NonCausalMass(size=size, sinks=sinks)
    with jax.enable_x64(True):
        tokens = Tokens(pos_BKT, jnp.asarray(k), jnp.asarray(v), now, (), HEADS, q_BTNH=jnp.asarray(q))
        got = np.asarray(statistic.enter(tokens))
        alone = tokens._replace(
            pos_BKS=pos_BKT[..., :1], k_BKSH=tokens.k_BKSH[:, :, :1], v_BKSW=tokens.v_BKSW[:, :, :1]
        )
        first = (pos[:, None, :1] >= 0) & (pos[:, None, :1] < sinks)
        np.testing.assert_allclose(statistic.enter(alone), np.where(first, FIRST, np.linalg.norm(v[:, :, :1], axis=-1)))
    for b in range(B):
        order = np.argsort(pos[b])[3:]
        assert (got[b][:, order[pos[b][order] < sinks]] == FIRST).all()
        order = order[pos[b][order] >= sinks]
        for h in range(K):
            numbers = []
            for block in (order[:4], order[4:8], order[8:]):
                given = [softmax(k[b, h, block] @ q[b, i, h * G + g]) for i in block for g in range(G)]
                numbers.extend(np.sum(given, 0) / G * np.linalg.norm(v[b, h, block], axis=-1))
            want = [np.sum(numbers[max(0, i - 1) : i + 2]) / 3 for i in range(len(order))]
            np.testing.assert_allclose(got[b, h, order], want, rtol=1e-9)


def test_compactor_adds_standard_deviations_and_lets_newcomers_stay() -> None:
    """Leverage counts `blending` times; first tokens, those not reviewed yet and empty slots do not count in means and deviations."""
    pos = jnp.asarray([[[8, 9, 10, -1, 11, 0]]])
    leverage = jnp.asarray([[[1.0, 2.0, 6.0, 99.0, GRACE, FIRST]]])
    mass = jnp.asarray([[[5.0, 3.0, 1.0, 99.0, 7.0, FIRST]]])
    got = Compactor(blending=0.5).priority(pos, (leverage, mass), jnp.full((1, 1, 1), 11))[0, 0]
    z = lambda x: (x - x.mean()) / x.std()
    want = 0.5 * z(np.array([1.0, 2.0, 6.0])) + z(np.array([5.0, 3.0, 1.0]))
    np.testing.assert_allclose(got[:3], want, rtol=1e-5)
    assert got[4] == GRACE and got[5] == FIRST


def test_a_positions_share_of_reviews_does_not_grow_with_the_slots() -> None:
    """Unless `every` says when, one comes after an eighth of them; a number that is not reviewed says so."""
    assert [reviews.KeyDifference().period(slots) for slots in (1, 256, 2048)] == [32, 32, 256]
    assert reviews.KeyDifference(every=5).period(2048) == 5
    assert reviews.KeyDifference().reviews and not Mass().reviews
