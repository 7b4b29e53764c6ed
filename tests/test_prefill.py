"""Attention over a prompt with the mass of its keys, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcascade.cache.cascade import Cascade
from kvcascade.cache.codec import f32
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.tier import heavy, recent
from kvcascade.kernels import launch
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import attend_each, normalise
from kvcascade.kernels.prefill import observed_attention
from kvcascade.kernels.slots import Codecs, Slots


def dense(q_BTNH, k_BTKH, v_BTKH, length_B, window, last):
    """The same in float64 with all weights at once; what is padding is zero."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BTKH, v_BTKH))
    B, T, N, H = q.shape
    group = N // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    age_TT = np.arange(T)[:, None] - np.arange(T)
    seen_TT = (age_TT >= 0) & (age_TT < (window or T))
    logits = np.where(seen_TT, np.einsum("btnh,bsnh->bnts", q, k) / H**0.5, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    left_BT = np.asarray(length_B)[:, None] - np.arange(T)
    out = np.einsum("bnts,bsnh->btnh", weights, v) * (left_BT > 0)[..., None, None]
    mass = np.einsum("bnts,bt->bns", weights, (left_BT > 0) & (left_BT <= (last or T)))
    return out, mass.reshape(B, -1, group, T).sum(2)


def prompt(rng, B, T, K, G, H):
    return [jnp.asarray(2 * rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (K * G, K, K)]


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def called(q, k, v, length_B, window, last, implementation):
    heads = Heads(q.shape[2], k.shape[2], q.shape[3], window=window)
    out, mass = observed_attention(q, k, v, length_B, heads, last, implementation)
    return jnp.where(jnp.arange(q.shape[1])[:, None, None] < length_B[:, None, None, None], out, 0), mass


def check(rng, B, T, K, G, H, window, last, implementation):
    for _ in range(2):  # by one program
        q, k, v = prompt(rng, B, T, K, G, H)
        length_B = jnp.asarray(rng.permutation([T, *rng.integers(0, T + 1, B - 1)]), jnp.int32)
        results = called(q, k, v, length_B, window, last, implementation)
        for ours, exact in zip(results, dense(q, k, v, length_B, window, last), strict=True):
            np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


@settings(max_examples=settings().max_examples // 2)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 200),
    K=st.integers(1, 3),
    G=st.integers(1, 8),
    H=st.sampled_from([8, 2, 64]),
    window=st.sampled_from([0, 0, 1, 7, 70]),
    last=st.sampled_from([0, 0, 1, 5, 300]),
    seed=st.integers(0, 2**16),
)
def test_observed_attention_equals_float64(B, T, K, G, H, window, last, seed):
    check(np.random.default_rng(seed), B, T, K, G, H, window, last, "xla")


@pytest.mark.slow
@pytest.mark.skipif(bool(launch.refuses()), reason="no Triton")
@settings(max_examples=settings().max_examples // 2)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 150),
    K=st.integers(1, 2),
    G=st.integers(1, 8),
    H=st.sampled_from([8, 64, 80, 96, 128]),
    window=st.sampled_from([0, 0, 1, 7, 70]),
    last=st.sampled_from([0, 0, 1, 5, 300]),
    seed=st.integers(0, 2**16),
)
def test_the_triton_kernel_equals_float64(B, T, K, G, H, window, last, seed):
    check(np.random.default_rng(seed), B, T, K, G, H, window, last, "triton")


@pytest.mark.skipif(bool(launch.refuses()), reason="no Triton")
def test_the_triton_kernel_multiplies_16_bits_exactly():
    q, k, v = (x.astype(jnp.bfloat16) for x in prompt(np.random.default_rng(0), 2, 100, 2, 3, 64))
    length_B = jnp.asarray([100, 70])
    out, mass = called(q, k, v, length_B, 0, 0, "triton")
    exact_out, exact_mass = dense(q, k, v, length_B, 0, 0)
    np.testing.assert_allclose(mass, exact_mass, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.astype("float32"), exact_out, atol=0.1)  # bf16's own error


def test_every_query_that_counts_gives_a_mass_of_one():
    q, k, v = prompt(np.random.default_rng(0), 2, 100, 2, 3, 8)
    for last, counting in ((0, [100, 40]), (32, [32, 32]), (64, [64, 40])):
        _, mass_BKT = observed_attention(q, k, v, jnp.asarray([100, 40]), Heads(6, 2, 8), last=last)
        np.testing.assert_allclose(mass_BKT.sum((1, 2)), np.multiply(counting, 6), rtol=1e-5)
        np.testing.assert_array_equal(mass_BKT[1, :, 40:], 0)


def test_padding_does_not_matter():
    q, k, v = prompt(np.random.default_rng(0), 1, 70, 1, 2, 8)
    _, mass = observed_attention(q, k, v, jnp.asarray([50]), Heads(2, 1, 8))
    poisoned = lambda x: x.at[:, 50:].set(1e4)
    _, again = observed_attention(poisoned(q), poisoned(k), poisoned(v), jnp.asarray([50]), Heads(2, 1, 8))
    np.testing.assert_array_equal(mass, again)


def test_a_prompt_never_has_all_its_weights_in_memory():
    T = 4096
    shape = lambda heads: jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32)
    length_B = jax.ShapeDtypeStruct((1,), jnp.int32)
    call = functools.partial(observed_attention, heads=Heads(4, 2, 16))
    compiled = jax.jit(call).lower(shape(4), shape(2), shape(2), length_B).compile()
    memory = compiled.memory_analysis()
    assert memory and memory.temp_size_in_bytes < T * T * 4  # of the four query heads' weights, one's


def test_gradients_are_those_of_all_weights_at_once():
    rng = np.random.default_rng(0)
    q, k, v = prompt(rng, 2, 70, 2, 2, 8)
    length_B, heads = jnp.asarray([70, 33]), Heads(4, 2, 8)
    left, right = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 33, 4, 8), (2, 2, 70)))

    def plain(q, k, v, length_B):
        positions_BT = jnp.where(jnp.arange(70) < length_B[:, None], jnp.arange(70), -1)
        rows = lambda x_BTKH: f32.encode(x_BTKH.transpose(0, 2, 1, 3))
        slots = Slots(rows(k), rows(v), jnp.broadcast_to(positions_BT[:, None], (2, 2, 70)))
        out_BTNH, (mass_BKTS,) = normalise(attend_each(q, positions_BT, [(slots, Codecs(f32, f32))], heads, True))
        return out_BTNH, mass_BKTS.sum(2)

    def gradients(function):
        def loss(q, k, v):
            out_BTNH, mass_BKT = function(q, k, v, length_B)
            return (out_BTNH[:, :33] * left).sum() + (mass_BKT * right).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    observed = functools.partial(observed_attention, heads=heads)
    for ours, theirs in zip(gradients(observed), gradients(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("window", [0, 20])
def test_a_fresh_cache_takes_in_a_prompt_as_any_cache_does(window):
    q, k, v = prompt(np.random.default_rng(0), 3, 70, 2, 2, 8)
    length_B1 = np.array([[70], [33], [0]])
    positions_BT = jnp.asarray(np.where(np.arange(70) < length_B1, np.arange(70), -1))
    empty = LayerCache.empty(Cascade(recent(8), heavy(16)), 3, Heads(4, 2, 8, window=window), 70)
    out, cache = empty.step(q, k, v, positions_BT, fresh=True)
    again, other = empty.step(q, k, v, positions_BT)
    np.testing.assert_allclose(out[0], again[0], atol=1e-5)
    np.testing.assert_allclose(out[1, :33], again[1, :33], atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours.astype("float32"), theirs.astype("float32"), atol=1e-5)
