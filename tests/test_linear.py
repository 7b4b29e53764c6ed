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
from kvcascade.kernels import int4, linear, native
from kvcascade.model import gpt, pretrained

forward, nll = (jax.jit(each, static_argnums=0) for each in (gpt.forward, gpt.nll))
IMPLEMENTATIONS = ("xla", "native", None) if native.ready() else ("xla", None)


@pytest.mark.slow
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
    kept = linear.store(matrix["weight"], "bfloat16") if few and weights == "float32" else matrix
    weight = linear.rows(kept, inputs=inputs)
    exact = np.asarray(x.astype("bfloat16") if few else x, np.float64) @ np.asarray(weight, np.float64).T
    for implementation in IMPLEMENTATIONS:
        y = linear.products(x, [matrix], implementation)[0]
        assert y.dtype == dtype
        rounding = 2**-8 if dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=1e-5 * inputs**0.5, rtol=rounding)


@pytest.mark.usefixtures("optimised")
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
    np.testing.assert_allclose(pull(ct)[0], ct @ linear.rows(matrix, inputs=40), atol=tolerance * 30, rtol=tolerance)
    if weights == "float32":
        pull = jax.vjp(lambda weight: linear.products(x, [{"weight": weight}])[0], matrix["weight"])[1]
        np.testing.assert_allclose(pull(ct)[0], ct.T @ x, atol=1e-4)


def _grouped(rng, outputs, inputs, group, low):
    """Codes with scales of every group in float16, or in float32 if `low`, and the matrix that they are in float64."""
    groups = -(-inputs // group)
    codes, scale = rng.integers(0, 16, (outputs, inputs)), rng.normal(size=(outputs, groups)).astype(np.float16)
    least = rng.normal(size=scale.shape).astype(np.float32) if low else -8 * scale.astype(np.float32)
    wide = lambda x: x.astype(np.float64).repeat(group, 1)[:, :inputs]
    matrix = int4.packed(jnp.asarray(codes), group, scale, least if low else None)
    return matrix, codes, wide(scale) * codes + wide(least)


@pytest.mark.slow
@given(
    rows=st.sampled_from([1, 2, 5, 16, 17, 40]),
    inputs=st.sampled_from([1, 31, 64, 96, 200, 576]),
    outputs=st.integers(1, 70),
    group=st.sampled_from([32, 64, 128, 576]),
    low=st.booleans(),
    seed=st.integers(0, 99),
)
def test_int4_groups_equal_float64(rows, inputs, outputs, group, low, seed):
    """Groups of any size, the last one short, with a value of code 0 and without, with an order of the inputs and without."""
    rng = np.random.default_rng(seed)
    matrix, codes, exact = _grouped(rng, outputs, inputs, group, low)
    np.testing.assert_array_equal(int4.codes(matrix["weight"])[:, :inputs], codes)
    assert matrix["weight"].dtype == jnp.uint8 and matrix["weight"].shape[1] == -(-inputs // group) * group // 2
    assert matrix["scale"].dtype == jnp.float16
    np.testing.assert_allclose(linear.rows(matrix, inputs=inputs), exact, atol=1e-6, rtol=1e-6)
    order = rng.permutation(inputs)
    put = np.zeros_like(exact)
    put[:, order] = exact
    ordered = matrix | {"order": jnp.asarray(order)}
    np.testing.assert_allclose(linear.rows(ordered, inputs=inputs), put, atol=1e-6, rtol=1e-6)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), jnp.float32)
    wide = np.asarray(x.astype("bfloat16"), np.float64)
    for implementation in IMPLEMENTATIONS:
        # Several at once, with another of its own kind, one in another order and one of eight bits.
        other = linear.store(jnp.asarray(exact, jnp.float32), "int8")
        found = linear.products(x, [matrix, ordered, other, matrix], implementation)
        wanted = [wide @ exact.T, wide @ put.T, wide @ np.asarray(linear.rows(other), np.float64).T, wide @ exact.T]
        for y, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(y, want, atol=2e-5 * inputs**0.5, rtol=1e-5)


@pytest.mark.skipif(not native.ready(), reason="no C++ compiler")
@pytest.mark.parametrize(("group", "low"), [(32, True), (128, False), (128, True)])
def test_a_row_of_int4_does_not_depend_on_how_many_there_are(group, low):
    """One order of sums, also within groups, to the last bit."""
    rng = np.random.default_rng(0)
    matrix, *_ = _grouped(rng, 37, 576, group, low)
    x = jnp.asarray(rng.normal(size=(40, 576)), jnp.float32)
    whole = linear.products(x, [matrix], "native")[0]
    for rows in (1, 2, 3, 5, 8, 16, 17, 33):
        np.testing.assert_array_equal(linear.products(x[:rows], [matrix], "native")[0], whole[:rows])


def test_scales_below_the_least_whole_half_and_beyond_it():
    """Numbers of float16 with fewer digits count as they are; what float16 would round is kept in float32."""
    codes, x = jnp.full((3, 32), 9), jnp.ones((1, 32), jnp.float32)
    for scale, dtype in ((2.0**-24, "float16"), (3 * 2.0**-20, "float16"), (1e-9, "float32"), (1e6, "float32")):
        matrix = int4.packed(codes, 32, np.full((3, 1), scale, np.float32))
        assert matrix["scale"].dtype == dtype
        for implementation in IMPLEMENTATIONS:
            np.testing.assert_allclose(linear.products(x, [matrix], implementation)[0], 32 * scale, rtol=1e-6)


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


@pytest.mark.parametrize(("weights", "bound"), [("bfloat16", 2**-8), ("int8", 0.5 / 127), ("int4", 1 / 8)])
def test_storing_rounds_to_the_nearest(weights, bound):
    """The error is at most half a step of the largest weight of the output, a step where int4 has none on that side; zeros stay."""
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(20, 32)), jnp.float32).at[3].set(0)
    stored = linear.store(matrix, weights)
    error = jnp.abs(linear.rows(stored) - matrix).max(-1) / jnp.abs(matrix).max(-1).clip(1e-9)
    assert 0 < error.max() <= bound * 1.001
    assert not linear.rows(stored)[3].any()
    np.testing.assert_array_equal(linear.rows(stored, jnp.asarray([4, 1])), linear.rows(stored)[jnp.asarray([4, 1])])


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "mistral"])
def test_a_model_keeps_its_matrices_in_few_bits(name, weights, tmp_path):
    """The logits are those of a float32 model with the rounded weights to two hundredths, and do not depend on the other rows."""
    folder = str(tiny_models.write(name, tmp_path / name))
    exact, small = pretrained.load(folder), pretrained.load(folder, weights=weights)
    assert small.config == dataclasses.replace(exact.config, weights=weights)
    tokens = jnp.asarray(tiny_models.PROMPTS, jnp.int32)

    def rounded(params, like):
        if "weight" in params:
            arrays = {part: params[part] for part in ("weight", "scale") if part in params}
            bias = {part: x for part, x in params.items() if part == "bias"}
            return bias | {"weight": linear.rows(arrays, inputs=like["weight"].shape[1])}
        return {key: rounded(each, like[key]) if isinstance(each, dict) else each for key, each in params.items()}

    dense = rounded(small.params, exact.params)
    want = forward(exact.config, dense, tokens)
    got = forward(small.config, small.params, tokens)
    close = lambda a, b: np.std(np.subtract(a, b)) < 0.02 * np.std(b)
    assert close(got, want)
    assert close(nll(small.config, small.params, tokens), nll(exact.config, dense, tokens))
    one = forward(small.config, small.params, tokens[:1, :4])
    assert np.abs(one - got[:1, :4]).max() < 1e-5 * np.abs(got).max()
    assert np.abs(one - forward(exact.config, exact.params, tokens[:1, :4])).max() > 1e-3


def test_an_unknown_kind_of_weights_is_refused(tmp_path):
    with pytest.raises(BadInput, match="model.weights 'int3' is not one of float32, bfloat16, int8, int4"):
        pretrained.load(str(tiny_models.write("llama", tmp_path / "m")), weights="int3")
