"""The Mosaic GPU kernel for decode attention, interpreted with race detection, against float64 over the same stored values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slots_reference import attended, dense, held

from kvcascade.kernels import decode_mosaic


def check(tiers, group, head_dim, batch=1, kv_heads=1, window=0):
    rng = np.random.default_rng(0)
    slots = [held(rng, name, batch, kv_heads, count, head_dim) for name, count in tiers]
    q = jnp.asarray(rng.normal(size=(batch, kv_heads * group, head_dim)), jnp.float32)
    # Row 0 sees most slots, row 1 nothing.
    now = jnp.asarray([60, -1][:batch], jnp.int32)
    out, masses = attended(q, now, slots, True, "mosaic", window=window)
    exact, exact_masses = dense(q, now, slots, window)
    # The sums are rounded by their size, and of a large output as much more than of one.
    np.testing.assert_allclose(out, exact, atol=1e-5 * max(1, np.abs(exact).max()))
    for mass, expected in zip(masses, exact_masses, strict=True):
        np.testing.assert_allclose(mass, expected, atol=1e-5)


@pytest.mark.parametrize(
    "tiers, group, head_dim",
    [
        ([("bf16", 72)], 3, 64),
        ([("bf16", 72)], 1, 80),
        ([("fp8", 8)], 8, 64),
        ([("int8", 136)], 4, 128),
        ([("int8", 64)], 1, 80),
        ([("int4", 56)], 2, 96),
        ([("int4h", 72)], 8, 128),
        ([("bf16", 8), ("bf16", 64), ("int8", 8), ("int4h", 104)], 3, 64),
    ],
    ids=str,
)
def test_decode_equals_float64(tiers, group, head_dim):
    check(tiers, group, head_dim)


def test_rows_heads_and_a_window():
    """Rows begin at slots that are no multiple of eight, where copies begin."""
    check([("int8", 70), ("int4", 2)], 2, 64, batch=2, kv_heads=2, window=30)


@pytest.mark.parametrize(("codec_name", "share"), [("int8", 8), ("bf16", 16)])
def test_splits_of_a_long_tier(codec_name, share, monkeypatch):
    """Three splits of five tiles, which is more than are on their way at once, the last of one tile, which is part full."""
    monkeypatch.setattr(decode_mosaic, "SHARE", share)
    check([(codec_name, 11 * 64 - 8)], 2, 64)


def test_without_masses_the_output_is_the_same():
    rng = np.random.default_rng(0)
    slots = [held(rng, "int4", 1, 1, 32, 64)]
    q, now = jnp.ones((1, 2, 64)), jnp.asarray([9], jnp.int32)
    call = jax.jit(lambda observed: attended(q, now, slots, observed, "mosaic"), static_argnums=0)
    np.testing.assert_array_equal(call(False)[0], call(True)[0])
    assert call(False)[1] == []


@pytest.mark.parametrize(
    "names, slots, head_dim, group, reason",
    [
        ("f32", 8, 64, 1, "made for slots in bf16, fp8, int8 and int4"),
        ("nvfp4", 8, 64, 1, "made for slots in bf16, fp8, int8 and int4"),
        ("bf16", 8, 24, 1, "a multiple of 16, not 24"),
        ("int4", 8, 80, 1, "a multiple of 16, not 40"),
        ("int8", 8, 64, 9, "made for 8 query heads to a KV head"),
        ("int8", 5, 64, 1, "a multiple of 8, not 5"),
        ("int8/int4", 8, 64, 1, "made for keys and values in one codec"),
    ],
)
def test_what_it_is_not_made_for_is_told(names, slots, head_dim, group, reason):
    tier = held(np.random.default_rng(0), names, 1, 1, slots, head_dim)
    with pytest.raises(NotImplementedError, match=reason):
        attended(jnp.ones((1, group, head_dim)), jnp.asarray([3]), [tier], False, "mosaic")


def test_a_soft_cap_is_refused():
    tier = held(np.random.default_rng(0), "int8", 1, 1, 8, 64)
    with pytest.raises(NotImplementedError, match="made for logits without a soft cap"):
        attended(jnp.ones((1, 1, 64)), jnp.asarray([3]), [tier], False, "mosaic", soft_cap=30.0)
