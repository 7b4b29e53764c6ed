"""The cross-entropy of the head: the same numbers as with all logits at once, in memory that holds a block of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.kernels.loss import ROWS, token_nll


def plain(x_TM, head_VM, target_T):
    """The same by its formula."""
    logits = x_TM @ head_VM.T
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, target_T[:, None], 1)[:, 0]


def with_gradients(nll, x_TM, head_VM, target_T, weight_T):
    """Values, and the gradients of a weighted sum by x and by the head."""
    value, pull = jax.vjp(lambda x, head: nll(x, head, target_T), x_TM, head_VM)
    return value, *pull(weight_T)


@pytest.mark.parametrize("T", [1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 1021, 1543])
def test_equals_the_formula(T: int) -> None:
    """Also where no block size divides the tokens; the last block's filling is in no gradient."""
    rng = np.random.default_rng(T)
    x, head, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((T, 8), (31, 8), (T,)))
    target = jnp.asarray(rng.integers(0, 31, T))
    found, exact = (with_gradients(nll, x, head, target, weight) for nll in (token_nll, plain))
    for name, ours, theirs in zip(("nll", "dx", "dhead"), found, exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * float(jnp.abs(theirs).max()), err_msg=name)


def test_memory_is_a_block_of_logits() -> None:
    """For a prime number of tokens too: XLA's temporaries, with the gradients, are a few blocks and what is as long as x."""
    M, V = 16, 4096
    for T in (8191, 32749):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((T, M), (V, M))]
        shapes += [jax.ShapeDtypeStruct((T,), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.float32)]
        step = jax.jit(lambda *arrays: with_gradients(token_nll, *arrays)).lower(*shapes).compile()
        memory = step.memory_analysis()
        assert memory and memory.temp_size_in_bytes < 4 * (3 * ROWS * V + 4 * T * (M + 4))
