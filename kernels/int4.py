"""Matrices in four bits: two codes in a byte, and for every group of inputs a scale and the value of code 0."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

BLOCK = 32
"""Inputs in 16 bytes, 8 little-endian words: word w has inputs w, 8 + w, 16 + w and 24 + w from its lowest bits on."""
MIDDLE = 8
"""The code of zero where a group has no value for code 0."""


def packed(codes: Int[Array, "O I"] | UInt8[Array, "O I"], group: int, scale: Any, low: Any = None) -> dict[str, Array]:
    """A matrix scale · code + low, where `scale` and `low` [O, G] belong to `group` inputs each, a multiple of BLOCK; without `low` it is -8 scale.

    `weight` is [O, bytes], with inputs padded to whole groups. Scales are kept in float16 where it holds all of them exactly.
    """
    O, I = codes.shape
    padded = jnp.pad(codes.astype(jnp.uint8), ((0, 0), (0, -I % group)))
    quarters = padded.reshape(O, -1, 4, BLOCK // 4).swapaxes(2, 3)
    pairs = quarters[..., ::2] | quarters[..., 1::2] << 4
    matrix = {"weight": pairs.reshape(O, -1), "scale": _narrow(scale)}
    return matrix if low is None else matrix | {"low": _narrow(low)}


def codes(weight: UInt8[Array, "*B bytes"]) -> UInt8[Array, "*B I"]:
    """The codes of packed rows, those that fill up the last group with them."""
    words = weight.reshape(*weight.shape[:-1], -1, BLOCK // 4, 2)
    quarters = jnp.stack([words & 15, words >> 4], -1).reshape(*words.shape[:-1], 4)
    return quarters.swapaxes(-1, -2).reshape(*weight.shape[:-1], -1)


def unpacked(matrix: dict[str, Array], index: Any = ...) -> Float[Array, "*B I"]:
    """Rows of a packed matrix in float32, with what fills up the last group."""
    each = codes(matrix["weight"][index]).astype(jnp.float32)
    scale = matrix["scale"][index].astype(jnp.float32)
    low = matrix["low"][index].astype(jnp.float32) if "low" in matrix else -MIDDLE * scale
    grouped = each.reshape(*scale.shape, -1) * scale[..., None] + low[..., None]
    return grouped.reshape(each.shape)


def rounded(matrix: Float[Array, "O I"], group: int = BLOCK) -> dict[str, Array]:
    """Round to the nearest of 16 steps, a float16 scale for every `group` inputs, so that the largest of them is code 0 exactly.

    As llama.cpp's Q4_0, which has one code more on the side of the largest number than on the other.
    """
    O, I = matrix.shape
    groups = jnp.pad(matrix, ((0, 0), (0, -I % group))).reshape(O, -1, group)
    largest = jnp.take_along_axis(groups, jnp.abs(groups).argmax(-1, keepdims=True), -1)
    scale = (largest / -MIDDLE).astype(jnp.float16)
    wide = scale.astype(jnp.float32)
    steps = jnp.round(groups / jnp.where(wide == 0, 1, wide)) + MIDDLE
    return packed(jnp.clip(steps, 0, 15).reshape(O, -1)[:, :I].astype(jnp.uint8), group, scale[..., 0])


def _narrow(x: Any) -> Array:
    """In float16 if that rounds none of the numbers."""
    x = jnp.asarray(x)
    if x.dtype == jnp.float16:
        return x
    narrow = x.astype(jnp.float16)
    return narrow if (narrow.astype(jnp.float32) == x).all() else x.astype(jnp.float32)
