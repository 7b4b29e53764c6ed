"""The activations of an MLP and their slopes, as formulas that every backend traces."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

GATED = ("swiglu", "geglu")
ACTIVATIONS = ("relu", "gelu", *GATED)


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
    """`relu` or `gelu` (tanh form) of up, `swiglu`, silu(gate) * up, or `geglu`, gelu(gate) * up (Shazeer 2020)."""
    match kind:
        case "relu":
            return jnp.maximum(up, 0)
        case "gelu":
            return up * sigmoid(up * (LINEAR + CUBIC * up * up))
        case "geglu":
            return gate * sigmoid(gate * (LINEAR + CUBIC * gate * gate)) * up
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
        case "geglu":
            square = gate * gate
            s = sigmoid(gate * (LINEAR + CUBIC * square))
            return gate * s, up * (s + s * (1 - s) * gate * (LINEAR + 3 * CUBIC * square))
        case _:
            s = sigmoid(gate)
            return gate * s, up * s * (1 + gate * (1 - s))
