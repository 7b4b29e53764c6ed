"""Tokens that wait: handed over together, by the tiers behind ranked once, and the same however they came."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_laws import CONTEXT, dense

from kvcascade.cache.cascade import Cascade
from kvcascade.cache.codec import f32, int8
from kvcascade.cache.errors import BadInput
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.spec import parse
from kvcascade.cache.tier import Tier, full, heavy, pending, random, recent, sink
from kvcascade.cache.whole import nbytes
from kvcascade.kernels.heads import Heads

B, K, N, H = 2, 2, 4, 8
HEADS = Heads(N, K, H)
BEHIND = [
    (full,),
    (sink(2), recent(9)),
    (recent(6, codec=int8), random(7)),
    (sink(1), random(5, codec=f32), recent(5, codec=int8)),
]
"""Tiers whose last one keeps the newest token anyway, which one that takes tokens one by one must."""

step = jax.jit(LayerCache.step, static_argnames="fresh")
look, commit = jax.jit(LayerCache.look), jax.jit(LayerCache.commit)


def tokens(seed: int) -> list[np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal
    return [draw((B, CONTEXT, heads, H), np.float32) for heads in (N, K, K)]


def some(each, positions_BT):
    return [np.take_along_axis(x, positions_BT.clip(0)[:, :, None, None], 1) for x in each]


def content(slots) -> list[np.ndarray]:
    """All that is in slots, in the order of positions, and nothing of the empty ones."""
    pos = np.asarray(slots.pos_BKS)
    order = np.argsort(np.where(pos < 0, CONTEXT, pos), 2)

    def sorted_(x):
        x = np.asarray(x.astype("float32"))
        wide = lambda y: y.reshape(*y.shape, *(1,) * (x.ndim - 3))
        return np.take_along_axis(np.where(wide(pos < 0), -1, x), wide(order), 2)

    return [sorted_(x) for x in jax.tree.leaves(slots)]


def same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(content(a), content(b), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("behind", BEHIND, ids=lambda tiers: str(Cascade(*tiers)))
@settings(max_examples=4)
@given(count=st.sampled_from([1, 4]), lag=st.integers(0, 5), seed=st.integers(0, 99))
@example(count=4, lag=3, seed=0)
def test_tiers_behind_hold_what_they_do_of_groups(behind, count, lag, seed):
    """One by one through `pending` is as groups that enter the tiers behind at once; of rows that are not at the same place each by itself."""
    each, cascade = tokens(seed), Cascade(pending(count, codec=f32), *behind)
    cache = LayerCache.empty(cascade, B, HEADS, CONTEXT)
    alone = LayerCache.empty(Cascade(*behind), B, HEADS, CONTEXT)
    for now in range(CONTEXT - lag):
        positions_B1 = np.asarray([[now], [now - lag if now >= lag else -1]], np.int32)
        given_ = some(each, positions_B1)
        over = (positions_B1 > 0) & (positions_B1 % count == 0)
        if over.any():
            before = positions_B1 - count + np.arange(count, dtype=np.int32)
            group = np.where(over, before, -1)
            alone = commit(alone, look(alone, *some(each, group), group))
        out, cache = step(cache, *given_, positions_B1)
        same(cache.slots[1:], alone.slots)
        want = np.where(positions_B1 < 0, -1, positions_B1 // count * count + np.arange(count))
        want = np.where(want > positions_B1, -1, want)
        np.testing.assert_array_equal(np.asarray(cache.slots[0].pos_BKS), np.broadcast_to(want[:, None], (B, K, count)))
        held = [
            [codec.decode(x) for codec, x in zip(tier.codecs, (slots.k, slots.v), strict=True)]
            for tier, slots in zip(cascade.tiers, cache.slots, strict=True)
        ]
        k, v = (np.concatenate([np.asarray(x[i]) for x in held], 2) for i in (0, 1))
        pos = np.concatenate([np.asarray(slots.pos_BKS) for slots in cache.slots], 2)
        np.testing.assert_allclose(out, dense(given_[0], k, v, positions_B1, pos)[0], atol=1e-5)


@settings(max_examples=4)
@given(count=st.sampled_from([1, 3, 8]), size=st.integers(1, 6), seed=st.integers(0, 99))
def test_heavy_hitters_are_chosen_of_groups(count, size, seed):
    """Against attention in float64 over a plain dictionary of tokens."""
    q, k, v = tokens(seed)
    cache = LayerCache.empty(Cascade(pending(count, codec=f32), heavy(size, codec=f32)), B, HEADS, CONTEXT)
    held = [[{} for _ in range(K)] for _ in range(B)]
    for now in range(CONTEXT):
        at = np.full((B, 1), now, np.int32)
        out, cache = step(cache, q[:, now, None], k[:, now, None], v[:, now, None], at)
        for b, head in itertools.product(range(B), range(K)):
            mass = held[b][head]
            if now % count == 0:  # the best of those that were chosen and those that have waited
                best = sorted(mass, key=lambda p: (mass[p], p), reverse=True)[:size]
                mass = held[b][head] = {p: mass[p] for p in best}
            mass[now] = 0.0
            seen = [*mass]
            scores = np.exp(q[b, now, 2 * head : 2 * head + 2].astype(float) @ k[b, seen, head].T / H**0.5)
            weights = scores / scores.sum(1, keepdims=True)
            np.testing.assert_allclose(out[b, 0, 2 * head : 2 * head + 2], weights @ v[b, seen, head], atol=1e-5)
            for place, p in enumerate(seen):
                mass[p] += weights[:, place].sum()
            pos = np.concatenate([np.asarray(slots.pos_BKS[b, head]) for slots in cache.slots])
            assert {*pos[pos >= 0]} == {*seen}


@pytest.mark.parametrize(
    "text", ["pending 4 | sink 2 | recent 9", "pending 4 | random 6@int8 | recent 4", "pending 4 | full@int8"]
)
def test_chunks_at_multiples_leave_what_groups_do(text):
    """A prompt in chunks cut at multiples of what waits, its end in the window: the groups enter as they do one by one."""
    each, cascade = tokens(3), parse(text).cascades[0]
    caches = []
    for size in (4, 1):
        cache = LayerCache.empty(cascade, B, HEADS, CONTEXT)
        for start in range(0, 23, size):
            positions = np.arange(start, min(start + size, 23), dtype=np.int32)[None].repeat(B, 0)
            _, cache = step(cache, *some(each, positions), positions)
        caches.append(cache)
    same(caches[0].slots, caches[1].slots)
    np.testing.assert_array_equal(caches[0].slots[0].pos_BKS, caches[1].slots[0].pos_BKS)


def test_a_long_prompt_leaves_its_last_tokens_waiting():
    each = tokens(5)
    cache = LayerCache.empty(parse("pending 8 | sink 2 | recent 6").cascades[0], B, HEADS, CONTEXT)
    positions = np.stack([np.arange(24), np.where(np.arange(24) < 19, np.arange(24), -1)]).astype(np.int32)
    _, cache = step(cache, *some(each, positions), positions, fresh=True)
    held = [
        sorted(int(p) for slots in cache.slots for p in np.asarray(slots.pos_BKS[b, 0]) if p >= 0) for b in range(B)
    ]
    assert held == [[0, 1, *range(10, 16), *range(16, 24)], [0, 1, *range(10, 16), *range(16, 19)]]


@pytest.mark.parametrize(
    "text",
    [
        "pending 16 | sink 4 | recent 60",
        "sink 16@int8 on blocks | pending 8 | recent 24 | heavy 16@int8",
        "snap 25% then pending 8 | recent 40",
    ],
)
def test_text_and_bytes(text):
    spec = parse(text)
    assert str(spec) == text and parse(str(spec)) == spec
    assert nbytes(spec.init(1, [HEADS] * 3, 64)) == spec.nbytes([HEADS] * 3, 64)


def test_a_window_of_a_layer_does_not_make_the_wait_shorter():
    cascade = Cascade(pending(8), recent(16))
    cache = LayerCache.empty(cascade, B, dataclasses.replace(HEADS, window=4), CONTEXT)
    assert [slots.pos_BKS.shape[2] for slots in cache.slots] == [8, 4]


@pytest.mark.parametrize(
    "tiers", [(pending(4),), (recent(4), pending(4), sink(2)), (pending(4), pending(4), recent(4))], ids=str
)
def test_it_stands_first_and_once(tiers: tuple[Tier, ...]):
    with pytest.raises(BadInput, match="must be the first tier of those that rows have of their own"):
        Cascade(*tiers)


def test_how_many_wait_is_a_number():
    with pytest.raises(BadInput, match="how many tokens wait is a number, not 10%"):
        parse("pending 10% | recent 4")
