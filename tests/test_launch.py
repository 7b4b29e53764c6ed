"""Triton kernels launched from JAX: interpreted in numpy, their traffic counted; and compiled, where there is what compiles them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.kernels import launch as launching
from kvcascade.kernels.launch import launch
from kvcascade.kernels.traffic import counting

pytest.importorskip("triton")
import triton_samples as samples  # noqa: E402


def row_sums(x):
    rows, columns = x.shape
    constants = {"ROWS": rows, "COLUMNS": columns, "BLOCK": 16}
    out = jax.ShapeDtypeStruct((rows,), jnp.float32)
    return launch(samples.row_sums, (rows,), [x], [out], interpret=True, **constants)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_kernel_with_functions_of_its_own_and_of_triton_runs_inside_jit(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 11)) * 9, dtype)
    np.testing.assert_allclose(jax.jit(row_sums)(x), np.asarray(x, np.float64).sum(1), atol=1e-5)


def test_a_load_that_is_repeated_counts_twice_and_one_that_is_masked_never():
    x = jnp.ones((3, 11), jnp.bfloat16)
    with counting() as traffic:
        jax.block_until_ready(jax.jit(row_sums)(x))
    assert traffic.read == {("row_sums", "x"): 2 * x.nbytes}
    assert traffic.written == {("row_sums", "out"): 3 * 4}
    jax.block_until_ready(row_sums(x))
    assert traffic.read.total() == 2 * x.nbytes


def test_bf16_is_rounded_to_even_and_multiplied_as_numbers_with_float32_sums():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 32)), jnp.float32).at[0, :3].set([1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-9])
    y = jnp.asarray(rng.normal(size=(32, 16)), jnp.bfloat16)
    results = [jax.ShapeDtypeStruct((16, 32), jnp.bfloat16), jax.ShapeDtypeStruct((16, 16), jnp.float32)]
    rounded, out = launch(samples.product, (1,), [x, y], results, interpret=True, M=16, K=32, N=16)
    np.testing.assert_array_equal(rounded, x.astype(jnp.bfloat16))
    np.testing.assert_array_equal(rounded[0, :3].astype(jnp.float32), [1, 1 + 2**-6, 2])
    np.testing.assert_allclose(out, np.asarray(rounded, np.float64) @ np.asarray(y, np.float64), atol=1e-5)


def test_arithmetic_in_bf16_is_refused_because_the_interpreter_has_it_wrong():
    one = jnp.ones(1, jnp.bfloat16)
    with pytest.raises(Exception, match="convert to float32 first"):
        jax.block_until_ready(
            launch(samples.sum_of_bf16, (1,), [one], [jax.ShapeDtypeStruct((1,), jnp.bfloat16)], interpret=True)
        )


def test_what_is_written_in_place_comes_back_and_the_rest_of_it_stays():
    slots = jnp.arange(12.0).reshape(3, 4)
    index, value = jnp.asarray([1, 0, 3]), jnp.asarray([-1.0, -2.0, -3.0])
    put = lambda slots, index, value: launch(
        samples.put, (3,), [index, value, slots], interpret=True, in_place=[2], S=4
    )
    (written,) = jax.jit(put)(slots, index, value)
    np.testing.assert_array_equal(written, slots.at[jnp.arange(3), index].set(value))
    np.testing.assert_array_equal(slots, np.arange(12.0).reshape(3, 4))


def test_a_store_outside_of_the_arrays_is_an_error():
    index, value, slots = jnp.asarray([0, 8]), jnp.ones(2), jnp.zeros((2, 4))
    with pytest.raises(Exception, match="put reads or writes outside of its arrays"):
        jax.block_until_ready(launch(samples.put, (2,), [index, value, slots], interpret=True, in_place=[2], S=4))


def test_what_is_missing_is_named(monkeypatch):
    absent = set()
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None if name in absent else name)
    assert launching.refuses() is None
    with launching.backend.target((7, 0)):
        assert launching.refuses() == "Triton needs a GPU of compute capability 8.0"
    absent.add("jax_triton")
    assert launching.refuses() is None
    with launching.backend.target((9, 0)):
        assert launching.refuses() == "jax-triton is not installed"
    absent.add("triton")
    assert launching.refuses() == "triton is not installed"
