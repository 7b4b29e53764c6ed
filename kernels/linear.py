"""Products with the matrices of a model, in the precision that they are kept in."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from kvcascade.kernels import int4, native, processor
from kvcascade.kernels.backend import Implementation, run

WEIGHTS = ("float32", "bfloat16", "int8", "int4")
MANY = 256  # rows; from here on XLA's products of float32 are as fast as the C++ ones, and where it has tiles (AMX) all are faster

type Matrix = dict[str, Array]
"""`weight` [out, in] in float32, bfloat16 or int8, the last with a float32 `scale` [out], or in four bits as `int4.packed` has it, where
`order` [in] may say which input of x each column is for. What one output needs is read in one piece."""


def store(matrix: Float[Array, "O I"], weights: str) -> Matrix:
    """Keep a matrix [out, in] in one of WEIGHTS; int8 has a scale per output, the largest weight's size / 127, int4 one for 32 inputs."""
    if weights == "int4":
        return int4.rounded(matrix)
    if weights != "int8":
        return {"weight": matrix.astype(weights)}
    scale = jnp.maximum(jnp.abs(matrix).max(-1), 1e-30) / 127
    return {"weight": jnp.round(matrix / scale[:, None]).astype(jnp.int8), "scale": scale}


def rows(matrix: Matrix, index: Any = ..., inputs: int | None = None) -> Float[Array, "*B I"]:
    """Rows of a stored matrix in float32, all without an index; of int4, which is padded, the first `inputs` numbers."""
    weight = matrix["weight"]
    if weight.dtype == jnp.uint8:
        found = int4.unpacked(matrix, index)[..., :inputs]
        return found[..., jnp.argsort(matrix["order"])] if "order" in matrix else found
    found = weight[index].astype(jnp.float32)
    return found * matrix["scale"][index][..., None] if "scale" in matrix else found


def products(
    x: Float[Array, "*B I"], matrices: Sequence[Matrix], implementation: Implementation | None = None
) -> list[Float[Array, "*B _"]]:
    """x times the transpose of each stored matrix, in the dtype of x; those that are kept in the same way are read in one go.

    Where x and the weights are float32, so are their products. All others are of bfloat16 numbers: x is rounded to it, which holds
    weights of bfloat16 and the codes of int8 and int4 exactly, and float32 weights are rounded if x comes in bfloat16. Sums are in
    float32. Thus nothing but the order of a row's sums depends on how many rows there are. `native` is C++ for a CPU, which reads
    weights as they are stored; `xla` converts a matrix first; None takes the better one.
    """
    flat, found = x.reshape(-1, x.shape[-1]), {}
    if implementation is None and len(flat) >= MANY and (_exact(x, matrices) or processor.tiles()):
        implementation = "xla"
    for indices in _alike(matrices):
        some = [matrices[index] for index in indices]
        ordered = flat[:, some[0]["order"]] if "order" in some[0] else flat
        arrays = [{name: array for name, array in matrix.items() if name != "order"} for matrix in some]
        found |= zip(
            indices,
            run(implementation, _xla, {"native": native.kernel(_native)}, ordered, arrays, axes="R O -> RO"),
            strict=True,
        )
    return [found[index].reshape(*x.shape[:-1], -1) for index in range(len(matrices))]


def _alike(matrices: Sequence[Matrix]) -> list[list[int]]:
    """The indices of matrices that are kept in the same way; one with an order of its own is alone."""
    kinds: dict[Any, list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups = matrix["scale"].shape[1:] if "scale" in matrix else ()
        like = (groups, *((name, array.dtype, name == "order" and index) for name, array in matrix.items()))
        kinds.setdefault(like, []).append(index)
    return list(kinds.values())


def _exact(x, matrices):
    return x.dtype == matrices[0]["weight"].dtype == jnp.float32


def _xla(x, matrices):
    if _exact(x, matrices):
        # On a GPU the default would be TF32.
        return [jnp.einsum("BI,OI->BO", x, matrix["weight"], precision="highest") for matrix in matrices]
    # XLA may leave out a conversion there and back, not a rounding.
    rounded = lax.reduce_precision(x, 8, 7)
    if matrices[0]["weight"].dtype == jnp.uint8:
        # A code times its scale is not a number of bfloat16.
        dense = [int4.unpacked(matrix)[:, : x.shape[1]] for matrix in matrices]
        wide = rounded.astype(jnp.float32)
        return [jnp.einsum("BI,OI->BO", wide, matrix, precision="highest").astype(x.dtype) for matrix in dense]
    rounded = rounded.astype(jnp.bfloat16)

    def product(weight, scale=None):
        sums = x.dtype if scale is None else jnp.float32
        y = jnp.einsum("BI,OI->BO", rounded, weight.astype(jnp.bfloat16), preferred_element_type=sums)
        return (y if scale is None else y * scale).astype(x.dtype)

    return [product(**matrix) for matrix in matrices]


def _native(x, matrices):
    x_dtype = jnp.float32 if _exact(x, matrices) else jnp.bfloat16
    arrays = [[matrix[name] for name in ("weight", "scale", "low") if name in matrix] for matrix in matrices]
    if arrays[0][0].dtype == jnp.float32:
        arrays = [[weight.astype(x_dtype)] for [weight] in arrays]
    shapes = [jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32) for weight, *_ in arrays]
    call = jax.ffi.ffi_call("kvcascade_product", shapes)
    found = call(x.astype(x_dtype), *itertools.chain(*arrays), arrays=np.int64(len(arrays[0])))
    return [y.astype(x.dtype) for y in found]
