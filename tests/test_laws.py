"""The laws that every cache obeys, whatever policy, codec and cascade it is made of.

The strategies draw policies from `POLICIES` and their arguments from the types of their fields,
so a new policy is tested as soon as it is registered; some more are planted, each for a rule that no other has.
Every call goes through `checked`: a history that broke a promise would be told.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from planted_policies import PLANTED
from planted_rankers import WIDTH, example, planted

from kvcascade.cache.cascade import Cascade
from kvcascade.cache.checks import checked
from kvcascade.cache.codec import CODECS, Packed, f32, int4h, int8
from kvcascade.cache.errors import BadInput
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.learned import Learned
from kvcascade.cache.policies import POLICIES, Full, Random, Recent, Sink
from kvcascade.cache.policy import Place, Policy, Positive, Whole
from kvcascade.cache.spec import PRESETS, CacheSpec, Part, everywhere, parse
from kvcascade.cache.statistic import Memory, Statistic, Tokens
from kvcascade.cache.tier import Tier, full, recent
from kvcascade.cache.whole import Cache, nbytes
from kvcascade.eval.quality import perplexity
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.slots import Codec, Codecs
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params

CONTEXT = 24
QUICK = {"xla_backend_optimization_level": 0}
"""The same program after half the time to compile: what is left out is LLVM's work, not XLA's rewriting of operations."""


# What the strategies draw


def few(*values) -> st.SearchStrategy:
    return st.sampled_from(values)


# Hypothesis begins with what stands first, so the plainest of all, f32 and full, stand last.
ARGUMENTS = {int: st.integers(0, 3), Whole: few(1, 2, 3, 0), Positive: st.integers(1, 3), bool: st.booleans()}
ARGUMENTS |= {float: st.integers(1, 64).map(lambda n: n / 64)}  # weights of 0 make ties
ARGUMENTS |= {Place: st.builds(planted)}
COUNT = few(3, "25%", 1, 2, 4, 5, "10%")
ONE = few(*reversed(CODECS.values()))
CODEC = st.one_of(ONE, ONE, st.builds(Codecs, ONE, ONE))
DRAWN = POLICIES | PLANTED
SLOW = {"r-kv", "capkv", "compactor", "leverage"}
"""Policies whose programs take a quarter of a minute to compile."""
OF_ANY_HEADS = [name for name, cls in DRAWN.items() if cls is not Learned]


@st.composite
def policies(draw, among=DRAWN, arguments=ARGUMENTS) -> Policy:
    cls = DRAWN[draw(few(*reversed(among)))]
    return cls(**{field.name: draw(arguments[field.type]) for field in dataclasses.fields(cls)})


@st.composite
def tiers(draw, policy: st.SearchStrategy[Policy], codec=CODEC, count=COUNT) -> Tier:
    chosen = draw(policy)
    return Tier(chosen, "100%" if isinstance(chosen, Full) else draw(count), draw(codec))


TIER = tiers(policies())


@st.composite
def cascades(draw, *some: st.SearchStrategy[Tier], tier=TIER, sizes=(2, 3, 1)) -> Cascade:
    """A cascade that has a tier from each of `some`; what is full comes last."""
    drawn = [draw(strategy) for strategy in some]
    drawn += [draw(tier) for _ in range(draw(few(*sizes)) - len(drawn))]
    last = [tier for tier in drawn if isinstance(tier.policy, Full)]
    order = [tier for tier in draw(st.permutations(drawn)) if tier not in last]
    # What ranks for all heads together wants to be offered the same by all.
    order.sort(key=lambda tier: not tier.policy.alike())
    return Cascade(*order, *last[:1])


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
    window: int = 0

    @property
    def heads(self) -> Heads:
        return Heads(self.K * self.G, self.K, self.H, window=self.window)

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
        q, k, v = (normal(shape(heads), np.float32) for heads in (self.K * self.G, self.K, self.K))
        return q, k, v


def at(x_BPNH: np.ndarray, positions_BT: np.ndarray) -> np.ndarray:
    """The rows of x at these positions; what stands at padding (-1) is a token's, and must not matter."""
    return np.take_along_axis(x_BPNH, positions_BT[:, :, None, None], 1)


def histories(cascade: st.SearchStrategy[Cascade]) -> st.SearchStrategy[History]:
    number = st.integers(0, 2**16)
    window = few(0, 0, 7)
    drawn = st.builds(History, cascade, few(2, 3), few(2, 1), few(2, 1), few(16, 8), few(3, 2, 4, 5, 6), number, window)
    return drawn.map(ranked)


def ranked(history: History) -> History:
    """The same with heads of the width that the planted ranker is for, if the cascade has it."""
    learned = any(isinstance(tier.policy, Learned) for tier in history.cascade.tiers)
    return dataclasses.replace(history, H=WIDTH) if learned else history


def replayed(test, fewer: int = 1):
    """Give a test histories of cascades with each policy, two at a time; every such test gets the same, so that each is compiled once."""

    marked = lambda names: [pytest.mark.slow] if SLOW & {*names} else []
    pairs = [pytest.param(names, marks=marked(names)) for names in itertools.batched(DRAWN, 2)]

    @pytest.mark.parametrize("names", pairs, ids=" ".join)
    @functools.wraps(test, assigned=("__name__", "__qualname__", "__module__", "__doc__"), updated=())
    def each(names: tuple[str, ...]) -> None:
        few_examples = settings(max_examples=max(1, settings().max_examples // 5 // fewer))
        some = cascades(*(tiers(policies([name])) for name in names), sizes=(2, 3))
        seed(str(names))(few_examples(given(histories(some))(test)))()

    del each.__wrapped__  # or pytest would look for a fixture called `history`
    return each


# What happens to a cache, and what should


def init(cascade: Cascade, B: int, heads: Heads, context: int = CONTEXT) -> LayerCache:
    return jax.jit(lambda: LayerCache.empty(cascade, B, heads, context), compiler_options=QUICK)()


step = checked(LayerCache.step, compiler_options=QUICK)
look = checked(LayerCache.look, compiler_options=QUICK)
commit = checked(LayerCache.commit, compiler_options=QUICK)


@functools.partial(jax.jit, compiler_options=QUICK)
def decoded(cache: LayerCache) -> list[dict[str, Any]]:
    """Per tier what its slots hold, vectors as its codec decodes them."""
    return [
        {
            "pos": slots.pos_BKS,
            "numbers": slots.numbers,
            "k": tier.codecs.k.decode(slots.k),
            "v": tier.codecs.v.decode(slots.v),
            "k bound": tier.codecs.k.bound(slots.k),
            "v bound": tier.codecs.v.bound(slots.v),
        }
        for tier, slots in zip(cache.cascade.tiers, cache.slots, strict=True)
    ]


def dense(q_BTNH, k_BKSH, v_BKSH, positions_BT, pos_BKS, window=0) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention in float64 to the slots that each query sees, and what each slot got of each query, [B, K, T, S]."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.astype(np.float64).reshape(B, T, -1, N // k_BKSH.shape[1], H)
    weights = np.exp(np.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH.astype(np.float64)) / H**0.5)
    age_BKTS = positions_BT[:, None, :, None] - pos_BKS[:, :, None]
    seen_BKTS = (pos_BKS[:, :, None] >= 0) & (age_BKTS >= 0) & (age_BKTS < (window or CONTEXT))
    weights = weights * seen_BKTS[:, :, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("BKGTS,BKSH->BTKGH", weights, v_BKSH.astype(np.float64))
    return out.reshape(B, T, N, H), weights.sum(2)


@dataclasses.dataclass
class Replay:
    """The numbers that tokens carry and what a layer remembers, by their own rules in float64, from dense attention."""

    history: History
    numbers: dict[Statistic, np.ndarray]
    """[B, K, CONTEXT + 1], by position; the last is what stands at padding and empty slots."""
    memories: dict[Memory, Any]

    @classmethod
    def begin(cls, history: History) -> "Replay":
        shape = history.B, history.K, CONTEXT + 1
        memories = {
            each: each.init(history.B, history.heads, range(history.heads.kv)) for each in history.cascade.memories
        }
        return cls(history, {each: np.zeros(shape) for each in history.cascade.statistics}, memories)

    def copy(self) -> "Replay":
        return Replay(self.history, {each: x.copy() for each, x in self.numbers.items()}, dict(self.memories))

    def at(self, statistic: Statistic, pos_BKS: np.ndarray) -> np.ndarray:
        return np.take_along_axis(self.numbers[statistic], pos_BKS, 2)

    def put(self, statistic: Statistic, pos_BKS: np.ndarray, values_BKS, where=True) -> None:
        """Numbers of some positions, of those rows `where` it is so."""
        old = self.at(statistic, pos_BKS)
        np.put_along_axis(self.numbers[statistic], pos_BKS, np.where(where, values_BKS, old), 2)

    def tokens(self, statistic, pos_BKS, k_BKSH, v_BKSH, positions_BT, q_BTNH=None) -> Tokens:
        k, v = (jnp.asarray(x, jnp.float64) for x in (k_BKSH, v_BKSH))
        now_B11 = jnp.asarray(positions_BT.max(1)[:, None, None])
        memories = tuple(self.memories[each] for each in statistic.reads())
        written = jnp.abs(v).sum(-1)  # there is no output matrix
        q = None if q_BTNH is None else jnp.asarray(q_BTNH, jnp.float64)
        return Tokens(jnp.asarray(pos_BKS), k, v, now_B11, memories, self.history.heads, written, q)

    def enter(self, q_BTNH, new, positions_BT) -> None:
        for each in self.numbers:
            self.put(each, new[2], each.enter(self.tokens(each, new[2], new[0], new[1], positions_BT, q_BTNH)))
        for each, memory in self.memories.items():
            q, positions = jnp.asarray(q_BTNH, jnp.float64), jnp.asarray(positions_BT)
            self.memories[each] = each.update(memory, q, positions, self.history.heads)

    def watch(self, mass_BKTS, pos_BKS, positions_BT, new: int = 0) -> None:
        """The last `new` of the slots are the call's own tokens."""
        now_B11, new_B11 = positions_BT.max(1)[:, None, None], (positions_BT >= 0).sum(1)[:, None, None]
        for each in self.numbers:
            counts = (positions_BT[:, None] >= 0) & (positions_BT[:, None] > now_B11 - (each.last or CONTEXT))
            mass = (mass_BKTS * counts[..., None]).sum(2)
            held, own = np.split(mass, [mass.shape[2] - new], 2)
            among = each.among(jnp.asarray(own), jnp.asarray(pos_BKS[..., mass.shape[2] - new :])) if new else own
            mass = np.concatenate([held, among], 2)
            changed = each.watch(*map(jnp.asarray, (self.at(each, pos_BKS), mass, pos_BKS, now_B11, new_B11)))
            self.put(each, pos_BKS, changed, now_B11 >= 0)

    def review(self, everything, positions_BT, sizes: list[int]) -> None:
        """The first slots are those of tiers of such `sizes`; a tier that keeps no such number knows none."""
        now_B11, single = positions_BT.max(1)[:, None, None], positions_BT.shape[1] == 1
        k, v, pos_BKS = everything
        for each in self.numbers:
            if each.reviews:
                due = (now_B11 >= 0) & ((now_B11 % each.period(sum(sizes)) == 0) | (not single))
                held = self.tokens(each, pos_BKS, k, v, positions_BT)
                known = [each in self.history.cascade.numbers(tier) for tier in range(len(sizes))]
                known = np.append(np.repeat(known, sizes), np.ones(pos_BKS.shape[2] - sum(sizes), bool))
                numbers = np.where(known, self.at(each, pos_BKS), np.nan)
                self.put(each, pos_BKS, each.review(jnp.asarray(numbers), held), due & known)

    def priority(self, policy: Policy, pos_BKS: np.ndarray, now_B11: np.ndarray) -> np.ndarray:
        """How a policy ranks these positions, and -inf for what no query sees any more."""
        with jax.enable_x64(True):
            found = (self.at(e, pos_BKS) if isinstance(e, Statistic) else self.memories[e] for e in policy.reads())
            rank = np.asarray(
                policy.priority(jnp.asarray(pos_BKS), tuple(map(jnp.asarray, found)), jnp.asarray(now_B11))
            )
        alive = pos_BKS > now_B11 - self.history.window if self.history.window else True
        return np.where(alive & (pos_BKS >= 0), rank, -np.inf)


@dataclasses.dataclass(frozen=True)
class Moment:
    """One call: its positions, its result and the one wanted, the tiers before and after it, and the numbers that tokens should carry:
    those by which the call ranked them, and those that it left."""

    positions_BT: np.ndarray
    out_BTNH: np.ndarray
    want_BTNH: np.ndarray
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    ranked_by: Replay
    left: Replay


def joined(tiers: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.concatenate([tier[name] for tier in tiers], 2)


@functools.cache
def play(history: History) -> list[Moment]:
    """Let a history happen, next to dense attention over what the cache holds: after a call of one token, before one of many."""
    q, k, v = history.tokens()
    cache = init(history.cascade, history.B, history.heads)
    after, moments, replay = jax.device_get(decoded(cache)), [], Replay.begin(history)
    for positions_BT in history.calls():
        call = [at(x, positions_BT) for x in (q, k, v)]
        out, cache = step(cache, *call, positions_BT)
        before, after = after, jax.device_get(decoded(cache))
        single = positions_BT.shape[1] == 1  # a single token is placed before it attends, many after
        pos_BKT = np.broadcast_to(positions_BT[:, None], (history.B, history.K, positions_BT.shape[1]))
        new = (call[1].swapaxes(1, 2), call[2].swapaxes(1, 2), pos_BKT)
        everything = [
            np.concatenate([joined(before, name), x], 2) for name, x in zip(("k", "v", "pos"), new, strict=True)
        ]
        seen = [joined(after, name) for name in ("k", "v", "pos")] if single else everything
        want, mass_BKTS = dense(call[0], seen[0], seen[1], positions_BT, seen[2], history.window)
        with jax.enable_x64(True):
            replay.enter(call[0], new, positions_BT)
            if not single:
                replay.watch(mass_BKTS, seen[2], positions_BT, new=positions_BT.shape[1])
            replay.review(everything, positions_BT, [tier["pos"].shape[2] for tier in before])
            ranked_by = replay.copy()
            if single:
                replay.watch(mass_BKTS, seen[2], positions_BT)
        moments.append(Moment(positions_BT, np.asarray(out), want, before, after, ranked_by, replay.copy()))
    return moments


# Law 1: decode equals forward


@functools.partial(jax.jit, static_argnames="config", compiler_options=QUICK)
def forward(config: ModelConfig, params: Params, tokens_BT):
    return gpt.forward(config, params, tokens_BT)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache", compiler_options=QUICK)
def through_cache(config: ModelConfig, params: Params, tokens_BT, positions_BT, cache):
    return gpt.step(config, params, cache, tokens_BT, positions_BT)


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
    tokens, positions = generate.pad([row[:length].tolist() for row, length in zip(tokens_BT, lengths, strict=True)])
    logits_BV, cache = generate.prefill(config, params, cache, jnp.asarray(tokens), jnp.asarray(positions))
    for position_B in (lengths + i for i in range(8)):
        np.testing.assert_allclose(logits_BV, want_BTV[rows, position_B - 1], atol=1e-5, rtol=1e-5)
        token_B = jnp.asarray(tokens_BT[rows, position_B])
        logits_BV, cache = generate.decode_step(config, params, cache, token_B, jnp.asarray(position_B))


def test_generated_tokens_are_the_likeliest_ones_of_forward(nano) -> None:
    """Law 1: greedy generation picks what the uncached forward finds likeliest after each row's tokens."""
    config, params = nano
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6]]
    cache = generate.empty_cache(config, parse("full@f32"), 3, 16)
    drawn = np.concatenate([new for new, _ in generate.generate(config, params, cache, prompts, 11)]).T
    for prompt, more in zip(prompts, drawn, strict=True):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(prompt) + 11] = [*prompt, *more]
        likeliest = np.asarray(forward(config, params, row)).argmax(-1)[0]
        np.testing.assert_array_equal(more, likeliest[len(prompt) - 1 : len(prompt) + 10])


# Law 2: a cache equals dense attention masked to the positions that it holds


@replayed
def test_output_is_dense_attention_over_what_is_held(history: History) -> None:
    """Law 2: each output is softmax attention over the decoded slots, and over the call's own tokens if they are many."""
    for moment in play(history):
        np.testing.assert_allclose(moment.out_BTNH, moment.want_BTNH, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_at_the_optimisation_that_users_have_it_is_the_same_attention() -> None:
    """Law 2: one history through the program that XLA makes by default."""
    cascade = parse("sink 1 | recent 3@int8 | heavy 4@int4h | random 3@int8/int4").parts[0][2]
    history = History(cascade, B=2, K=2, G=2, H=16, chunk=5, number=0, window=19)
    usual, cache = jax.jit(LayerCache.step, donate_argnums=0), init(cascade, 2, history.heads)
    q, k, v = history.tokens()
    for moment in play(history):
        out, cache = usual(cache, *(at(x, moment.positions_BT) for x in (q, k, v)), moment.positions_BT)
        np.testing.assert_allclose(out, moment.want_BTNH, atol=1e-5, rtol=1e-5)
        for slots, tier in zip(cache.slots, moment.after, strict=True):
            np.testing.assert_array_equal(np.sort(slots.pos_BKS), np.sort(tier["pos"]))


@replayed
def test_numbers_travel_with_their_tokens(history: History) -> None:
    """Law 2: wherever a token has sunk to, it carries what its statistics' own rules say of dense attention."""
    for moment in play(history):
        for index, tier in enumerate(moment.after):
            there = tier["pos"] >= 0
            for statistic, number in zip(history.cascade.numbers(index), tier["numbers"], strict=True):
                want = moment.left.at(statistic, tier["pos"])
                np.testing.assert_allclose(number[there], want[there], atol=1e-4, rtol=1e-4)


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
                codec = tier.codecs.k if name == "k" else tier.codecs.v
                error = np.abs(codec.turn(jnp.asarray(vector - known[name][here])))
                bound = now[f"{name} bound"][b, h, s] * (tier_of[here] != index)[:, None]
                assert (error <= bound + 2e-6).all()
                known[name][here] = vector
            tier_of[here] = index


def test_vectors_of_a_bf16_model_sink_unrounded() -> None:
    """Law 2: what leaves a tier in a call of many tokens arrives below as that tier decoded it, also if the call is in bf16."""
    history = History(Cascade(recent(2, codec=int8), Tier(Full(), "100%", f32)), B=1, K=1, G=1, H=8, chunk=4, number=0)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in history.tokens())
    cache = init(history.cascade, 1, history.heads)
    for start in (0, 2, 4):
        before, chunk = cache, slice(start, start + 2)
        _, cache = step(cache, q[:, chunk], k[:, chunk], v[:, chunk], np.arange(start, start + 2, dtype=np.int32)[None])
    window, below = jax.device_get(decoded(before)[0]), jax.device_get(decoded(cache)[1])
    for slot, position in enumerate(window["pos"][0, 0]):
        sunk = below["pos"][0, 0].tolist().index(position)
        np.testing.assert_array_equal(below["k"][0, 0, sunk], window["k"][0, 0, slot])


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
            if history.window:
                continue
            for tier, now in zip(history.cascade.tiers, moment.after, strict=True):
                slots = tier.slots(CONTEXT)
                assert now["pos"].shape[-1] == slots
                assert len(held(now, b, h)) == min(left, slots)
                left -= min(left, slots)


@replayed
def test_what_no_query_sees_any_more_counts_as_an_empty_slot(history: History) -> None:
    """Law 3: with a window, a token that is still seen is not lost while the last tier has a slot that is empty or behind the window."""
    window = history.window or CONTEXT
    for moment in play(history):
        for tier, now in zip(history.cascade.tiers, moment.after, strict=True):
            assert now["pos"].shape[-1] == min(tier.slots(CONTEXT), window)
        for b, h in rows_of_heads(history):
            newest = moment.positions_BT[b].max()
            alive = lambda positions, newest=newest: {p for p in positions if p > newest - window}
            both = alive(p for tier in moment.before for p in held(tier, b, h)) | alive(moment.positions_BT[b]) - {-1}
            lost = both - {p for tier in moment.after for p in held(tier, b, h)}
            if newest >= 0 and lost:
                last = moment.after[-1]
                assert len(alive(held(last, b, h))) == last["pos"].shape[-1]


@replayed
def test_the_newest_token_is_held_after_its_own_call(history: History) -> None:
    """Law 3: a row's newest token is in some tier, whatever its priority."""
    for moment in play(history):
        for b, h in rows_of_heads(history):
            newest = moment.positions_BT[b].max()
            assert newest < 0 or newest in joined(moment.after, "pos")[b, h]


@replayed
def test_each_tier_keeps_the_best_and_hands_on_the_others(history: History) -> None:
    """Law 3: of its slots and its newcomers a tier keeps those of highest priority, of equals the newest; the others go to the tier below."""
    cascade = history.cascade
    for moment in play(history):
        positions_BT = moment.positions_BT
        now_B11 = positions_BT.max(1)[:, None, None]
        offered = {(b, h): set(positions_BT[b].tolist()) - {-1} for b, h in rows_of_heads(history)}
        for tier, before, after in zip(cascade.tiers, moment.before, moment.after, strict=True):
            both = {(b, h): set(held(before, b, h)) | offered[b, h] for b, h in offered}
            pos = np.full((history.B, history.K, before["pos"].shape[-1] + positions_BT.shape[1]), -1, np.int32)
            for b, h in offered:
                pos[b, h, : len(both[b, h])] = sorted(both[b, h])
            rank = moment.ranked_by.priority(tier.policy, pos, now_B11)
            near = 1e-4 if any(isinstance(each, Statistic) for each in tier.policy.reads()) else 0
            for b, h in offered:
                stay = set(held(after, b, h))
                assert stay <= both[b, h]
                ranks = {p: (r, p) for p, r in zip(pos[b, h].tolist(), rank[b, h].tolist(), strict=True) if p >= 0}
                protected = {int(now_B11[b, 0, 0])} if tier is cascade.tiers[-1] else set()
                kept, left = [ranks[p] for p in stay - protected], [ranks[p] for p in both[b, h] - stay]
                if kept and left and max(left)[0] > -np.inf:
                    worst, best = min(kept), max(left)
                    assert (
                        worst > best or abs(worst[0] - best[0]) <= near * max(1, abs(best[0])) and worst[0] != best[0]
                    )
                offered[b, h] = both[b, h] - stay


@replayed
def test_sinks_stay_recent_is_a_window_and_full_forgets_nothing(history: History) -> None:
    """Law 3: a first tier of sinks holds the first positions, of recent ones the last; a cascade that ends in full holds all."""
    first, last, seen = history.cascade.tiers[0], history.cascade.tiers[-1], np.zeros(history.B, int)
    for moment in play(history):
        seen += (moment.positions_BT >= 0).sum(1)
        for b, h in rows_of_heads(history):
            count = min(first.slots(CONTEXT, history.window), int(seen[b]))
            if isinstance(first.policy, Sink) and not history.window and len(history.cascade.tiers) > 1:
                assert sorted(held(moment.after[0], b, h)) == list(range(count))
            if isinstance(first.policy, Recent):
                assert sorted(held(moment.after[0], b, h)) == list(range(seen[b] - count, seen[b]))
            if isinstance(last.policy, Full):
                first_seen = max(0, int(seen[b]) - (history.window or CONTEXT))
                everything = {p for tier in moment.after for p in held(tier, b, h)}
                assert everything >= set(range(first_seen, seen[b]))


def timeless(policy: Policy) -> bool:
    """Whether a policy ranks by position alone, whenever it is asked."""
    if policy.reads():
        return False
    pos = jnp.arange(CONTEXT, dtype=jnp.int32)[None, None]
    early, late = (policy.priority(pos, (), jnp.full((1, 1, 1), now)).argsort(stable=True) for now in (24, 40))
    return bool((early == late).all())


TIMELESS = st.one_of(
    policies([name for name, cls in DRAWN.items() if timeless(cls())]), st.builds(Random, ARGUMENTS[int])
)


@pytest.mark.slow
@settings(max_examples=5)
@given(cascades(st.builds(recent, st.integers(1, 4), codec=st.just(f32)), tier=tiers(TIMELESS, st.just(f32))))
def test_prefill_at_once_holds_what_token_by_token_holds(cascade: Cascade) -> None:
    """Law 3: where ranks do not change with time and a window takes the newest token, the way in does not matter.

    Without a window the last tier must take each newest token, and then what it lost for that depends on the way.
    """
    history = History(cascade, B=2, K=2, G=1, H=8, chunk=16, number=0)
    positions_BT = np.where(np.arange(16) < [[16], [11]], np.arange(16), -1).astype(np.int32)
    at_once, one_by_one = (
        jax.device_get(decoded(follow(history, np.split(positions_BT, calls, 1))[-1][1])) for calls in (1, 16)
    )
    for once, singly in zip(at_once, one_by_one, strict=True):
        np.testing.assert_array_equal(np.sort(once["pos"]), np.sort(singly["pos"]))


# Look, then commit


def assert_same_arrays(cache: LayerCache, other: LayerCache) -> None:
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@functools.partial(replayed, fewer=3)
def test_a_look_of_which_nothing_is_accepted_changes_nothing(history: History) -> None:
    """Law 3: tokens that are looked at and thrown away leave every array as it was; looking itself writes nothing."""
    q, k, v = history.tokens(1)
    moments, cache = play(history), init(history.cascade, history.B, history.heads)
    here = [at(x, m.positions_BT) for m in moments for x in history.tokens()]
    for index, moment in enumerate(moments):
        _, cache = step(cache, *here[3 * index : 3 * index + 3], moment.positions_BT)
    newest_B1 = np.concatenate([m.positions_BT for m in moments], 1).max(1, keepdims=True)
    positions_BT = newest_B1 + 1 + np.arange(4, dtype=np.int32)
    seen = look(cache, q[:, :4], k[:, :4], v[:, :4], positions_BT)
    after = commit(cache, seen.accept(jnp.zeros((history.B, 4), bool)))
    assert_same_arrays(after, cache)


@functools.partial(replayed, fewer=3)
def test_what_was_rejected_leaves_no_trace(history: History) -> None:
    """Law 6: a group with rejected tokens after it has the outputs and leaves the arrays of the group alone, bit for bit."""
    q, k, v = history.tokens()
    rng = np.random.default_rng(history.number)
    cache = other = init(history.cascade, history.B, history.heads)
    seen_B1 = np.zeros((history.B, 1), np.int32)
    while seen_B1.max() < CONTEXT - 4:
        accepted_BT = np.arange(4) < rng.integers(0, 5, (history.B, 1))
        positions_BT = (seen_B1 + np.arange(4)).astype(np.int32)
        group = [at(x, positions_BT) for x in (q, k, v)]
        garbage = [np.where(accepted_BT[..., None, None], x, rng.standard_normal(x.shape, np.float32)) for x in group]
        draft = look(cache, *garbage, positions_BT).accept(jnp.asarray(accepted_BT))
        alone = look(other, *group, np.where(accepted_BT, positions_BT, -1))
        np.testing.assert_array_equal(np.asarray(draft.out_BTNW)[accepted_BT], np.asarray(alone.out_BTNW)[accepted_BT])
        cache, other = commit(cache, draft), commit(other, alone)
        assert_same_arrays(cache, other)
        seen_B1 += accepted_BT.sum(1, keepdims=True)


@pytest.mark.slow
@settings(max_examples=5)
@given(histories(cascades(tier=tiers(policies(), st.just(f32)))))
def test_looking_twice_is_looking_once(history: History) -> None:
    """Law 2: tokens that look while others are pending see them too, and both are committed as one group."""
    q, k, v = history.tokens()
    positions_BT = np.broadcast_to(np.arange(12, dtype=np.int32), (history.B, 12))
    begun = step(init(history.cascade, history.B, history.heads), q[:, :6], k[:, :6], v[:, :6], positions_BT[:, :6])[1]
    part = lambda a, b: (q[:, a:b], k[:, a:b], v[:, a:b], positions_BT[:, a:b])
    once = look(begun, *part(6, 12))
    first = look(begun, *part(6, 9))
    second = look(begun, *part(9, 12), first)
    np.testing.assert_allclose(second.out_BTNW, once.out_BTNW[:, 3:], atol=1e-5)
    for a, b in zip(jax.tree.leaves(commit(begun, second)), jax.tree.leaves(commit(begun, once)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


# Law 4: one trace


@pytest.mark.parametrize("name", DRAWN)
def test_a_decode_step_is_traced_once(name: str) -> None:
    """Law 4: while the cache fills, evicts and wraps, the same program runs, and each donated buffer is used again."""
    traces = 0

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=QUICK)
    def decode(cache, q, k, v, positions):
        nonlocal traces
        traces += 1
        return cache.step(q, k, v, positions)

    policy = example(name, DRAWN)
    cascade = Cascade(full) if isinstance(policy, Full) else Cascade(Tier(policy, 3, int8), recent(2, codec=int4h))
    cache, normal = init(cascade, 2, Heads(2, 1, 8), context=12), np.random.default_rng(0).standard_normal
    for t in range(12):
        given_up = cache
        tokens = (normal((2, 1, heads, 8), np.float32) for heads in (2, 1, 1))
        _, cache = decode(cache, *tokens, np.full((2, 1), t, np.int32))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given_up))
    assert traces == 1


def test_scoring_traces_once_and_equals_forward(nano) -> None:
    """Laws 1 and 4: one trace over two batches, the last one short, and each token's loss is the uncached forward's."""
    config, params = nano
    rows_BT = text(config, B=3)
    scores = perplexity.score(config, params, parse("full@f32"), rows_BT, batch=2)
    logits_BTV = forward(config, params, rows_BT)[:, :-1]
    want_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, rows_BT[:, 1:])
    assert scores.traces == 1
    np.testing.assert_allclose(scores.nll_BT, want_BT, atol=1e-5, rtol=1e-5)


# Law 5: claimed bytes are real bytes

ANYONES = cascades(tier=tiers(policies(OF_ANY_HEADS)))


@given(ANYONES, ANYONES, few(1, 2, None), few(3, None), few(1, 3), few(1, 2), few(8, 16), few(0, 9), few(11, 20))
def test_predicted_bytes_are_the_bytes_of_the_buffers(
    one, other, cut, end, B: int, K: int, H: int, window: int, context: int
) -> None:
    """Law 5: the spec's number of bytes per row, times the rows, is the size of all arrays that the cache is made of.

    One cascade is that of all three layers, or of those before the cut. The last layer's heads are not like the others.
    """
    spec = everywhere(one) if cut is None else CacheSpec((Part(0, cut, one), Part(cut, end, other)))
    heads = (Heads(2 * K, K, H), Heads(2 * K, K, H), Heads(3, 3, 2 * H, value_width=H, window=window))
    cache: Cache = jax.jit(lambda: spec.init(B, heads, context), compiler_options=QUICK)()
    real = sum(shard.data.nbytes for leaf in jax.tree.leaves(cache) for shard in leaf.addressable_shards)
    assert B * spec.nbytes(heads, context) == nbytes(cache) == real
    for layer in cache.layers:
        for index, (tier, slots) in enumerate(zip(layer.cascade.tiers, layer.slots, strict=True)):
            slots_there = min(tier.slots(context), layer.heads.window or context)
            assert slots.pos_BKS.shape == (B, layer.heads.kv, slots_there)
            below = layer.cascade.tiers[index:]
            if all(each.policy.append_only for each in layer.cascade.tiers[: index + 1]):
                below = below[:1]
            read = {each for t in below for each in t.policy.reads() if isinstance(each, Statistic)}
            assert len(slots.numbers) == len(read)
            for codec, stored, width in (
                (tier.codecs.k, slots.k, layer.heads.width),
                (tier.codecs.v, slots.v, layer.heads.value_width),
            ):
                if isinstance(codec, Packed):  # the bytes of a jnp.int4 array are not what is stored
                    planes = [stored[name] for name in ("codes", "codes2", "fine") if name in stored]
                    assert all(each.dtype == jnp.uint8 for each in planes)
                    assert sum(each.shape[-1] for each in planes) == width * codec.bits // 8


def test_bytes_of_a_cache_by_hand() -> None:
    """Law 5: two layers and KV heads of width 8; an entry is a key, a value, a position, and a number if a tier reads it that the token can
    still come to, which from a first tier of sinks it cannot."""
    at_bf16, at_int8, at_int4, at_f32 = 2 * 8 * 2, 2 * (8 + 2), 2 * (4 + 4), 2 * 8 * 4
    heads = (Heads(2, 2, 8),) * 2
    kept = 3 * (at_bf16 + 4) + 5 * (at_int8 + 4 + 4)  # a quarter of 19 is 5
    assert parse("sink 3 | heavy 25%@int8 | recent 4@int4").nbytes(heads, 19) == 4 * (kept + 4 * (at_int4 + 4))
    assert parse("recent 3 | heavy 2@int8/int4").nbytes(heads, 19) == 4 * (3 * (at_bf16 + 8) + 2 * (10 + 8 + 8))
    assert parse("layers[0:1]: full@f32 ; layers[1:]: recent 1").nbytes(heads, 20) == 2 * (
        20 * (at_f32 + 4) + at_bf16 + 4
    )
    assert parse("random 3@f32").nbytes(heads, 20) == 4 * (3 * (at_f32 + 4) + 4)  # and each head's own number
    windowed = (Heads(2, 2, 8, window=6),) * 2
    assert parse("full@f32").nbytes(windowed, 20) == 4 * 6 * (at_f32 + 4)


@pytest.mark.parametrize(
    ("spec", "width"), [("full@int4h", 24), ("full@nvfp4", 40), ("full@nvfp4", 80), ("full@bf16/int4", 9)]
)
def test_a_width_that_a_codec_cannot_store_is_told_where_a_cache_is_made(spec: str, width: int) -> None:
    """Law 5: what has no bytes has no cache: one line, and no array."""
    with pytest.raises(BadInput, match=f"head width .*, not {width}"):
        parse(spec).init(1, [Heads(2, 1, width)], 8)


# Law 6: independence


def follow(history: History, calls, tokens=None, between=lambda cache: cache) -> list[tuple[np.ndarray, LayerCache]]:
    """The output of each call and the cache after it."""
    cache, results = init(history.cascade, history.B, history.heads), []
    q, k, v = tokens or history.tokens()
    for positions_BT in calls:
        out, cache = step(between(cache), at(q, positions_BT), at(k, positions_BT), at(v, positions_BT), positions_BT)
        results.append((np.asarray(out), cache))
    return results


@replayed
def test_a_row_does_not_depend_on_the_other_rows(history: History) -> None:
    """Law 6: with other tokens, lengths and padding in the other rows, a row's outputs and positions are the same."""
    for row in (0, history.B - 1):
        mine = lambda x, others, row=row: np.where(
            (np.arange(history.B) == row).reshape(-1, *[1] * (x.ndim - 1)), x, others
        )
        calls = [mine(*pair) for pair in zip(history.calls(0), history.calls(1), strict=False)]
        tokens = tuple(map(mine, history.tokens(0), history.tokens(1)))
        for moment, (out, cache) in zip(play(history), follow(history, calls, tokens), strict=False):
            np.testing.assert_allclose(out[row], moment.out_BTNH[row], atol=1e-6, rtol=1e-6)
            for slots, tier in zip(cache.slots, moment.after, strict=True):
                np.testing.assert_array_equal(slots.pos_BKS[row], tier["pos"][row])


@replayed
def test_the_order_of_tokens_in_a_call_does_not_matter(history: History) -> None:
    """Law 6: where a call's tokens and its padding stand in the batch is nothing to a cache: positions say where tokens are."""
    mix, calls, orders = np.random.default_rng(0), [], []
    for positions_BT in history.calls():
        orders.append(mix.permuted(np.broadcast_to(np.arange(positions_BT.shape[1]), positions_BT.shape), axis=1))
        calls.append(np.take_along_axis(positions_BT, orders[-1], 1))
    for moment, order_BT, (out, cache) in zip(play(history), orders, follow(history, calls), strict=True):
        want = np.take_along_axis(moment.out_BTNH, order_BT[:, :, None, None], 1)
        np.testing.assert_allclose(out, want, atol=1e-6, rtol=1e-6)
        for slots, tier in zip(cache.slots, moment.after, strict=True):
            np.testing.assert_array_equal(np.sort(slots.pos_BKS), np.sort(tier["pos"]))


@replayed
def test_the_order_of_slots_does_not_matter(history: History) -> None:
    """Law 6: with each head's slots shuffled before each call the outputs are the same: a slot's index means nothing."""
    mix = np.random.default_rng(0)

    def shuffled(cache: LayerCache) -> LayerCache:
        slots = []
        for tier in cache.slots:
            order_BKS = mix.permuted(np.broadcast_to(np.arange(tier.pos_BKS.shape[2]), tier.pos_BKS.shape), axis=2)
            leaves, kind = jax.tree.flatten(tier)
            mixed = []
            for leaf in leaves:
                order = order_BKS.reshape(order_BKS.shape + (1,) * (leaf.ndim - 3))
                mixed.append(jnp.asarray(np.take_along_axis(np.asarray(leaf), order, 2)))
            slots.append(jax.tree.unflatten(kind, mixed))
        return dataclasses.replace(cache, slots=tuple(slots))

    results = follow(history, history.calls(), between=shuffled)
    for moment, (out, cache) in zip(play(history), results, strict=True):
        np.testing.assert_allclose(out, moment.out_BTNH, atol=1e-6, rtol=1e-6)
        for slots, tier in zip(cache.slots, moment.after, strict=True):
            np.testing.assert_array_equal(np.sort(slots.pos_BKS), np.sort(tier["pos"]))


@pytest.mark.slow
@settings(max_examples=3)
@given(cascades())
def test_the_amount_of_padding_does_not_matter(cascade: Cascade) -> None:
    """Law 6: twice three tokens in calls of three and of seven give the same outputs and leave the same tokens."""
    history = History(cascade, B=1, K=2, G=2, H=8, chunk=3, number=0)
    calls = [np.array([[0, 1, 2]], np.int32), np.array([[3, 4, 5]], np.int32)]
    padded = [np.concatenate([positions, np.full((1, 4), -1, np.int32)], 1) for positions in calls]
    for (out, cache), (out_padded, cache_padded) in zip(follow(history, calls), follow(history, padded), strict=True):
        np.testing.assert_allclose(out_padded[:, :3], out, atol=1e-6, rtol=1e-6)
        np.testing.assert_array_equal(out_padded[:, 3:], 0)
        for a, b in zip(cache.slots, cache_padded.slots, strict=True):
            np.testing.assert_array_equal(np.sort(a.pos_BKS), np.sort(b.pos_BKS))


@replayed
def test_an_evicted_entry_leaves_no_trace(history: History) -> None:
    """Law 6: had the tokens evicted by now had other values and keys, nothing would change, as long as the same ones are evicted.

    Without a statistic they are.
    """
    calls, moments = list(history.calls()), play(history)
    held_BKP = (joined(moments[-1].before, "pos")[..., None] == np.arange(CONTEXT)).any(2)
    seen_B1P = np.arange(CONTEXT) <= np.concatenate(calls[:-1], 1).max(1)[:, None, None]
    evicted_BPK1 = (seen_B1P & ~held_BKP).swapaxes(1, 2)[..., None]
    q, k, v = history.tokens()
    for changed in (
        (q, k, v + 1e4 * evicted_BPK1.astype(np.float32)),
        (q, k + 1e4 * evicted_BPK1.astype(np.float32), v),
    ):
        *earlier, (_, before), (out, after) = follow(history, calls, changed)
        same = [
            np.array_equal(slots.pos_BKS, tier["pos"])
            for cache, tiers in ((before, moments[-1].before), (after, moments[-1].after))
            for slots, tier in zip(cache.slots, tiers, strict=True)
        ]
        assert all(same) or history.cascade.statistics
        if all(same):
            np.testing.assert_array_equal(out, moments[-1].out_BTNH)


@pytest.mark.slow
@settings(max_examples=5)
@given(cascades(tier=tiers(policies(), st.just(f32)), sizes=(2, 1)), st.integers(0, 2**16))
def test_the_gradient_of_an_evicted_entry_is_zero(cascade: Cascade, number: int) -> None:
    """Law 6: the last output's gradient is exactly zero for evicted keys and values, and is not for those held."""
    q, k, v = (x[:, :12].swapaxes(0, 1)[:, :, None] for x in History(cascade, 1, 2, 2, 8, 2, number).tokens())

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradient(k, v):
        def decode(cache, token):
            out, cache = cache.step(*token)
            return cache, out

        positions = jnp.arange(12)[:, None, None]
        cache, out = jax.lax.scan(decode, LayerCache.empty(cascade, 1, Heads(4, 2, 8), CONTEXT), (q, k, v, positions))
        return (out[-1] * q[0]).sum(), [slots.pos_BKS for slots in cache.slots]

    gradients, pos = gradient(k, v)
    held_KP = (np.concatenate(pos, 2)[0, :, :, None] == np.arange(12)).any(1)
    felt_KP = held_KP & (held_KP.sum(-1, keepdims=True) > 1)  # the weight of a lone key is 1, whatever the key
    for d_PBTKH, expected_KP in zip(gradients, (felt_KP, held_KP), strict=True):
        np.testing.assert_array_equal(np.abs(d_PBTKH).max((1, 2, 4)).T > 0, expected_KP)


# Law 7: round trips

ANY = {
    int: st.integers(),
    Whole: st.integers(0),
    Positive: st.integers(1),
    float: st.floats(allow_nan=False, allow_infinity=False),
}
ANY |= {bool: st.booleans(), str: st.from_regex(r"[\w.+-]+", fullmatch=True)}
ANY |= {Place: st.from_regex(r"[^\s|,;@\[\]]*", fullmatch=True)}
shares = st.floats(0.01, 100).map(lambda share: f"{share:.2f}%")
any_count = st.one_of(st.integers(1, 10**6), shares)
any_cascades = cascades(tier=tiers(policies(POLICIES, ANY), count=any_count), sizes=range(1, 6))


any_heads = st.none() | st.sets(st.integers(0, 12), min_size=1).map(lambda heads: tuple(sorted(heads)))
any_parts = st.builds(Part, st.integers(0, 9), st.none() | st.integers(10, 99), any_cascades, any_heads)


@settings(max_examples=100)
@given(
    st.one_of(
        st.lists(any_parts, min_size=1, max_size=3),
        st.tuples(st.builds(Part, st.just(0), st.none(), any_cascades, st.none())),
    )
)
def test_a_spec_prints_as_the_text_that_it_is_parsed_from(parts) -> None:
    """Law 7: parse after str is the identity, over all policies, arguments, counts, shares, codecs and parts."""
    spec = CacheSpec(tuple(parts))
    assert parse(str(spec)) == spec
    assert str(parse(str(spec))) == str(spec)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_name_for_its_text(name: str) -> None:
    """Law 7: a preset parses as its line does, and prints as that line."""
    assert parse(name) == parse(PRESETS[name])
    assert str(parse(f" {name} ")) == PRESETS[name]


def vectors() -> np.ndarray:
    """Vectors of 16 numbers: normal, constant, zero, with a huge outlier, tiny, large, far from zero, one-sided, next to the smallest."""
    x = np.random.default_rng(0).standard_normal((10, 50, 16)).astype(np.float32)
    x[1] = x[1, :, :1]
    x[2] = 0
    x[3, :, 5] = 1e6
    x[4] *= 1e-30
    x[5] *= 1e30
    x[6] = 1000 + x[6]
    x[7] = -np.abs(x[7])
    x[8, :, 1:] = 0
    x[9] *= 1e-37
    return x


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_decoded_is_within_the_bound(codec: Codec, compiled: bool) -> None:
    """Law 7: encode then decode misses each number of the stored basis by at most the codec's bound, a zero by nothing."""

    def round_trip(x):
        stored = codec.encode(x)
        return codec.decode(stored), codec.bound(stored)

    x = jnp.asarray(vectors())
    back, bound = map(np.asarray, (jax.jit(round_trip) if compiled else round_trip)(x))
    rotation = 1e-6 * np.abs(x).max(-1, keepdims=True)  # of float32, which the bound is not about
    assert (np.abs(codec.turn(jnp.asarray(back - x))) <= bound + rotation * codec.turned).all()
    np.testing.assert_array_equal(back[2], 0)
    if codec == f32:
        np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_turning_keeps_dot_products_and_turns_back(codec: Codec) -> None:
    """Law 7: a codec may turn vectors, never their dot products, and turning twice is the identity."""
    x, y = jnp.asarray(np.random.default_rng(0).standard_normal((2, 50, 16)), jnp.float32)
    turned = [np.asarray(codec.turn(vector), np.float64) for vector in (x, y)]
    np.testing.assert_allclose(
        (turned[0] * turned[1]).sum(-1), (np.asarray(x, np.float64) * np.asarray(y)).sum(-1), atol=1e-5
    )
    np.testing.assert_allclose(codec.turn(codec.turn(x)), x, atol=1e-6)
    assert np.allclose(turned[0], x) != codec.turned
