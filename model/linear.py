"""Matrices of a model, in the precision that its configuration keeps them in."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax.numpy as jnp
from flax import nnx

from kvcascade.kernels import linear
from kvcascade.model.config import ModelConfig


class Stored(nnx.Module):
    """A matrix [out, in], kept by `kernels.linear`: its `weight`, and what else belongs to it. In a model of int4 all have `low` and `order`.

    Those are empty where nothing is to be said. What is not to lose as much as four bits lose is kept in int8 there.
    """

    weight: nnx.Param

    def __init__(self, outputs: int, inputs: int, weights: str, config: ModelConfig, init, rngs: nnx.Rngs):
        matrix = linear.store(init(rngs.params(), (outputs, inputs), jnp.float32), weights)
        for name, array in (filled(matrix) if weights == "int4" else matrix).items():
            setattr(self, name, nnx.Param(array))
        self.dtype, self.inputs = jnp.dtype(config.dtype), inputs

    @property
    def matrix(self) -> linear.Matrix:
        """The arrays as `kernels.linear` takes them."""
        arrays = {name: getattr(self, name)[...] for name in ("weight", "scale", *EMPTY) if hasattr(self, name)}
        return {name: array for name, array in arrays.items() if array.size}

    def rows(self, index=...):
        """Rows of the matrix in float32."""
        return linear.rows(self.matrix, index, self.inputs)

    def product(self, x):
        """Products of x with each row of the matrix."""
        return linear.products(x.astype(self.dtype), [self.matrix])[0]


EMPTY = {"low": (0, 0), "order": (0,)}


def filled(matrix: linear.Matrix) -> linear.Matrix:
    """A matrix as a model of int4 has it, with empty arrays in the place of those that it lacks."""
    return {
        name: jnp.zeros(shape, jnp.int32 if name == "order" else jnp.float16) for name, shape in EMPTY.items()
    } | matrix


class Linear(Stored):
    """Products with a matrix, and a bias added."""

    def __init__(
        self, inputs: int, outputs: int, config: ModelConfig, use_bias: bool, init, rngs: nnx.Rngs, weights: str = ""
    ):
        super().__init__(outputs, inputs, weights or config.weights, config, init, rngs)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(outputs))

    @property
    def added(self):
        """The bias, None without one."""
        return self.bias[...] if hasattr(self, "bias") else None

    def __call__(self, x):
        return together(x, self)[0]


_see: ContextVar[Callable[..., Any] | None] = ContextVar("see", default=None)


@contextlib.contextmanager
def watched(see: Callable[..., Any]) -> Iterator[None]:
    """Call `see(x, linears)` before every product, not under `jit`: it may change the matrices, and gives the x that is taken."""
    before = _see.set(see)
    try:
        yield
    finally:
        _see.reset(before)


def products(x, *linears: Linear) -> list:
    """Products with several Linears' matrices, read in one go; the biases are not added."""
    if see := _see.get():
        x = see(x, linears)
    return linear.products(x.astype(linears[0].dtype), [each.matrix for each in linears])


def together(x, *linears: Linear) -> list:
    """Several Linears of the same x, their matrices read in one go."""
    found = zip(products(x, *linears), (each.added for each in linears), strict=True)
    return [y if bias is None else y + bias.astype(y.dtype) for y, bias in found]


def head_weights(config: ModelConfig) -> str:
    """What embeddings and the head are kept in: int8 where the others are int4."""
    return "int8" if config.weights == "int4" else config.weights


class Embedding(Stored):
    """A vector per token; where the head is tied to it, `product` gives the logits."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config.vocab, config.width, head_weights(config), config, nnx.initializers.normal(0.02), rngs)

    def __call__(self, tokens):
        return self.rows(tokens).astype(self.dtype)
