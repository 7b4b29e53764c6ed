"""The activation of an MLP in one pass over memory: bias, activation, gate and dropout, forward and backward."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from kvcascade.kernels import activation_mosaic, launch, threefry
from kvcascade.kernels.backend import Implementation, Kernel, run
from kvcascade.kernels.nonlinear import ACTIVATIONS, GATED, Inputs, slopes, value


@jax.named_scope("activation")
def activate(
    up: Float[Array, "*B F"],
    gate: Float[Array, "*B F"] | None,
    kind: str,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    bias: Float[Array, " F"] | None = None,
    gate_bias: Float[Array, " F"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*B F"]:
    """Add the biases, apply the activation (`nonlinear.value`), then dropout at `rate` if a key is given.

    Computed in float32, returned in the type of up. The backward pass keeps the inputs alone and draws the mask again from the key
    (`threefry.keep`), so that a mask is never in memory. Raises ValueError for another kind, a rate outside [0, 1), or a key of another
    generator than threefry2x32; NotImplementedError for an implementation that is asked for and cannot.
    """
    if kind not in ACTIVATIONS or (kind in GATED and gate is None):
        raise ValueError(
            f"no activation {kind!r} without a gate; choose from {', '.join(ACTIVATIONS)}; {' and '.join(GATED)} have a gate"
        )
    if kind not in GATED:
        gate = gate_bias = None
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout rate of {rate}; it must be at least 0 and below 1")
    rows = lambda x: None if x is None else x.reshape(-1, x.shape[-1])
    wide = lambda x: None if x is None else x.astype(jnp.float32)
    words = None if key is None or rate == 0 else threefry.key_words(key)
    inputs = Inputs(up.reshape(-1, up.shape[-1]), rows(gate), wide(bias), wide(gate_bias), words)
    pull = functools.partial(_pull, kind, rate, implementation)
    return _run(kind, rate, implementation, forward, pull, inputs).reshape(up.shape)


def _pull(kind, rate, implementation, inputs, dout):
    return (_run(kind, rate, implementation, backward, None, inputs, dout),)


def _run(kind, rate, implementation, reference, gradient, *arguments):
    of = lambda function: functools.partial(function, kind, rate)
    name = reference.__name__
    kernels = {
        "mosaic": Kernel(of(getattr(activation_mosaic, name)), of(activation_mosaic.refuses)),
        "triton": Kernel(of(functools.partial(_triton, name)), of(_triton_refuses)),
    }
    # No axes: a row's mask depends on its number, and the gradients of biases are sums over rows.
    return run(implementation, of(reference), kernels, *arguments, axes="->", gradient=gradient)


def _triton(name, *arguments, interpret):
    from kvcascade.kernels import activation_triton

    return getattr(activation_triton, name)(*arguments, interpret)


def _triton_refuses(*arguments):
    if reason := launch.refuses():
        return reason
    from kvcascade.kernels import activation_triton

    return activation_triton.refuses(*arguments)


def _read(inputs: Inputs):
    """Up and gate in float32, with their biases."""
    added = lambda x, bias: x.astype(jnp.float32) if bias is None else x.astype(jnp.float32) + bias
    return added(inputs.up, inputs.bias), None if inputs.gate is None else added(inputs.gate, inputs.gate_bias)


def _dropped(x, inputs: Inputs, rate: float):
    if inputs.words is None:
        return x
    return jnp.where(threefry.mask(inputs.words, rate, *x.shape), x * (1 / (1 - rate)), 0)


def forward(kind: str, rate: float, inputs: Inputs) -> Float[Array, "R F"]:
    """The reference: the activation of rows, in the type of up."""
    return _dropped(value(kind, *_read(inputs)), inputs, rate).astype(inputs.up.dtype)


def backward(kind: str, rate: float, inputs: Inputs, dout: Float[Array, "R F"]) -> Inputs:
    """The reference: the gradients of the inputs, those of biases summed over rows in float32."""
    dout = _dropped(dout.astype(jnp.float32), inputs, rate)
    by_up, by_gate = slopes(kind, *_read(inputs))
    dup, dgate = dout * by_up, None if by_gate is None else dout * by_gate
    summed = lambda x, bias: None if bias is None else x.sum(0)
    sums = summed(dup, inputs.bias), summed(dgate, inputs.gate_bias)
    dtype = inputs.up.dtype
    return Inputs(dup.astype(dtype), None if dgate is None else dgate.astype(dtype), *sums, None)
