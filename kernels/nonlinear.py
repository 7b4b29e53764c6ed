"""The activations of an MLP and their slopes, as formulas that every backend traces."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

ACTIVATIONS = ("relu", "gelu", "swiglu")


class Inputs(NamedTuple):
    """What the forward pass reads, and all that is kept for the backward one; None for what there is not."""

    up: Float[Array, "R F"]
    gate: Float[Array, "R F"] | None
    bias: Float[Array, " F"] | None
    """Added to up, in float32."""
    gate_bias: Float[Array, " F"] | None
    words: UInt32[Array, "2"] | None
    """Of the dropout's key."""


# 0.5 (1 + tanh z) is sigmoid(2 z): GELU's tanh form (Hendrycks & Gimpel 2016) in one exponential.
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = LINEAR * 0.044715


def value(kind: str, up, gate, sigmoid=jax.nn.sigmoid):
    """`relu`, `gelu` (tanh form) of up, or `swiglu`, silu(gate) * up (Shazeer 2020)."""
    match kind:
        case "relu":
            return jnp.maximum(up, 0)
        case "gelu":
            return up * sigmoid(up * (LINEAR + CUBIC * up * up))
        case _:
            return gate * sigmoid(gate) * up


def slopes(kind: str, up, gate, sigmoid=jax.nn.sigmoid) -> tuple:
    """The derivatives of `value` with respect to up and to gate, the second None without a gate."""
    match kind:
        case "relu":
            return jnp.where(up > 0, 1.0, 0.0), None
        case "gelu":
            square = up * up
            s = sigmoid(up * (LINEAR + CUBIC * square))
            return s + s * (1 - s) * up * (LINEAR + 3 * CUBIC * square), None
        case _:
            s = sigmoid(gate)
            return gate * s, up * s * (1 + gate * (1 - s))
