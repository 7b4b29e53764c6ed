"""The MLP's activation: values and gradients against formulas in float64, and its dropout."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.kernels.activation import ACTIVATIONS, activate

X = np.linspace(-6, 6, 101)
GATE = np.cos(X) * 3
SIGMOID = 1 / (1 + np.exp(-GATE))
TANH = np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3))
VALUES = {"relu": np.maximum(X, 0), "gelu": 0.5 * X * (1 + TANH), "swiglu": GATE * SIGMOID * X}
SLOPES = {
    "relu": (X > 0) * 1.0,
    "gelu": 0.5 * (1 + TANH) + 0.5 * X * (1 - TANH**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * X**2),
    "swiglu": GATE * SIGMOID,
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_values_and_gradients(kind: str) -> None:
    """Each activation and its slope at points from -6 to 6; the gate's slope too."""
    up, gate = jnp.asarray(X, jnp.float32), jnp.asarray(GATE, jnp.float32)
    out, pull = jax.vjp(lambda up, gate: activate(up, gate, kind), up, gate)
    dup, dgate = pull(jnp.ones_like(out))
    np.testing.assert_allclose(out, VALUES[kind], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dup, SLOPES[kind], rtol=1e-4, atol=1e-5)
    expected = X * (SIGMOID + GATE * SIGMOID * (1 - SIGMOID)) if kind == "swiglu" else np.zeros_like(X)
    np.testing.assert_allclose(dgate, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout(rate: float) -> None:
    """A share of about `rate` is zero, the rest is scaled up so that the mean stays; where it is zero, so is the gradient."""
    ones, key = jnp.ones((200, 100)), jax.random.key(0)
    out, pull = jax.vjp(lambda up: activate(up, None, "relu", rate, key), ones)
    dropped = np.asarray(out) == 0
    assert abs(dropped.mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / dropped.size)
    np.testing.assert_allclose(np.asarray(out)[~dropped], 1 / (1 - rate), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(pull(ones)[0]), np.asarray(out))
    np.testing.assert_array_equal(activate(ones, None, "relu", rate, key), out)
    assert (activate(ones, None, "relu", rate, jax.random.key(1)) != out).any()


def test_no_dropout_without_a_key_or_a_rate() -> None:
    """Evaluation passes no key, and a rate of 0 needs none."""
    up = jnp.asarray(X, jnp.float32)
    plain = activate(up, None, "gelu")
    np.testing.assert_array_equal(activate(up, None, "gelu", 0.5), plain)
    np.testing.assert_array_equal(activate(up, None, "gelu", 0.0, jax.random.key(0)), plain)


def test_what_it_cannot_do_is_an_error() -> None:
    """Another name, and swiglu without a gate."""
    up = jnp.ones(3)
    for kind in ("tanh", "swiglu"):
        with pytest.raises(ValueError, match=f"no activation '{kind}'"):
            activate(up, None, kind)
