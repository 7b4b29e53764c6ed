"""Ten faults that a toolkit for compressing caches can have, each found in one that is widely used, as tests that this one passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from planted_rankers import example

from kvcascade.cache.cascade import Cascade
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.policies import POLICIES, Full
from kvcascade.cache.spec import parse
from kvcascade.cache.tier import Tier, sink
from kvcascade.cache.whole import Cache, nbytes
from kvcascade.kernels.heads import Heads
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=256, context=1024)
PARAMS = jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, gpt.init(CONFIG, 0))
DRAW = np.random.default_rng(0)
UNEQUAL = "layers[0:1]: sink 2 | recent 6 ; layers[1:]: sink 2 | heavy 20"


def prefilled(spec: str, tokens: np.ndarray, context: int = 256, chunk: int = 0) -> tuple[np.ndarray, Cache]:
    """The logits after rows of these tokens, -1 where padding is, and the cache."""
    positions = np.where(tokens >= 0, np.arange(tokens.shape[1]), -1)
    cache = generate.empty_cache(CONFIG, parse(spec), len(tokens), context)
    arguments = jnp.asarray(tokens.clip(0), jnp.int32), jnp.asarray(positions, jnp.int32)
    logits, cache = generate.prefill(CONFIG, PARAMS, cache, *arguments, chunk)
    return np.asarray(logits), cache


def decoded(cache: Cache, tokens: np.ndarray, first: int) -> tuple[np.ndarray, Cache]:
    """The logits after one row's tokens, which enter one by one, and the cache."""
    logits = jnp.zeros(0)
    for position, token in enumerate(tokens, first):
        logits, cache = generate.decode_step(CONFIG, PARAMS, cache, jnp.full(1, token), jnp.full(1, position))
    return np.asarray(logits), cache


def text(*shape: int) -> np.ndarray:
    return DRAW.integers(0, 256, shape)


def held(cache: Cache, layer: int = 0, row: int = 0, head: int = 0) -> set[int]:
    found = np.concatenate([np.asarray(slots.pos_BKS[row, head]) for slots in cache.layers[layer].slots])
    return {*found[found >= 0].tolist()}


def test_1_a_smaller_budget_frees_its_bytes() -> None:
    """Not a mask over a cache that stays as large: also where layers have budgets of their own."""
    _, cache = prefilled(UNEQUAL, text(1, 64))
    assert (
        nbytes(cache)
        == parse(UNEQUAL).nbytes(CONFIG.layer_heads, 256)
        < 0.1 * parse("full").nbytes(CONFIG.layer_heads, 256)
    )


def test_2_nothing_is_seen_but_what_is_held() -> None:
    """Not a copy of the prompt that was left in the cache: another beginning, whose tokens are all gone, changes nothing."""
    tokens = text(2, 64)
    tokens[1, 40:] = tokens[0, 40:]
    layers = ModelConfig(
        layers=1, width=32, heads=4, kv_heads=2, mlp=64, vocab=256, context=256
    )  # of more, the first mixes
    params = gpt.init(layers, 0)
    cache = generate.empty_cache(layers, parse("recent 8"), 2, 256)
    _, cache = generate.prefill(
        layers, params, cache, jnp.asarray(tokens, jnp.int32), jnp.broadcast_to(jnp.arange(64), (2, 64))
    )
    logits, _ = generate.decode_step(layers, params, cache, jnp.full(2, 7), jnp.full(2, 64))
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("name", [name for name, cls in POLICIES.items() if cls is not Full])
def test_3_sinks_survive_ten_thousand_steps(name: str) -> None:
    """Behind every policy; and what is held stays bounded, each position once, the newest among them."""
    cascade, heads = Cascade(sink(4), Tier(example(name), 12)), Heads(2, 1, 8)
    cache = LayerCache.empty(cascade, 1, heads, 10_000)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(cache):
        def step(position, cache):
            q, k, v = jax.random.normal(jax.random.fold_in(jax.random.key(0), position), (3, 1, 1, 2, 8))
            return cache.step(q, k[:, :, :1], v[:, :, :1], jnp.full((1, 1), position))[1]

        return lax.fori_loop(0, 10_000, step, cache)

    first, second = (np.asarray(slots.pos_BKS[0, 0]) for slots in run(cache).slots)
    assert sorted(first) == [0, 1, 2, 3]
    assert len({*second.tolist()}) == 12 and second.min() >= 4 and second.max() == 9_999


def test_4_what_is_decoded_is_compressed_too() -> None:
    _, cache = prefilled("sink 2 | heavy 14", text(1, 40))
    before = nbytes(cache)
    _, cache = decoded(cache, text(100), 40)
    assert nbytes(cache) == before and len(held(cache)) == 16 and max(held(cache)) == 139


@pytest.mark.slow
def test_5_layers_of_unequal_lengths_take_a_question_of_many_tokens() -> None:
    """And answer as if it had come token by token, where nothing of it pushes anything out."""
    spec = "layers[0:1]: recent 64@f32 ; layers[1:]: sink 2@f32 | recent 98@f32"
    _, cache = prefilled(spec, text(1, 40))
    again = jax.tree.map(jnp.copy, cache)
    question = text(1, 9)
    positions = jnp.arange(40, 49)[None]
    at_once, _ = gpt.step(CONFIG, PARAMS, cache, jnp.asarray(question, jnp.int32), positions)
    one_by_one, _ = decoded(again, question[0], 40)
    np.testing.assert_allclose(at_once[:, -1], one_by_one, atol=1e-4)


@pytest.mark.slow
def test_6_every_part_of_a_prompt_is_compressed_and_every_turn() -> None:
    """Not the first alone: after each of four parts, and of three turns more, the cache holds its sixteen."""
    _, cache = prefilled("sink 2 | heavy 14", text(1, 64), chunk=16)
    assert len(held(cache)) == 16
    for turn in range(1, 4):
        positions = jnp.arange(64 * turn, 64 * turn + 64)[None]
        _, cache = gpt.next_step(CONFIG, PARAMS, cache, jnp.asarray(text(1, 64), jnp.int32), positions, 16)
        assert len(held(cache)) == 16 and {0, 1, 64 * turn + 63} <= held(cache)


def test_7_one_program_for_all_steps() -> None:
    """Shapes are static and nothing is decided by data: no step compiles anew, whatever was evicted."""
    _, cache = prefilled("sink 2 | snap[window=4] 14", text(1, 40))
    _, cache = decoded(cache, text(1), 40)
    programs = generate.decode_step._cache_size()  # pyright: ignore
    decoded(cache, text(60), 41)
    assert generate.decode_step._cache_size() == programs  # pyright: ignore


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["sink 2 | snap[window=4] 14", "sink 2 | chunks[size=4] 14", "sink 2 | keydiff 14"])
def test_8_a_row_is_its_own_in_a_batch(spec: str) -> None:
    """Padding is nobody's token, and each row keeps what it would alone."""
    tokens = text(3, 48)
    tokens[1, 30:] = tokens[2, 17:] = -1
    logits, cache = prefilled(spec, tokens)
    for row, length in enumerate((48, 30, 17)):
        alone, own = prefilled(spec, tokens[row : row + 1, :length])
        np.testing.assert_allclose(logits[row], alone[0], atol=1e-4)
        assert all(
            held(cache, layer, row, head) == held(own, layer, 0, head) for layer in range(2) for head in range(2)
        )


def test_9_nothing_is_left_behind_by_a_cache() -> None:
    """A full cache gives the same logits before and after others were used, and while another is."""
    tokens = text(1, 40)
    before, _ = prefilled("full", tokens)
    _, small = prefilled(UNEQUAL, tokens)
    _, full = prefilled("full", tokens)
    _, small = decoded(small, text(5), 40)
    after, _ = prefilled("full", tokens)
    np.testing.assert_array_equal(before, after)
    mixed, _ = decoded(full, tokens[0, :3], 40)
    alone, _ = decoded(prefilled("full", tokens)[1], tokens[0, :3], 40)
    np.testing.assert_array_equal(mixed, alone)


def test_10_positions_are_true_after_eviction() -> None:
    """A token's place is said by its caller and not by how many are held: a window that slid sees exactly what a model of that window sees."""
    tokens = text(1, 80)
    windowed = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=256, context=1024, window=16)
    want = gpt.forward(windowed, PARAMS, jnp.asarray(tokens, jnp.int32))
    cache = generate.empty_cache(CONFIG, parse("recent 16@f32"), 1, 256)
    got, cache = decoded(cache, tokens[0], 0)
    np.testing.assert_allclose(got, want[:, -1], atol=1e-4, rtol=1e-4)
