"""The laws that every cache obeys, whatever policy, codec and cascade it is made of.

The strategies draw policies from `POLICIES` and their arguments from the types of their fields,
so a new policy is tested as soon as it is registered.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, seed
from hypothesis import strategies as st

from kvcascade.cache.cascade import Cascade, LayerCache
from kvcascade.cache.codec import CODECS
from kvcascade.cache.policy import POLICIES, Full, Policy, Recent, Sink
from kvcascade.cache.spec import parse
from kvcascade.cache.tier import Tier
from kvcascade.model import generate, gpt
from kvcascade.model.gpt import ModelConfig, Params

CONTEXT = 24
QUICK = {"xla_backend_optimization_level": 0}
"""The same program after half the time to compile: what is left out is LLVM's work, not XLA's rewriting of operations."""


# What the strategies draw

ARGUMENTS = {int: st.integers(0, 3), float: st.floats(0, 1, exclude_min=True, width=16)}
COUNTS = st.one_of(st.integers(1, 6), st.sampled_from(["10%", "25%"]))


def policies(arguments: dict[type, st.SearchStrategy] = ARGUMENTS) -> st.SearchStrategy[Policy]:
    def build(cls: type[Policy]) -> st.SearchStrategy[Policy]:
        return st.builds(cls, **{field.name: arguments[field.type] for field in dataclasses.fields(cls)})

    return st.sampled_from(list(POLICIES.values())).flatmap(build)


@st.composite
def tiers(draw, policy=policies(), codecs=tuple(CODECS.values()), counts=COUNTS) -> Tier:
    chosen = draw(policy)
    return Tier(chosen, "100%" if isinstance(chosen, Full) else draw(counts), draw(st.sampled_from(codecs)))


@st.composite
def cascades(draw, tier=tiers(), max_size: int = 3) -> Cascade:
    drawn = draw(st.lists(tier, min_size=1, max_size=max_size))
    ends = [index + 1 for index, tier in enumerate(drawn) if isinstance(tier.policy, Full)]
    return Cascade(*drawn[: min(ends, default=len(drawn))])


@dataclasses.dataclass(frozen=True)
class History:
    """What happens to the cache of one layer: calls of one token and of `chunk` tokens in turn, at random."""

    cascade: Cascade
    B: int
    K: int
    G: int
    H: int
    chunk: int
    number: int

    def calls(self, kind: int = 0) -> Iterator[np.ndarray]:
        """The positions of each call until a row has seen CONTEXT tokens: rows of unequal lengths, padding anywhere."""
        draw, padding = np.random.default_rng([self.number, 0]), np.random.default_rng([self.number, 1, kind])
        seen_B1 = np.zeros((self.B, 1), np.int32)
        while True:
            here_BT = padding.random((self.B, 1 if draw.random() < 0.7 else self.chunk)) < 0.8
            positions_BT = np.where(here_BT, seen_B1 + here_BT.cumsum(1) - 1, -1)
            seen_B1 += here_BT.sum(1, keepdims=True)
            if seen_B1.max() > CONTEXT:
                return
            yield positions_BT.astype(np.int32)

    def tokens(self, kind: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The query, key and value of the token at each position, each [B, CONTEXT, heads, H]."""
        normal = np.random.default_rng([self.number, 2, kind]).standard_normal
        shape = lambda heads: (self.B, CONTEXT, heads, self.H)
        return tuple(normal(shape(heads), np.float32) for heads in (self.K * self.G, self.K, self.K))


def at(x_BPNH: np.ndarray, positions_BT: np.ndarray) -> np.ndarray:
    """The rows of x at these positions; what stands at padding (-1) is a token's, and must not matter."""
    return np.take_along_axis(x_BPNH, positions_BT[:, :, None, None], 1)


def histories(cascade=cascades()) -> st.SearchStrategy[History]:
    few = lambda *values: st.sampled_from(values)
    return st.builds(
        History, cascade, few(2, 3), few(2, 1), few(2, 1), few(16, 8), st.integers(2, 6), st.integers(0, 2**16)
    )


def replayed(test):
    """Give a test histories: every such test gets the same ones, so that each is compiled once."""
    return seed(0)(given(histories())(test))


# What happens to a cache, and what should


def init(cascade: Cascade, B: int, K: int, H: int, context: int = CONTEXT) -> LayerCache:
    return jax.jit(lambda: cascade.init(B, K, H, context), compiler_options=QUICK)()


step = jax.jit(LayerCache.step, compiler_options=QUICK)


@functools.partial(jax.jit, compiler_options=QUICK)
def decoded(cache: LayerCache) -> list[dict[str, Any]]:
    """Per tier what its slots hold, vectors as its codec decodes them."""
    return [
        {
            "pos": slots.pos_BKS,
            "score": slots.score_BKS,
            "k": tier.codec.decode(slots.k),
            "v": tier.codec.decode(slots.v),
            "k bound": tier.codec.bound(slots.k),
            "v bound": tier.codec.bound(slots.v),
        }
        for tier, slots in zip(cache.cascade.tiers, cache.slots, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def priority(policy: Policy, pos_BKS, score_BKS, now_B11):
    return policy.priority(pos_BKS, score_BKS if policy.observes else None, now_B11)


def dense(q_BTNH, k_BKSH, v_BKSH, positions_BT, pos_BKS) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention in float64 to the slots at or before each query, and what each slot got of it, [B, K, S]."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.astype(np.float64).reshape(B, T, -1, N // k_BKSH.shape[1], H)
    weights = np.exp(np.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH.astype(np.float64)) / H**0.5)
    seen_BKTS = (pos_BKS[:, :, None] >= 0) & (pos_BKS[:, :, None] <= positions_BT[:, None, :, None])
    weights = weights * seen_BKTS[:, :, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("BKGTS,BKSH->BTKGH", weights, v_BKSH.astype(np.float64))
    return out.reshape(B, T, N, H), weights.sum((2, 3))


@dataclasses.dataclass(frozen=True)
class Moment:
    """One call: its arguments, its result, the tiers before and after it, and the mass that each position has by now."""

    q_BTNH: np.ndarray
    k_BTKH: np.ndarray
    v_BTKH: np.ndarray
    positions_BT: np.ndarray
    out_BTNH: np.ndarray
    want_BTNH: np.ndarray
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    mass_BKP: np.ndarray


def joined(tiers: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.concatenate([tier[name] for tier in tiers], 2)


@functools.cache
def play(history: History) -> list[Moment]:
    """Let a history happen, next to dense attention over what the cache holds: after a call of one token, before one of many."""
    q, k, v = history.tokens()
    cache = init(history.cascade, history.B, history.K, history.H)
    after, moments = jax.device_get(decoded(cache)), []
    mass_BKP = np.zeros((history.B, history.K, CONTEXT + 1))  # the last is what padding and empty slots get: nothing
    for positions_BT in history.calls():
        call = [at(x, positions_BT) for x in (q, k, v)]
        out, cache = step(cache, *call, positions_BT)
        before, after = after, jax.device_get(decoded(cache))
        seen = [joined(after if positions_BT.shape[1] == 1 else before, name) for name in ("k", "v", "pos")]
        if positions_BT.shape[1] > 1:
            pos_BKT = np.broadcast_to(positions_BT[:, None], (history.B, history.K, positions_BT.shape[1]))
            new = (call[1].swapaxes(1, 2), call[2].swapaxes(1, 2), pos_BKT)
            seen = [np.concatenate(pair, 2) for pair in zip(seen, new, strict=True)]
        want, mass = dense(call[0], seen[0], seen[1], positions_BT, seen[2])
        mass_BKP = mass_BKP.copy()
        np.add.at(mass_BKP, (*np.ogrid[: history.B, : history.K], seen[2]), mass)
        moments.append(Moment(*call, positions_BT, np.asarray(out), want, before, after, mass_BKP))
    return moments


# Law 1: decode equals forward


@functools.partial(jax.jit, static_argnames="config", compiler_options=QUICK)
def forward(config: ModelConfig, params: Params, tokens_BT):
    return gpt.apply(config, params, tokens_BT)[0]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache", compiler_options=QUICK)
def through_cache(config: ModelConfig, params: Params, tokens_BT, positions_BT, cache):
    return gpt.apply(config, params, tokens_BT, positions_BT, cache)


def text(config: ModelConfig, B: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab, (B, 16), np.int32)


@pytest.mark.parametrize("sizes", [(1,), (4,), (1, 4)], ids=["token by token", "in chunks", "in turn"])
def test_decode_and_chunked_prefill_equal_forward(attention_kind, sizes: tuple[int, ...]) -> None:
    """Law 1: whatever the chunks, and wherever their padding, the logits are those of the uncached forward."""
    config, params = attention_kind
    tokens_BT, draw = text(config, B=3), np.random.default_rng(1)
    want_BTV = np.asarray(forward(config, params, tokens_BT))
    cache, seen_B1 = generate.empty_cache(config, parse("full@f32"), 3, 16), np.zeros((3, 1), int)
    while seen_B1.max() <= 16 - max(sizes):
        here_BT = draw.random((3, draw.choice(sizes))) < 0.8
        positions_BT = np.where(here_BT, seen_B1 + here_BT.cumsum(1) - 1, -1).astype(np.int32)
        seen_B1 += here_BT.sum(1, keepdims=True)
        chunk_BT = np.take_along_axis(tokens_BT, positions_BT, 1)
        got_BTV, cache = through_cache(config, params, chunk_BT, positions_BT, cache)
        want = np.take_along_axis(want_BTV, positions_BT[..., None], 1)
        np.testing.assert_allclose(np.asarray(got_BTV)[here_BT], want[here_BT], atol=1e-5, rtol=1e-5)


def test_ragged_prompts_go_on_as_each_would_alone(attention_kind) -> None:
    """Law 1: prompts of unequal lengths, padded and prefilled together, decode each at its own positions."""
    config, params = attention_kind
    tokens_BT, lengths = text(config, B=3), np.array([5, 1, 8], np.int32)
    want_BTV, rows = np.asarray(forward(config, params, tokens_BT)), np.arange(3)
    cache = generate.empty_cache(config, parse("full@f32"), 3, 16)
    padded = generate.pad([list(row[:length]) for row, length in zip(tokens_BT, lengths, strict=True)])
    logits_BV, cache = generate.prefill(config, params, cache, *map(jnp.asarray, padded))
    for position_B in (lengths + i for i in range(8)):
        np.testing.assert_allclose(logits_BV, want_BTV[rows, position_B - 1], atol=1e-5, rtol=1e-5)
        token_B = jnp.asarray(tokens_BT[rows, position_B])
        logits_BV, cache = generate.decode_step(config, params, cache, token_B, jnp.asarray(position_B))


def test_generated_tokens_are_the_likeliest_ones_of_forward(nano) -> None:
    """Law 1: greedy generation picks what the uncached forward finds likeliest after each row's tokens."""
    config, params = nano
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6]]
    cache = generate.empty_cache(config, parse("full@f32"), 3, 16)
    drawn = np.array([token_B for token_B, _ in generate.generate(config, params, cache, prompts, 6)]).T
    for prompt, more in zip(prompts, drawn, strict=True):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(prompt) + 6] = [*prompt, *more]
        likeliest = np.asarray(forward(config, params, row)).argmax(-1)[0]
        np.testing.assert_array_equal(more, likeliest[len(prompt) - 1 : len(prompt) + 5])


# Law 2: a cache equals dense attention masked to the positions that it holds


@replayed
def test_output_is_dense_attention_over_what_is_held(history: History) -> None:
    """Law 2: each output is softmax attention over the decoded slots, and over the call's own tokens if they are many."""
    for moment in play(history):
        np.testing.assert_allclose(moment.out_BTNH, moment.want_BTNH, atol=1e-5, rtol=1e-5)


@replayed
def test_scores_are_the_attention_received(history: History) -> None:
    """Law 2: a score is the mass that dense attention gave to the position in all calls since it came."""
    for moment in play(history):
        for tier in moment.after:
            if tier["score"] is not None:
                want = np.take_along_axis(moment.mass_BKP, tier["pos"], 2)
                np.testing.assert_allclose(np.where(tier["pos"] < 0, 0, tier["score"]), want, atol=1e-4, rtol=1e-4)


@replayed
def test_vectors_are_quantised_once_per_tier(history: History) -> None:
    """Law 2: on entering a tier a vector changes by at most its codec's bound; while it stays it does not change.

    So a vector's error is at most the sum of the bounds of the tiers that it sank through.
    """
    k, v = (np.concatenate([x, x[:, :1]], 1).swapaxes(1, 2) for x in history.tokens()[1:])
    known, tier_of = {"k": k, "v": v}, np.full(k.shape[:3], -1)
    for moment in play(history):
        for index, (tier, now) in enumerate(zip(history.cascade.tiers, moment.after, strict=True)):
            b, h, s = np.nonzero(now["pos"] >= 0)
            here = b, h, now["pos"][b, h, s]
            for name in ("k", "v"):
                vector = now[name][b, h, s]
                error = np.abs(tier.codec.turn(vector - known[name][here]))
                bound = now[f"{name} bound"][b, h, s] * (tier_of[here] != index)[:, None]
                assert (error <= bound + 2e-6).all()
                known[name][here] = vector
            tier_of[here] = index


# Law 3: never more, never twice, never lost early


def rows_of_heads(history: History) -> list[tuple[int, int]]:
    return [(b, h) for b in range(history.B) for h in range(history.K)]


def held(tier: dict[str, Any], b: int, h: int) -> list[int]:
    return [int(position) for position in tier["pos"][b, h] if position >= 0]


@replayed
def test_upper_tiers_fill_first_and_nothing_is_dropped_while_a_slot_is_empty(history: History) -> None:
    """Law 3: no position twice; each tier holds as many as it can of what the tiers above leave, at most S."""
    seen = np.zeros(history.B, int)
    for moment in play(history):
        seen += (moment.positions_BT >= 0).sum(1)
        for b, h in rows_of_heads(history):
            everything = [position for tier in moment.after for position in held(tier, b, h)]
            assert len(set(everything)) == len(everything)
            assert max(everything, default=0) < max(seen[b], 1)
            left = seen[b]
            for tier, now in zip(history.cascade.tiers, moment.after, strict=True):
                slots = tier.slots(CONTEXT)
                assert now["pos"].shape[-1] == slots
                assert len(held(now, b, h)) == min(left, slots)
                left -= min(left, slots)


@replayed
def test_the_newest_token_is_held_after_its_own_call(history: History) -> None:
    """Law 3: a row's newest token is in some tier, whatever its priority."""
    for moment in play(history):
        for b, h in rows_of_heads(history):
            newest = moment.positions_BT[b].max()
            assert newest < 0 or newest in joined(moment.after, "pos")[b, h]


@replayed
def test_each_tier_keeps_the_best_and_hands_on_the_others(history: History) -> None:
    """Law 3: of its slots and its newcomers a tier keeps those of highest priority; the others are offered to the tier below."""
    cascade = history.cascade
    for moment in play(history):
        positions_BT = moment.positions_BT
        for b in range(history.B):
            now = positions_BT[b].max()
            offered = [set(positions_BT[b].tolist()) - {-1} for _ in range(history.K)]
            for tier, before, after in zip(cascade.tiers, moment.before, moment.after, strict=True):
                both = [set(held(before, b, h)) | offered[h] for h in range(history.K)]
                stay = [set(held(after, b, h)) for h in range(history.K)]
                pos = np.full((1, history.K, before["pos"].shape[-1] + positions_BT.shape[1]), -1, np.int32)
                for h in range(history.K):
                    assert stay[h] <= both[h]
                    pos[0, h, : len(both[h])] = sorted(both[h])
                mass_BKP = moment.mass_BKP
                if positions_BT.shape[1] == 1:  # one token is placed before it attends
                    mass_BKP = mass_BKP - dense_mass(moment)
                score = np.take_along_axis(mass_BKP[b : b + 1], pos, 2).astype(np.float32)
                rank = np.asarray(priority(tier.policy, pos, score, np.array([[[now]]], np.int32)))[0]
                last = tier is cascade.tiers[-1]
                for h in range(history.K):
                    ranks = {p: r for p, r in zip(pos[0, h].tolist(), rank[h].tolist(), strict=True) if p >= 0}
                    least = min((ranks[p] for p in stay[h] if not (last and p == now)), default=np.inf)
                    most = max((ranks[p] for p in both[h] - stay[h]), default=-np.inf)
                    assert least >= most - 1e-4 * max(1, abs(most)) * tier.policy.observes
                offered = [both[h] - stay[h] for h in range(history.K)]


@replayed
def test_sinks_stay_recent_is_a_window_and_full_forgets_nothing(history: History) -> None:
    """Law 3: a first tier of sinks holds the first positions, of recent ones the last; a cascade that ends in full holds all."""
    first, last, seen = history.cascade.tiers[0], history.cascade.tiers[-1], np.zeros(history.B, int)
    for moment in play(history):
        seen += (moment.positions_BT >= 0).sum(1)
        for b, h in rows_of_heads(history):
            count = min(first.slots(CONTEXT), int(seen[b]))
            if isinstance(first.policy, Sink) and len(history.cascade.tiers) > 1:
                assert sorted(held(moment.after[0], b, h)) == list(range(count))
            if isinstance(first.policy, Recent):
                assert sorted(held(moment.after[0], b, h)) == list(range(seen[b] - count, seen[b]))
            if isinstance(last.policy, Full):
                assert sorted(p for tier in moment.after for p in held(tier, b, h)) == list(range(seen[b]))
