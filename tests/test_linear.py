"""Products with stored matrices: C++ against float64 of the same matrix, and what storing costs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.kernels import linear, native
from kvcascade.model import gpt, pretrained


@given(
    rows=st.integers(1, 20),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 300),
    weights=st.sampled_from(linear.WEIGHTS),
    seed=st.integers(0, 99),
)
def test_products_equal_float64(rows, inputs, outputs, weights, seed):
    """Any number of rows, inputs and outputs, with registers full or not, in C++ and through XLA."""
    rng = np.random.default_rng(seed)
    matrix = linear.store(jnp.asarray(rng.normal(size=(outputs, inputs)), jnp.float32), weights)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), jnp.float32)
    for implementation in ("xla", "native", None) if native.ready() else ("xla", None):
        rounded = implementation is None and rows > linear.FEW and weights != "float32"
        exact = (
            np.asarray(x.astype("bfloat16") if rounded else x, np.float64)
            @ np.asarray(linear.rows(matrix), np.float64).T
        )
        y = linear.products(x, [matrix], implementation)[0]
        np.testing.assert_allclose(y, exact, atol=1e-5 * inputs**0.5, rtol=1e-5)


@pytest.mark.skipif(not native.ready(), reason="no C++ compiler")
@pytest.mark.parametrize("weights", linear.WEIGHTS)
def test_large_products_share_the_work(weights):
    """A matrix that several threads work on."""
    rng = np.random.default_rng(0)
    matrix = linear.store(jnp.asarray(rng.normal(size=(9001, 515)), jnp.float32), weights)
    x = jnp.asarray(rng.normal(size=(2, 3, 515)), jnp.float32)
    np.testing.assert_allclose(
        linear.products(x, [matrix], "native")[0], linear.products(x, [matrix], "xla")[0], atol=1e-3
    )


@pytest.mark.skipif(not native.ready(), reason="no C++ compiler")
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("weights", linear.WEIGHTS)
def test_products_together_are_the_products_alone(weights, rows):
    """Matrices of several heights in one call, with tasks that end at each one's last output."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    matrices, x = [linear.store(draw(outputs, 70), weights) for outputs in (1, 64, 200, 65)], draw(rows, 70)
    for y, matrix in zip(linear.products(x, matrices, "native"), matrices, strict=True):
        np.testing.assert_array_equal(y, linear.products(x, [matrix], "native")[0])
        np.testing.assert_allclose(y, linear.products(x, [matrix], "xla")[0], atol=1e-4)


@pytest.mark.parametrize(("weights", "bound"), [("bfloat16", 2**-8), ("int8", 0.5 / 127)])
def test_storing_rounds_to_the_nearest(weights, bound):
    """The error is at most half a step of the largest weight of the output; zeros stay."""
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(20, 30)), jnp.float32).at[3].set(0)
    stored = linear.store(matrix, weights)
    error = jnp.abs(linear.rows(stored) - matrix).max(-1) / jnp.abs(matrix).max(-1).clip(1e-9)
    assert 0 < error.max() <= bound * 1.001
    assert not linear.rows(stored)[3].any()
    np.testing.assert_array_equal(linear.rows(stored, jnp.asarray([4, 1])), linear.rows(stored)[jnp.asarray([4, 1])])


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "mistral"])
def test_a_model_keeps_its_matrices_in_few_bits(name, weights, tmp_path):
    """The logits are those of a float32 model with the rounded weights: of few rows to 1e-4, of many, rounded to bfloat16, to two hundredths."""
    folder = str(tiny_models.write(name, tmp_path / name))
    exact, small = pretrained.load(folder), pretrained.load(folder, weights=weights)
    assert small.config == dataclasses.replace(exact.config, weights=weights)
    tokens = jnp.asarray(tiny_models.PROMPTS, jnp.int32)

    def rounded(params):
        if "weight" in params:
            return {part: x for part, x in params.items() if part != "scale"} | {"weight": linear.rows(params)}
        return {key: rounded(each) if isinstance(each, dict) else each for key, each in params.items()}

    want = gpt.forward(exact.config, rounded(small.params), tokens)
    got = gpt.forward(small.config, small.params, tokens)
    close = lambda a, b: np.std(np.subtract(a, b)) < 0.02 * np.std(b)
    assert close(got, want)
    one = gpt.forward(small.config, small.params, tokens[:1, :4])  # few rows: in C++
    np.testing.assert_allclose(one, want[:1, :4], atol=1e-4)
    assert close(gpt.nll(small.config, small.params, tokens), gpt.nll(exact.config, rounded(small.params), tokens))
    assert np.abs(one - gpt.forward(exact.config, exact.params, tokens[:1, :4])).max() > 1e-3


def test_an_unknown_kind_of_weights_is_refused(tmp_path):
    with pytest.raises(BadInput, match="model.weights 'int3' is not one of float32, bfloat16, int8"):
        pretrained.load(str(tiny_models.write("llama", tmp_path / "m")), weights="int3")
