"""Norms: nnx's numbers, and the same ones whoever else is normalised in the call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvcascade.model.norm import FEW, LayerNorm, RMSNorm

KINDS = {"rms": (RMSNorm, nnx.RMSNorm), "layer": (LayerNorm, nnx.LayerNorm)}


def pair(name: str, width: int):
    made = [kind(width, epsilon=1e-5, dtype=jnp.float32, rngs=nnx.Rngs(0)) for kind in KINDS[name]]
    for each in made:
        each.scale[...] = jnp.asarray(np.random.default_rng(1).standard_normal(width), jnp.float32)
        if getattr(each, "bias", None) is not None:
            each.bias[...] = jnp.asarray(np.random.default_rng(2).standard_normal(width), jnp.float32)
    return made


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("width", [1, 7, 64, 576])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_those_of_nnx(name: str, width: int, dtype: str) -> None:
    """For a row, for several, of heads, and for so many that they are nnx's own."""
    ours, theirs = pair(name, width)
    for shape in ((1, 1), (3, 5), (2, 3, 4), (1, FEW + 1)):
        x = (3 * np.random.default_rng(0).standard_normal((*shape, width)) + 1).astype(np.float32)
        x = jnp.asarray(x, dtype)
        assert ours(x).dtype == theirs(x).dtype == jnp.float32
        np.testing.assert_allclose(ours(x), theirs(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_is_the_same_bit_for_bit_beside_any_number_of_others(name: str, optimised) -> None:
    ours, _ = pair(name, 576)
    norm = jax.jit(lambda x: ours(x))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((48, 1, 576)), jnp.float32)
    alone = np.concatenate([norm(x[index : index + 1]) for index in range(48)])
    for count in (2, 3, 8, 9, 16, 48):
        for start in range(0, 49 - count, count):
            np.testing.assert_array_equal(norm(x[start : start + count]), alone[start : start + count])
