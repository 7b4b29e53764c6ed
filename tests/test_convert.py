"""Fewer KV heads from a trained model: what each method keeps, and the run that it makes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.convert import METHODS, convert

MHA = ModelConfig(layers=2, width=48, heads=6, kv_heads=6, mlp=64, vocab=64, context=32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)))


@pytest.fixture(scope="module")
def params() -> gpt.Params:
    return gpt.init(MHA, 0)


def heads(params: gpt.Params, layer: int, name: str) -> np.ndarray:
    """A layer's matrix of keys or values, head by head: [K, H, M]."""
    return np.asarray(params["layers"][layer]["attention"][name]["weight"]).reshape(-1, 8, 48)


def others(params: gpt.Params) -> list:
    """Every parameter but the matrices of keys and values."""
    paths = jax.tree.leaves_with_path(params)
    return [leaf for path, leaf in paths if not any(getattr(key, "key", None) in ("k", "v") for key in path)]


@pytest.mark.parametrize("method", METHODS)
def test_as_many_heads_as_before_change_nothing(params: gpt.Params, method: str) -> None:
    """K = N is the identity, exactly, by every method."""
    shape, same = convert(MHA, params, 6, method)
    assert shape == MHA
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kv_heads", [3, 2, 1])
def test_mean_pools_neighbours(params: gpt.Params, kv_heads: int) -> None:
    """New head i is the mean of the heads of its group, and nothing else changes."""
    shape, pooled = convert(MHA, params, kv_heads)
    assert shape == dataclasses.replace(MHA, kv_heads=kv_heads)
    size = 6 // kv_heads
    for layer in range(2):
        for name in "kv":
            old, new = heads(params, layer, name), heads(pooled, layer, name)
            assert new.shape == (kv_heads, 8, 48)
            for i in range(kv_heads):
                np.testing.assert_allclose(new[i], old[i * size : (i + 1) * size].mean(0), rtol=1e-5, atol=1e-8)
    assert all((a == b).all() for a, b in zip(others(pooled), others(params), strict=True))
    assert jax.tree.map(jnp.shape, pooled) == jax.tree.map(jnp.shape, gpt.graph(shape)[1])


def test_first_takes_the_first_of_each_group(params: gpt.Params) -> None:
    """Heads 0 and 3 of six, as they are."""
    _, pooled = convert(MHA, params, 2, "first")
    for name in "kv":
        np.testing.assert_array_equal(heads(pooled, 1, name), heads(params, 1, name)[[0, 3]])


def test_random_has_the_spread_of_the_old_heads(params: gpt.Params) -> None:
    """Drawn anew from the seed, differently for each layer, for keys and for values."""
    _, drawn = convert(MHA, params, 2, "random", seed=1)
    _, again = convert(MHA, params, 2, "random", seed=1)
    _, other = convert(MHA, params, 2, "random", seed=2)
    found = [heads(drawn, layer, name) for layer in range(2) for name in "kv"]
    for index, matrix in enumerate(found):
        assert matrix.std() == pytest.approx(0.02, rel=0.15)
        assert all(abs(np.corrcoef(matrix.ravel(), one.ravel())[0, 1]) < 0.2 for one in found[:index])
    np.testing.assert_array_equal(heads(again, 0, "k"), found[0])
    assert (heads(other, 0, "k") != found[0]).all()


forward = jax.jit(gpt.forward, static_argnums=0)


@pytest.mark.parametrize("kv_heads", [3, 2, 1])
@pytest.mark.parametrize("method", ["mean", "first"])
def test_identical_heads_are_pooled_exactly(params: gpt.Params, kv_heads: int, method: str) -> None:
    """Where the heads of a group are the same, so is the pooled one, bit for bit, and the model's answers stay."""
    size = 6 // kv_heads
    twins = {}
    for index, layer in params["layers"].items():
        same = lambda matrix: {
            "weight": jnp.repeat(matrix["weight"].reshape(kv_heads, size, 8, 48)[:, :1], size, 1).reshape(48, 48)
        }
        attention = layer["attention"] | {name: same(layer["attention"][name]) for name in "kv"}
        twins[index] = layer | {"attention": attention}
    before = params | {"layers": twins}
    shape, after = convert(MHA, before, kv_heads, method)
    for layer in range(2):
        for name in "kv":
            np.testing.assert_array_equal(heads(after, layer, name), heads(before, layer, name)[::size])
    found, expected = forward(shape, after, TOKENS), forward(MHA, before, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [0, -1, 4, 12])
def test_a_number_that_does_not_divide_the_heads_is_refused(params: gpt.Params, kv_heads: int) -> None:
    """BadInput with both numbers; heads are never added."""
    with pytest.raises(BadInput, match=f"6 KV heads cannot be pooled to {kv_heads}"):
        convert(MHA, params, kv_heads)


def test_another_method_is_refused(params: gpt.Params) -> None:
    """BadInput with the methods there are."""
    with pytest.raises(BadInput, match="no method 'median' .* mean, first, random"):
        convert(MHA, params, 2, "median")
