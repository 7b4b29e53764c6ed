"""Matrices of a model, in the precision that its configuration keeps them in."""

import jax.numpy as jnp
from flax import nnx

from kvcascade.kernels import linear
from kvcascade.model.config import ModelConfig


class Stored(nnx.Module):
    """A matrix [out, in], kept by `kernels.linear` as `weight` and, in int8, `scale`."""

    def __init__(self, outputs: int, inputs: int, config: ModelConfig, init, rngs: nnx.Rngs):
        matrix = linear.store(init(rngs.params(), (outputs, inputs), jnp.float32), config.weights)
        self.weight = nnx.Param(matrix["weight"])
        if "scale" in matrix:
            self.scale = nnx.Param(matrix["scale"])
        self.dtype = jnp.dtype(config.dtype)

    @property
    def matrix(self) -> linear.Matrix:
        """The arrays as `kernels.linear` takes them."""
        scale = {"scale": self.scale[...]} if hasattr(self, "scale") else {}
        return {"weight": self.weight[...]} | scale

    def product(self, x):
        """Products of x with each row of the matrix."""
        return linear.products(x.astype(self.dtype), [self.matrix])[0]


class Linear(Stored):
    """Products with a matrix, and a bias added."""

    def __init__(self, inputs: int, outputs: int, config: ModelConfig, use_bias: bool, init, rngs: nnx.Rngs):
        super().__init__(outputs, inputs, config, init, rngs)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(outputs))

    @property
    def added(self):
        """The bias, None without one."""
        return self.bias[...] if hasattr(self, "bias") else None

    def __call__(self, x):
        return together(x, self)[0]


def products(x, *linears: Linear) -> list:
    """Products with several Linears' matrices, read in one go; the biases are not added."""
    return linear.products(x.astype(linears[0].dtype), [each.matrix for each in linears])


def together(x, *linears: Linear) -> list:
    """Several Linears of the same x, their matrices read in one go."""
    found = zip(products(x, *linears), (each.added for each in linears), strict=True)
    return [y if bias is None else y + bias.astype(y.dtype) for y, bias in found]


class Embedding(Stored):
    """A vector per token; where the head is tied to it, `product` gives the logits."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config.vocab, config.width, config, nnx.initializers.normal(0.02), rngs)

    def __call__(self, tokens):
        return linear.rows(self.matrix, tokens).astype(self.dtype)
