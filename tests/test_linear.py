"""Products with stored matrices: C++ against float64 of the same matrix, and what storing costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.kernels import linear, native
from kvcascade.model import gpt, pretrained

IMPLEMENTATIONS = ("xla", "native", None) if native.ready() else ("xla", None)


@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 300),
    weights=st.sampled_from(linear.WEIGHTS),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_products_equal_float64(rows, inputs, outputs, weights, dtype, seed):
    """Any number of rows, inputs and outputs, with registers full or not, in C++ and through XLA: of bfloat16 unless all is float32."""
    rng = np.random.default_rng(seed)
    matrix = linear.store(jnp.asarray(rng.normal(size=(outputs, inputs)), jnp.float32), weights)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), dtype)
    few = weights != "float32" or dtype != "float32"
    weight = linear.rows(linear.store(matrix["weight"], "bfloat16") if few and weights == "float32" else matrix)
    exact = np.asarray(x.astype("bfloat16") if few else x, np.float64) @ np.asarray(weight, np.float64).T
    for implementation in IMPLEMENTATIONS:
        y = linear.products(x, [matrix], implementation)[0]
        assert y.dtype == dtype
        rounding = 2**-8 if dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=1e-5 * inputs**0.5, rtol=rounding)


@pytest.mark.parametrize("inputs", [96, 577])
@pytest.mark.parametrize("weights", linear.WEIGHTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_how_many_there_are(implementation, weights, inputs):
    """One rule of rounding by all implementations, also where XLA compiles what x comes from; in C++ one order of sums as well."""
    rng = np.random.default_rng(0)
    matrix = linear.store(jnp.asarray(rng.normal(size=(90, inputs)), jnp.float32), weights)
    x = jnp.asarray(rng.normal(size=(300, inputs)), jnp.float32)
    product = jax.jit(lambda x, which: linear.products(jnp.tanh(x), [matrix], which)[0], static_argnums=1)
    alone, reference = (
        np.concatenate([product(row[None], which) for row in x[:8]]) for which in (implementation, "xla")
    )
    for rows in (1, 2, 4, 7, 8, 16, 17, 32, 33, 128, 300):
        together = product(x[:rows], implementation)[:8]
        assert np.abs(together - reference[:rows]).max() < 2e-6 * np.abs(reference).max()
        if implementation == "native":
            np.testing.assert_array_equal(together, alone[:rows])


@pytest.mark.parametrize("weights", linear.WEIGHTS)
def test_gradients_are_those_of_the_matrix(weights):
    """With C++ forward as well: for x the cotangent times the matrix, for the matrix the cotangent times x."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    matrix, x, ct = linear.store(draw(30, 40), weights), draw(20, 40), draw(20, 30)
    pull = jax.vjp(lambda x: linear.products(x, [matrix])[0], x)[1]
    tolerance = 1e-5 if weights == "float32" else 2**-7
    np.testing.assert_allclose(pull(ct)[0], ct @ linear.rows(matrix), atol=tolerance * 30, rtol=tolerance)
    if weights == "float32":
        pull = jax.vjp(lambda weight: linear.products(x, [{"weight": weight}])[0], matrix["weight"])[1]
        np.testing.assert_allclose(pull(ct)[0], ct.T @ x, atol=1e-4)


@pytest.mark.skipif(not native.ready(), reason="no C++ compiler")
@pytest.mark.parametrize("weights", linear.WEIGHTS)
def test_large_products_share_the_work(weights):
    """A matrix that several threads work on."""
    rng = np.random.default_rng(0)
    matrix = linear.store(jnp.asarray(rng.normal(size=(9001, 515)), jnp.float32), weights)
    for rows in (6, 3 * 700):  # also more than are multiplied at a time
        x = jnp.asarray(rng.normal(size=(rows // 3, 3, 515)), jnp.float32)
        np.testing.assert_allclose(
            linear.products(x, [matrix], "native")[0], linear.products(x, [matrix], "xla")[0], atol=1e-3
        )


@pytest.mark.skipif(not native.ready(), reason="no C++ compiler")
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
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
    """The logits are those of a float32 model with the rounded weights to two hundredths, and do not depend on the other rows."""
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
    assert close(gpt.nll(small.config, small.params, tokens), gpt.nll(exact.config, rounded(small.params), tokens))
    one = gpt.forward(small.config, small.params, tokens[:1, :4])
    assert np.abs(one - got[:1, :4]).max() < 1e-5 * np.abs(got).max()
    assert np.abs(one - gpt.forward(exact.config, exact.params, tokens[:1, :4])).max() > 1e-3


def test_an_unknown_kind_of_weights_is_refused(tmp_path):
    with pytest.raises(BadInput, match="model.weights 'int3' is not one of float32, bfloat16, int8"):
        pretrained.load(str(tiny_models.write("llama", tmp_path / "m")), weights="int3")
