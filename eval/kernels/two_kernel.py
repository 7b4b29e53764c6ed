"""What the fused activation is measured against: one program for bias and activation, another for dropout, with the mask in memory.

Each function is one program, to be compiled by itself: what it returns is written to memory and read again by the next.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from kvcascade.kernels import activation, threefry
from kvcascade.kernels.nonlinear import Inputs


def activate(kind: str, inputs: Inputs) -> Float[Array, "R F"]:
    """Forward, first: biases and activation."""
    return activation.forward(kind, 0.0, inputs._replace(words=None))


def drop(
    rate: float, hidden: Float[Array, "R F"], words: UInt32[Array, "2"]
) -> tuple[Float[Array, "R F"], Bool[Array, "R F"]]:
    """Forward, second: dropout, and the mask that the backward pass will read."""
    mask = threefry.mask(words, rate, *hidden.shape)
    return _masked(rate, hidden, mask), mask


def drop_backward(rate: float, mask: Bool[Array, "R F"], dout: Float[Array, "R F"]) -> Float[Array, "R F"]:
    """Backward, first: the gradient before the dropout, from the mask in memory."""
    return _masked(rate, dout, mask)


def activate_backward(kind: str, inputs: Inputs, dhidden: Float[Array, "R F"]) -> Inputs:
    """Backward, second: the gradients of the inputs."""
    return activation.backward(kind, 0.0, inputs._replace(words=None), dhidden)


def _masked(rate, x, mask):
    return jnp.where(mask, x.astype(jnp.float32) * (1 / (1 - rate)), 0).astype(x.dtype)
