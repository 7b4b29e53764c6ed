"""Products with the matrices of a model, in the precision that they are kept in."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvcascade.kernels import native
from kvcascade.kernels.backend import Implementation, run

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


def products(
    x: Float[Array, "*B I"], matrices: Sequence[Matrix], implementation: Implementation | None = None
) -> list[Float[Array, "*B _"]]:
    """x times the transpose of each stored matrix, in the dtype of x; the matrices are all kept in the same way.

    `native` is C++ for a CPU and few rows, in float32, which reads weights as they are stored; `xla` converts a matrix to the dtype
    of x first; None takes the better one, but for more than FEW rows of bfloat16 or int8 weights rounds x to bfloat16, which holds
    such weights exactly, and sums in float32: twice as fast, and as exact as weights of so few bits are worth.
    """
    flat = x.reshape(-1, x.shape[-1])
    if implementation is None and flat.shape[0] > FEW:
        found = [_rounded(flat, matrix) for matrix in matrices]
    else:
        found = run(implementation, _xla, {"native": native.kernel(_native)}, flat, list(matrices), axes="R O -> RO")
    return [y.reshape(*x.shape[:-1], -1) for y in found]


def _xla(x, matrices):
    return [jnp.einsum("BI,OI->BO", x, rows(matrix).astype(x.dtype)) for matrix in matrices]


def _rounded(x, matrix):
    if matrix["weight"].dtype == jnp.float32:
        return _xla(x, [matrix])[0]
    operands = (x.astype(jnp.bfloat16), matrix["weight"].astype(jnp.bfloat16))
    y = jnp.einsum("BI,OI->BO", *operands, preferred_element_type=jnp.float32)
    return (y * matrix["scale"] if "scale" in matrix else y).astype(x.dtype)


def _native(x, matrices):
    arrays = [[matrix[name] for name in ("weight", "scale") if name in matrix] for matrix in matrices]
    shapes = [jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32) for weight, *_ in arrays]
    call = jax.ffi.ffi_call("kvcascade_product", shapes)
    found = call(x.astype(jnp.float32), *itertools.chain(*arrays), arrays=np.int64(len(arrays[0])))
    return [y.astype(x.dtype) for y in found]
