"""The Triton kernel for decode attention, interpreted, against float64 over the same stored values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slots_reference import attended, codecs, dense, held

from kvcascade.cache.codec import CODECS
from kvcascade.cache.errors import BadInput
from kvcascade.cache.tier import empty, recent
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.slots import Codecs, Slots

pytest.importorskip("triton")
from kvcascade.kernels.traffic import counting  # noqa: E402

FORMATS = sorted({*CODECS} - {"f32"})


def queries(rng: np.random.Generator, *shape: int):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def check(q, now, slots, **sight):
    results = attended(q, now, slots, True, "triton", **sight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results, dense(q, now, slots, **sight))


@pytest.mark.slow
@given(
    tiers=st.lists(
        st.tuples(st.sampled_from([*FORMATS, "int8/int4", "bf16/nvfp4"]), st.sampled_from([1, 63, 130])),
        min_size=1,
        max_size=2,
    ),
    group=st.integers(1, 8),
    window=st.sampled_from([0, 1, 30]),
    soft_cap=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_decode_equals_float64(tiers, group, window, soft_cap, seed):
    # Few shapes, because every one is compiled.
    rng, batch, kv_heads, head_dim = np.random.default_rng(seed), 2, 1, 32
    slots = [held(rng, name, batch, kv_heads, count, head_dim) for name, count in tiers]
    # Some queries see nothing, some only a part, some everything.
    now = jnp.asarray(rng.integers(-1, 120, batch), jnp.int32)
    check(queries(rng, batch, kv_heads * group, head_dim), now, slots, window=window, soft_cap=soft_cap)


@pytest.mark.parametrize("head_dim", [16, 80, 96, 128])
@pytest.mark.parametrize("codec_name", FORMATS)
def test_other_head_widths(codec_name, head_dim):
    try:
        CODECS[codec_name].nbytes(head_dim)
    except BadInput as refused:
        pytest.skip(str(refused))
    rng = np.random.default_rng(0)
    slots = [held(rng, codec_name, 1, 1, 70, head_dim)]
    check(queries(rng, 1, 3, head_dim), jnp.asarray([60], jnp.int32), slots)


def test_many_splits_in_jit_with_a_query_in_bf16():
    rng = np.random.default_rng(0)
    slots = [held(rng, "int8", 1, 1, 1500, 32), held(rng, "bf16", 1, 1, 1, 32)]
    q, now = queries(rng, 1, 2, 32).astype(jnp.bfloat16), jnp.asarray([1200], jnp.int32)
    call = jax.jit(lambda q, now, observed: attended(q, now, slots, observed, "triton"), static_argnums=2)
    results = call(q, now, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results, dense(q, now, slots))
    only_out, none = call(q, now, False)
    np.testing.assert_array_equal(only_out, results[0])
    assert none == []


@pytest.mark.parametrize("codec_name", FORMATS)
def test_what_a_query_does_not_see_is_not_read(codec_name):
    tier = recent(20)
    slots = empty(tier, 1, Heads(2, 1, 16), 32, 0)
    codec = CODECS[codec_name]
    vectors = codec.encode(jnp.full((1, 1, 20, 16), jnp.nan))
    poison = {
        name: jnp.full_like(x, jnp.nan) if jnp.isdtype(x.dtype, "real floating") else x for name, x in vectors.items()
    }
    slots = [(Slots(poison, poison, slots.pos_BKS.at[..., 5].set(7)), Codecs(codec, codec))]
    unseen, (mass,) = attended(jnp.ones((1, 2, 16)), jnp.asarray([3]), slots, True, "triton")
    np.testing.assert_array_equal(unseen, 0)
    np.testing.assert_array_equal(mass, 0)


@pytest.mark.parametrize("codec_name", FORMATS)
def test_every_key_and_value_is_read_once(codec_name):
    slots, by = held(np.random.default_rng(0), codec_name, 1, 1, 600, 32)
    slots = Slots(slots.k, slots.v, jnp.maximum(slots.pos_BKS, 0))
    q, now = jnp.ones((1, 1, 32)), jnp.asarray([600], jnp.int32)
    with counting() as traffic:
        jax.block_until_ready(attended(q, now, [(slots, by)], False, "triton"))
    read = {name: count for (_, name), count in traffic.read.items() if name not in ("q", "q_pos")}
    assert sum(read.values()) == sum(x.nbytes for x in jax.tree.leaves((slots.k, slots.v, slots.pos_BKS)))


def test_slots_in_f32_are_refused():
    held = [(empty(recent(4, codec=CODECS["f32"]), 1, Heads(1, 1, 16), 4, 0), codecs("f32"))]
    with pytest.raises(NotImplementedError, match="triton: no kernel for slots of values float32"):
        attended(jnp.ones((1, 1, 16)), jnp.asarray([3]), held, False, "triton")


def test_gradients_are_those_of_the_reference():
    rng = np.random.default_rng(0)
    slots, now = [held(rng, "int8", 1, 1, 9, 16)], jnp.asarray([20], jnp.int32)
    loss = lambda q, each: (attended(q, now, slots, True, each)[0] ** 2).sum()
    q = queries(rng, 1, 2, 16)
    np.testing.assert_allclose(jax.grad(loss)(q, "triton"), jax.grad(loss)(q, "xla"), rtol=1e-5, atol=1e-5)
