"""What the check of whole decode steps tells from a compiled program; tests/test_kernels_check.py runs it on a card."""

import jax
import jax.numpy as jnp
import pytest

from kvcascade.eval.kernels import whole_step

GOOD = {"cache_bytes": 1000, "aliased": 1000, "copies": 0, "temporaries": 50, "launches": 10}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"aliased": 999}, "999 of the cache's 1000 bytes are aliased"),
        ({"copies": 2}, "copies keys or values 2 times"),
        ({"temporaries": 51}, "temporaries of 51 bytes, above 5% of the cache"),
        ({"launches": 11}, "launches 11, where it was 10"),
        ({"failed": "no compiler"}, "no compiler"),
    ],
)
def test_a_fault_is_told_in_a_line(change, line):
    assert whole_step.faults(GOOD | change, GOOD) == [line]
    assert whole_step.faults(GOOD, GOOD) == []


@pytest.mark.parametrize("donated", [True, False])
def test_a_cache_that_is_not_changed_in_place_is_a_copy(donated):
    held = jax.ShapeDtypeStruct((4, 2, 64, 16), jnp.int8)
    put = jax.jit(lambda held, new: held.at[:, :, 3].set(new), donate_argnums=(0,) if donated else ())
    program = put.lower(held, jax.ShapeDtypeStruct((4, 2, 16), jnp.int8)).compile().as_text() or ""
    updates = 1  # the update itself has the array's shape too, which on a GPU a kernel of ours makes
    assert whole_step.copies(program, [held]) == (updates if donated else updates + 1)
    assert whole_step.copies(program, [jax.ShapeDtypeStruct((4, 2, 64, 16), jnp.uint8)]) == 0
