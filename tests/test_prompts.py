"""Prompts in parts, tiers that stand in front once a prompt is over, and turns that are settled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.cascade import Cascade
from kvcascade.cache.errors import BadInput
from kvcascade.cache.prompt import Prompt
from kvcascade.cache.spec import everywhere, parse
from kvcascade.cache.tier import heavy, recent, sink
from kvcascade.cache.whole import Cache, nbytes
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=256, context=256)
PARAMS = jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, gpt.init(CONFIG, 0))
TEXT = np.random.default_rng(0).integers(0, 256, (3, 64), np.int32)
LENGTHS = np.array([64, 41, 17])
POSITIONS = np.where(np.arange(64) < LENGTHS[:, None], np.arange(64), -1).astype(np.int32)


def prefilled(spec: str, chunk: int, rows: slice = slice(None)) -> tuple[np.ndarray, Cache]:
    tokens, positions = jnp.asarray(TEXT[rows]), jnp.asarray(POSITIONS[rows])
    cache = generate.empty_cache(CONFIG, parse(spec), len(tokens), 96)
    logits_BV, cache = generate.prefill(CONFIG, PARAMS, cache, tokens, positions, chunk)
    return np.asarray(logits_BV), cache


def held(cache: Cache, tier: int, layer: int = 0) -> np.ndarray:
    """Positions in a tier, sorted, [B, K, S]."""
    return np.sort(np.asarray(cache.layers[layer].slots[tier].pos_BKS))


@pytest.mark.parametrize("chunk", [5, 16, 63])
def test_parts_into_a_full_cache_are_the_whole(chunk: int) -> None:
    """Where nothing is lost, neither logits nor what is held depend on the parts; rows are of unequal lengths."""
    (whole, cache), (logits, parts) = prefilled("full@f32", 0), prefilled("full@f32", chunk)
    np.testing.assert_allclose(logits, whole, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(held(parts, 0), held(cache, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["sink 2 | recent 14", "sink 2 | snap[window=4] 14", "recent 4 | heavy 12@int8", "tova 12 then recent 8"]
)
def test_parts_are_calls_of_so_many_tokens(spec: str) -> None:
    """One program for all parts does what a call for each does: an eviction is felt by the parts that come later."""
    logits, cache = prefilled(spec, 16)
    one_by_one = generate.empty_cache(CONFIG, parse(spec), 3, 96)
    step = jax.jit(gpt.step, static_argnames="config")
    for first in range(0, 64, 16):
        part = slice(first, first + 16)
        found, one_by_one = step(
            CONFIG, PARAMS, one_by_one, jnp.asarray(TEXT[:, part]), jnp.asarray(POSITIONS[:, part])
        )
        last = np.flatnonzero((LENGTHS > first) & (LENGTHS <= first + 16))
        np.testing.assert_allclose(
            logits[last], np.asarray(found)[last, LENGTHS[last] - 1 - first], atol=1e-4, rtol=1e-4
        )
    for tier in range(len(cache.layers[0].slots)):
        for layer in range(2):
            np.testing.assert_array_equal(held(cache, tier, layer), held(one_by_one, tier, layer))
    alone, _ = prefilled(spec, 16, slice(1, 2))
    np.testing.assert_allclose(alone[0], logits[1], atol=1e-4, rtol=1e-4)


def test_a_long_prompt_and_a_small_cache_go_in_parts_by_default() -> None:
    config = dataclasses.replace(CONFIG, context=8192)
    empty = lambda spec: generate.empty_cache(config, parse(spec), 1, 8192)
    assert generate.chunk_for(config, empty("sink 4 | recent 508"), 8000) == generate.CHUNK
    assert generate.chunk_for(config, empty("sink 4 | recent 508"), 2048) == 0
    assert generate.chunk_for(config, empty("full"), 8000) == 0


@pytest.mark.slow
def test_memory_of_a_prompt_in_parts_does_not_grow_with_it() -> None:
    """XLA's temporaries of a prompt four times as long are the same, but for the tokens themselves; at once they are not."""
    config = dataclasses.replace(CONFIG, context=8192)

    def temporaries(tokens: int, chunk: int) -> int:
        cache = generate.empty_cache(config, parse("sink 4 | recent 124"), 1, 4096)
        leaves, kind = jax.tree.flatten(cache)

        def enter(leaves, tokens_BT, positions_BT):
            return gpt.first_step(config, PARAMS, jax.tree.unflatten(kind, leaves), tokens_BT, positions_BT, chunk)

        lowered = jax.jit(enter).lower(leaves, jnp.zeros((1, tokens), jnp.int32), jnp.arange(tokens)[None])
        found = lowered.compile().memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    short, long = temporaries(1024, 128), temporaries(4096, 128)
    assert long - short <= 2 * 4 * 2 * 3072 + 4096
    assert temporaries(4096, 0) > 5 * long


@pytest.mark.parametrize("spec", ["snap[window=4] 12 then recent 8", "sink 2 | recent 10@int8 then sink 1 | recent 7"])
def test_what_is_generated_stands_in_front(spec: str) -> None:
    """The prompt is held by the tiers before `then`; nothing of it goes while those after `then` have room, and what they evict sinks to it."""
    cascade = parse(spec).parts[0][2]
    assert str(cascade) == spec and parse(spec) == everywhere(Cascade(*cascade.tiers, front=cascade.front))
    _, cache = prefilled(spec, 0)
    assert nbytes(cache) == 3 * parse(spec).nbytes(CONFIG.layer_heads, 96)
    front, back = range(cascade.front), range(cascade.front, len(cascade.tiers))
    assert all((held(cache, tier) == -1).all() for tier in front)
    before = [held(cache, tier) for tier in back]
    seen = LENGTHS.copy()
    for count in range(1, 13):
        token, position = jnp.asarray(TEXT[:, count]), jnp.asarray(seen, jnp.int32)
        _, cache = generate.decode_step(CONFIG, PARAMS, cache, token, position)
        seen += 1
        new = np.sort(np.concatenate([held(cache, tier) for tier in front], -1))
        if count <= 8:
            assert [np.array_equal(held(cache, tier), was) for tier, was in zip(back, before, strict=True)] == [
                True
            ] * len(before)
            want = seen[:, None] - 1 - np.arange(count)[::-1]
            np.testing.assert_array_equal(new[:, 0, -count:], want)
    after = np.concatenate([held(cache, tier) for tier in back], -1)
    assert (after.max(-1) >= LENGTHS[:, None]).all(), "what left the tiers in front did not sink"


def test_turns_are_settled() -> None:
    """Five turns: at the end of each the tiers in front are empty, its tokens are among the others' by their policies, and all is as positions say."""
    spec = parse("sink 2 | heavy 20 then recent 6")
    cache = generate.empty_cache(CONFIG, spec, 3, 96)
    seen, draw = np.zeros(3, int), np.random.default_rng(1)
    enter = jax.jit(gpt.next_step, static_argnames=("config", "chunk"))
    for turn in range(5):
        length = draw.integers(3, 11, 3)
        positions = np.where(np.arange(10) < length[:, None], seen[:, None] + np.arange(10), -1).astype(np.int32)
        tokens = jnp.asarray(draw.integers(0, 256, (3, 10)), jnp.int32)
        _, cache = enter(CONFIG, PARAMS, cache, tokens, jnp.asarray(positions), chunk=4)
        seen += length
        assert (held(cache, 0) == -1).all(), "a prompt went into a tier in front"
        for _ in range(5):
            logits_BV, cache = generate.decode_step(CONFIG, PARAMS, cache, tokens[:, 0], jnp.asarray(seen, jnp.int32))
            assert np.isfinite(np.asarray(logits_BV)).all()
            seen += 1
        answered = held(cache, 0)
        np.testing.assert_array_equal(answered[:, 0, -5:], seen[:, None] - 5 + np.arange(5))
        everything = lambda cache: [
            np.concatenate([held(cache, tier) for tier in range(3)], -1)[b, h] for b in range(3) for h in range(2)
        ]
        before, cache = everything(cache), cache.settled()
        assert (held(cache, 0) == -1).all()
        np.testing.assert_array_equal(held(cache, 1)[:, :, -2:], np.broadcast_to([0, 1], (3, 2, 2)))
        for was, now in zip(before, everything(cache), strict=True):
            was, now = ({p for p in some.tolist() if p >= 0} for some in (was, now))
            assert now <= was and len(now) == min(22, len(was))
        if turn < 2:
            assert all(set(range(max(0, n - 22), n)) for n in seen)


def test_a_prompt_for_several_caches_enters_whole() -> None:
    """In parts, each would have seen another past."""
    tokens, positions = jnp.asarray(TEXT), jnp.asarray(POSITIONS)
    with pytest.raises(ValueError, match="enters whole"):
        gpt.first_step(CONFIG, PARAMS, Prompt(CONFIG.layer_heads, 96), tokens, positions, 16)


def test_a_cache_without_tiers_in_front_is_settled_already() -> None:
    _, cache = prefilled("sink 2 | recent 10", 0)
    assert cache.settled() is not None and jax.tree.structure(cache.settled()) == jax.tree.structure(cache)


def test_what_cannot_stand_in_front_is_refused() -> None:
    with pytest.raises(BadInput, match="then stands once"):
        parse("sink 4 then recent 4 then recent 8")
    with pytest.raises(BadInput, match="full tier"):
        parse("sink 4 then full")
    with pytest.raises(BadInput, match="a tier is missing"):
        parse("sink 4 then ")
    with pytest.raises(BadInput, match="cannot stand before"):
        Cascade(sink(4), recent(4), front=2)
    assert str(Cascade(recent(8), heavy(4), front=1)) == "heavy 4 then recent 8"
