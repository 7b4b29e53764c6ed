"""Caches by KV heads: each head keeps what its own cascade says, as if it were alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.spec import parse
from kvcascade.cache.whole import Cache, nbytes
from kvcascade.kernels.backend import using
from kvcascade.kernels.decode import Members, decode_groups
from kvcascade.kernels.heads import Heads, Rope
from kvcascade.kernels.partial import normalise

HEADS = Heads(8, 4, 16, rope=None)
SPECS = [
    "heads[0]: recent 9 ; heads[1:4]: sink 2 | recent 3",
    "heads[2]: full ; heads[0,3]: sink 1 | recent 4 | heavy 4@int8 ; heads[1]: tova 7",
    "heads[3]: decayed 5 ; heads[0]: recent 2 | keydiff 6@int4h ; heads[1,2]: random 6@int8/int4",
    "heads[0,1]: lru 4 | heavy 5 ; heads[2,3]: vatp 9 then recent 5",
]


def tokens(seed: int, B: int, T: int, start: int = 0):
    """Queries, keys, values, positions and what values write, of T tokens; the second row is padded on the right."""
    draw = np.random.default_rng(seed).standard_normal
    q, k, v = (jnp.asarray(draw((B, T, n, 16)), jnp.float32) for n in (8, 4, 4))
    positions = np.broadcast_to(np.arange(start, start + T), (B, T)).astype(np.int32).copy()
    if T > 1:
        positions[1, -3:] = -1
    return q, k, v, jnp.asarray(positions), jnp.abs(jnp.asarray(draw((B, T, 4)), jnp.float32))


def alone(spec: str, head: int) -> LayerCache:
    """What one KV head holds, as a layer of its own."""
    (group,) = [each for each in parse(spec).groups([HEADS]) if head in each.chosen]
    return LayerCache.empty(group.cascade, 2, HEADS.part(1), 40, (head,))


def of_head(head: int, q, k, v, positions, written):
    return q[:, :, 2 * head : 2 * head + 2], k[:, :, [head]], v[:, :, [head]], positions, written[:, :, [head]]


@pytest.mark.parametrize(("spec", "implementation"), [(SPECS[1], "xla"), *((spec, None) for spec in SPECS)])
def test_each_head_is_as_if_alone(spec: str, implementation) -> None:
    """A prompt, a part after it, and single tokens: the same attention and the same slots as of each head in a layer of its own."""
    with using(implementation):
        cache = parse(spec).init(2, [HEADS], 40)
        heads = [alone(spec, head) for head in range(4)]
        assert isinstance(cache, Cache) and len(cache.layers) > 1
        start = 0
        for seed, T in enumerate([12, 6, *(1,) * 8]):
            q, k, v, positions, written = tokens(seed, 2, T, start)
            out, cache = jax.jit(Cache.step, static_argnames=("index", "fresh"))(
                cache, 0, q, k, v, positions, fresh=not start, written_BTK=written
            )
            for head in range(4):
                *some, mine = of_head(head, q, k, v, positions, written)
                wanted, heads[head] = jax.jit(LayerCache.step, static_argnames="fresh")(
                    heads[head], *some, fresh=not start, written_BTK=mine
                )
                found = out[:, :, 2 * head : 2 * head + 2]
                there = np.asarray(positions >= 0)
                np.testing.assert_allclose(np.asarray(found)[there], np.asarray(wanted)[there], atol=2e-6)
            if not start:
                cache, heads = cache.answering(), [each.answering() for each in heads]
            start += T
    for group in parse(spec).groups([HEADS]):
        (place,) = [share.place for share in cache.of[0] if share.chosen == group.chosen]
        for index, head in enumerate(group.chosen):
            for ours, wanted in zip(cache.layers[place].slots, heads[head].slots, strict=True):
                order, other = (np.argsort(x) for x in (ours.pos_BKS[:, index], wanted.pos_BKS[:, 0]))
                at = lambda x, order: np.take_along_axis(np.asarray(x), order, 1)
                np.testing.assert_array_equal(at(ours.pos_BKS[:, index], order), at(wanted.pos_BKS[:, 0], other))
                for number, its in zip(ours.numbers, wanted.numbers, strict=True):
                    np.testing.assert_allclose(at(number[:, index], order), at(its[:, 0], other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS[:3])
def test_a_draft_is_a_cache(spec: str) -> None:
    """What is looked at and committed is what a call of the same tokens takes in."""
    cache = parse(spec).init(2, [HEADS], 40)
    q, k, v, positions, written = tokens(0, 2, 5)
    wanted, after = cache.step(0, q, k, v, positions, written_BTK=written)
    found, draft = cache.draft().step(0, q, k, v, positions, written_BTK=written)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    for ours, its in zip(jax.tree.leaves(draft.commit()), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(its, np.float32), atol=1e-6)


@pytest.mark.parametrize("observed", [(False, False), (True, False), (True, True)])
def test_one_native_call_takes_all_groups(observed) -> None:
    """The C++ kernel's attention over groups of unlike tiers is the reference's, with the weights of those that are observed."""
    cache = parse("heads[1]: recent 300@int8 | random 60@int4 ; heads[0,2,3]: sink 2 | recent 20@bf16").init(
        2, [HEADS], 400
    )
    q, k, v, _, _ = tokens(0, 2, 380)
    positions = jnp.broadcast_to(jnp.arange(380), (2, 380))
    _, cache = cache.step(0, q, k, v, positions, fresh=True)
    groups = [
        Members(share.chosen, cache.layers[share.place].held, wanted)
        for share, wanted in zip(cache.of[0], observed, strict=True)
    ]
    now = jnp.asarray([379, 379], jnp.int32)
    attend = functools.partial(decode_groups, groups=groups, heads=HEADS)
    by_each = lambda name: jax.jit(functools.partial(attend, implementation=name))(q[:, 0], now)
    found = {name: [normalise([each]) for each in by_each(name)] for name in ("xla", "native")}
    for (ours, mass), (wanted, its) in zip(found["native"], found["xla"], strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-6)
        assert len(mass) == len(its)
        for x, y in zip(mass, its, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-6)
    calls = jax.jit(lambda q: decode_groups(q, now, groups, HEADS, "native")).lower(q[:, 0]).as_text()
    assert calls.count("kvcascade_decode") == 1


BY_HEADS = [
    "heads[0]: full ; heads[1,2]: sink 4 | recent 60",
    "heads[0]: recent 1152 ; heads[1,2]: recent 192",
    "layers[0:2]: full ; layers[2:] heads[1]: full@int8 ; layers[2:] heads[0,2]: sink 4 | recent 124",
    "heads[0,1]: sink 4 | recent 60 | heavy 64@int8 ; heads[2]: recent 16@int4",
    "heads[0]: snap 200 ; heads[1]: expected 100 | heavy 20 ; heads[2]: tri 64",
    "layers[0:1] heads[0:3]: full@int4h ; layers[1:] heads[0]: full@int2h ; layers[1:] heads[1,2]: recent 40@int3",
    "heads[2]: recent 25% ; heads[1]: heavy 10% ; heads[0]: recent 50%",
    "heads[0]: kvzip 100 ; heads[1,2]: compactor 50@int8",
    "heads[1]: heavy 1000@lloyd4h/lloyd2h ; heads[0,2]: recent 100@nvfp4",
    "heads[0]: r-kv 60 | hinted 40 ; heads[1]: drop 60 ; heads[2]: capkv 60@fp8",
]


@pytest.mark.parametrize("text", BY_HEADS)
def test_claimed_bytes_are_measured(text: str) -> None:
    spec = parse(text)
    heads = (Heads(9, 3, 64, rope=Rope()),) * 3
    cache = spec.init(2, heads, 512)
    assert nbytes(cache) == sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == 2 * spec.nbytes(heads, 512)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("heads[0,1]: full", "head 2 of layer 0, which has 4 KV heads, is in no part"),
        ("heads[0:5]: full", "layer 0 has 4 KV heads, there is no head 4"),
        ("heads[0:4]: full ; heads[1]: recent 3", "head 1 of layer 0 is in two parts"),
        ("layers[0:1] heads[0:4]: full ; layers[1:]: full ; layers[0:]: full", "layer 0 is in two parts"),
        ("heads[0,0]: full", "names one twice"),
        ("heads[2:2]: full", "has no heads"),
        ("heads[]: full", "one by one or as ranges"),
        ("heads[0:4]: full on blocks", "not parted by heads"),
        ("heads[0]: full ; recent 3", "starts with layers"),
    ],
)
def test_heads_that_do_not_tile_are_refused(text: str, reason: str) -> None:
    if "on blocks" in text:
        text = "heads[0]: full on blocks ; heads[1:4]: full@int8 on blocks"
    with pytest.raises(BadInput, match=reason):
        parse(text).init(1, [HEADS, HEADS], 20)


@pytest.mark.parametrize("text", [*SPECS, *BY_HEADS, "heads[0:3,4,7]: full"])
def test_text_round_trips(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


def test_equal_cascades_are_one_group() -> None:
    groups = parse("heads[1]: recent 3 ; heads[0]: full ; heads[2,3]: recent 3").groups([HEADS])
    assert [each.chosen for each in groups] == [(0,), (1, 2, 3)]
    assert dataclasses.replace(HEADS, kv=3, queries=6) == groups[1].heads
