"""Matrices of a model, in the precision that its configuration keeps them in."""

import jax.numpy as jnp
from flax import nnx

from kvcascade.kernels import linear
from kvcascade.model.config import ModelConfig


class Linear(nnx.Module):
    """x @ kernel + bias; the kernel [in, out] in float32, or stored by `kernels.linear`."""

    def __init__(self, inputs: int, outputs: int, config: ModelConfig, use_bias: bool, kernel_init, rngs: nnx.Rngs):
        kernel = kernel_init(rngs.params(), (inputs, outputs), jnp.float32)
        if config.weights == "float32":
            self.kernel = nnx.Param(kernel)
        else:
            self.stored = _params(linear.store(kernel.T, config.weights))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(outputs))
        self.dtype = jnp.dtype(config.dtype)

    def __call__(self, x):
        x = x.astype(self.dtype)
        if hasattr(self, "kernel"):
            y = x @ self.kernel[...].astype(self.dtype)
        else:
            y = linear.product(x, _arrays(self.stored)).astype(self.dtype)
        return y + self.bias[...].astype(self.dtype) if hasattr(self, "bias") else y

    @property
    def rows(self):
        """The matrix [out, in] in float32."""
        return self.kernel[...].T if hasattr(self, "kernel") else linear.rows(_arrays(self.stored))


class Embedding(nnx.Module):
    """A vector per token, and, where the head is tied to it, products with all of them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        table = nnx.initializers.normal(0.02)(rngs.params(), (config.vocab, config.width), jnp.float32)
        if config.weights == "float32":
            self.embedding = nnx.Param(table)
        else:
            self.stored = _params(linear.store(table, config.weights))
        self.dtype = jnp.dtype(config.dtype)

    def __call__(self, tokens):
        if hasattr(self, "embedding"):
            return self.embedding[...].astype(self.dtype)[tokens]
        return linear.rows(_arrays(self.stored), tokens).astype(self.dtype)

    @property
    def rows(self):
        """The vectors of all tokens in float32."""
        return self.embedding[...] if hasattr(self, "embedding") else linear.rows(_arrays(self.stored))

    def attend(self, x):
        """Products of x with every token's vector."""
        if hasattr(self, "embedding"):
            return x.astype(self.dtype) @ self.embedding[...].astype(self.dtype).T
        return linear.product(x, _arrays(self.stored)).astype(self.dtype)


def _params(matrix: linear.Matrix):
    return nnx.Dict({name: nnx.Param(array) for name, array in matrix.items()})


def _arrays(stored) -> linear.Matrix:
    return {name: stored[name][...] for name in ("codes", "scale") if name in stored}
