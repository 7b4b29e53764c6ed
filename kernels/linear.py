"""Products with a matrix that is kept in fewer bits than it is computed in."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvcascade.kernels import native

WEIGHTS = ("float32", "bfloat16", "int8")
FEW = 16  # rows; for more, converting the matrix costs little next to the products

type Matrix = dict[str, Array]
"""`codes` [out, in] in bfloat16, or in int8 with a float32 `scale` [out]: what one output needs is read in one piece."""


def store(matrix: Float[Array, "O I"], weights: str) -> Matrix:
    """Keep a matrix [out, in] in bfloat16 or int8; int8 has a scale per output, the largest weight's size / 127."""
    if weights == "bfloat16":
        return {"codes": matrix.astype(jnp.bfloat16)}
    scale = jnp.maximum(jnp.abs(matrix).max(-1), 1e-30) / 127
    return {"codes": jnp.round(matrix / scale[:, None]).astype(jnp.int8), "scale": scale}


def rows(matrix: Matrix, index: Any = ...) -> Float[Array, "*B I"]:
    """Rows of a stored matrix in float32, all without an index."""
    codes = matrix["codes"][index].astype(jnp.float32)
    return codes * matrix["scale"][index][..., None] if "scale" in matrix else codes


def product(
    x: Float[Array, "*B I"], matrix: Matrix, implementation: Literal["xla", "native"] | None = None
) -> Float[Array, "*B O"]:
    """x times the transpose of a stored matrix, in float32: weights are read as they are stored.

    `native` is C++ for a CPU and few rows, `xla` converts the matrix first; None takes the better one.
    """
    lead = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if implementation is None:
        implementation = "native" if flat.shape[0] <= FEW and native.ready() else "xla"
    y = _xla(flat, matrix) if implementation == "xla" else native.run(_native, _xla, flat, matrix)
    return y.reshape(*lead, -1)


def _xla(x, matrix):
    return jnp.einsum("BI,OI->BO", x, rows(matrix))


def _native(x, matrix):
    outputs = native.arrays(matrix)[0].shape[0]
    call = jax.ffi.ffi_call("kvcascade_product", jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32))
    return call(x, *native.arrays(matrix))
