"""The reference that every kernel is measured against: attention over stored slots, itself against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slots_reference import attended, codecs, dense, held

from kvcascade.cache.codec import CODECS


@pytest.mark.parametrize("codec_name", sorted(CODECS))
def test_the_reference_equals_float64(codec_name):
    rng = np.random.default_rng(0)
    slots = [held(rng, codec_name, 2, 2, 66, 64)]
    q, now = jnp.asarray(rng.normal(size=(2, 6, 64)), jnp.float32), jnp.asarray([60, 20], jnp.int32)
    results = attended(q, now, slots, True, "xla")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results, dense(q, now, slots))


def test_slots_in_bf16_have_the_gradients_of_the_same_numbers_in_f32():
    """Though the products are of three bf16 terms, each of which has a gradient of eight bits."""
    rng = np.random.default_rng(0)
    narrow, _ = held(rng, "bf16", 1, 1, 9, 16)
    q, now = jnp.asarray(rng.normal(size=(1, 2, 16)), jnp.float32), jnp.asarray([60], jnp.int32)

    def loss(q, k, v, codec_name):
        slots = dataclasses.replace(narrow, k={"values": k}, v={"values": v})
        return (attended(q, now, [(slots, codecs(codec_name))], False, "xla")[0] ** 2).sum()

    k, v = narrow.k["values"], narrow.v["values"]
    ours = jax.grad(loss, (0, 1, 2))(q, k, v, "bf16")
    exact = jax.grad(loss, (0, 1, 2))(q, k.astype(jnp.float32), v.astype(jnp.float32), "f32")
    np.testing.assert_allclose(ours[0], exact[0], rtol=1e-5, atol=1e-4)
    for gradient, wide in zip(ours[1:], exact[1:], strict=True):  # themselves in bf16
        np.testing.assert_allclose(gradient.astype(jnp.float32), wide, rtol=2**-7, atol=1e-3)
