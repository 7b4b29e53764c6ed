"""Products with the matrices of a model, in the precision that they are kept in."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvcascade.kernels import native

WEIGHTS = ("float32", "bfloat16", "int8")
FEW = 16  # rows; for more, converting the matrix costs little next to the products, and XLA's are faster

type Matrix = dict[str, Array]
"""`weight` [out, in] in float32, bfloat16 or int8, the last with a float32 `scale` [out]: what one output needs is read in one piece."""


def store(matrix: Float[Array, "O I"], weights: str) -> Matrix:
    """Keep a matrix [out, in] in one of WEIGHTS; int8 has a scale per output, the largest weight's size / 127."""
    if weights != "int8":
        return {"weight": matrix.astype(weights)}
    scale = jnp.maximum(jnp.abs(matrix).max(-1), 1e-30) / 127
    return {"weight": jnp.round(matrix / scale[:, None]).astype(jnp.int8), "scale": scale}


def rows(matrix: Matrix, index: Any = ...) -> Float[Array, "*B I"]:
    """Rows of a stored matrix in float32, all without an index."""
    weight = matrix["weight"][index].astype(jnp.float32)
    return weight * matrix["scale"][index][..., None] if "scale" in matrix else weight


def product(
    x: Float[Array, "*B I"], matrix: Matrix, implementation: Literal["xla", "native"] | None = None
) -> Float[Array, "*B O"]:
    """x times the transpose of a stored matrix, in the dtype of x.

    `native` is C++ for a CPU and few rows, in float32, which reads weights as they are stored; `xla` converts the matrix to the dtype
    of x first; None takes the better one.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = native.run(implementation, _native, _xla, flat, matrix, suits=flat.shape[0] <= FEW)
    return y.reshape(*x.shape[:-1], -1)


def _xla(x, matrix):
    return jnp.einsum("BI,OI->BO", x, rows(matrix).astype(x.dtype))


def _native(x, matrix):
    shape = jax.ShapeDtypeStruct((x.shape[0], matrix["weight"].shape[0]), jnp.float32)
    scale = [matrix["scale"]] if "scale" in matrix else []
    return jax.ffi.ffi_call("kvcascade_product", shape)(x.astype(jnp.float32), matrix["weight"], *scale).astype(x.dtype)
