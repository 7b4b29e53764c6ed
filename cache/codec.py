"""How a vector is written in bits."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.slots import Codec


@dataclasses.dataclass(frozen=True)
class Plain(Codec):
    """A floating-point format as it is."""

    dtype: str

    def encode(self, x):
        return {"values": x.astype(self.dtype)}

    def read(self, stored):
        return stored["values"]

    def bound(self, stored):
        largest = jnp.abs(stored["values"].astype(jnp.float32)).max(-1, keepdims=True)
        # A processor may take what is below the smallest normal number for zero.
        return jnp.maximum(largest * jnp.finfo(self.dtype).eps, jnp.finfo(jnp.float32).tiny)

    def nbytes(self, width):
        return width * jnp.dtype(self.dtype).itemsize


LEAST = 2.0**-100
"""No scale is smaller: a processor may take what is below 2^-126 for zero."""


def _round_to_bf16(x):
    # Not `astype(bfloat16).astype(float32)`: XLA may drop that pair and then codes would be computed from a scale that is not stored.
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _scale(width, steps: int):
    """A bf16 step that spans `width` in `steps` steps: rounded up, 1 for a constant vector, and never so small that dividing by it overflows."""
    return _round_to_bf16(jnp.where(width > 0, jnp.maximum(width / steps * (1 + 2**-8), LEAST), 1.0))


@dataclasses.dataclass(frozen=True)
class Int8(Codec):
    """Signed 8-bit codes with one bf16 scale per vector: x ≈ scale · code, code in -127…127."""

    def encode(self, x):
        x = x.astype(jnp.float32)
        scale = _scale(jnp.abs(x).max(-1, keepdims=True), 127)
        return {"codes": jnp.round(x / scale).astype(jnp.int8), "scale": scale.astype(jnp.bfloat16)}

    def read(self, stored):
        return stored["codes"].astype(jnp.float32) * stored["scale"].astype(jnp.float32)

    def bound(self, stored):
        return 0.501 * stored["scale"].astype(jnp.float32)

    def nbytes(self, width):
        return width + 2


@dataclasses.dataclass(frozen=True)
class Int4(Codec):
    """Unsigned 4-bit codes with a bf16 scale and a bf16 low end per vector: x ≈ low + scale · code, code in 0…15.

    Two codes a byte: channel j in the low nibble, channel j + H/2 in the high one, so that unpacking needs no interleave.
    A `turned` vector was multiplied by a Walsh-Hadamard matrix, which spreads an outlier channel over all
    (QuaRot, Ashkboos et al. 2024, §4).
    """

    turned: bool = False

    def encode(self, x):
        x = self.turn(x.astype(jnp.float32))
        low = _round_to_bf16(x.min(-1, keepdims=True))
        scale = _scale(x.max(-1, keepdims=True) - low, 15)
        codes = jnp.clip(jnp.round((x - low) / scale), 0, 15).astype(jnp.uint8)
        first, second = jnp.split(codes, 2, -1)
        return {"codes": first | (second << 4), "scale": scale.astype(jnp.bfloat16), "low": low.astype(jnp.bfloat16)}

    def read(self, stored):
        codes = jnp.concatenate([stored["codes"] & 15, stored["codes"] >> 4], -1).astype(jnp.float32)
        return codes * stored["scale"].astype(jnp.float32) + stored["low"].astype(jnp.float32)

    def bound(self, stored):
        scale, low = stored["scale"].astype(jnp.float32), stored["low"].astype(jnp.float32)
        return 0.501 * scale + jnp.abs(low) * 2**-8  # the low end is rounded to bf16's eight significant bits

    def nbytes(self, width):
        if width % 2 or (self.turned and width & (width - 1)):
            raise BadInput(
                f"{self.name} needs a head width that is {'a power of two' if self.turned else 'even'}, not {width}"
            )
        return width // 2 + 4

    def turn(self, x):
        # On a GPU the products would otherwise be rounded to TF32's eleven bits.
        return jnp.matmul(x.astype(jnp.float32), _hadamard(x.shape[-1]), precision="highest") if self.turned else x


@dataclasses.dataclass(frozen=True)
class Fp8(Codec):
    """Floating-point codes of 8 bits (e4m3) with one bf16 scale per vector: x ≈ scale · code, |code| up to 448 (Micikevicius et al. 2022)."""

    def encode(self, x):
        x = x.astype(jnp.float32)
        scale = _scale(jnp.abs(x).max(-1, keepdims=True), 448)
        return {"codes": (x / scale).astype(jnp.float8_e4m3fn), "scale": scale.astype(jnp.bfloat16)}

    def read(self, stored):
        return stored["codes"].astype(jnp.float32) * stored["scale"].astype(jnp.float32)

    def bound(self, stored):
        largest = jnp.abs(stored["codes"].astype(jnp.float32)).max(-1, keepdims=True)
        return (largest * 2**-4 + 2**-10) * stored["scale"].astype(jnp.float32)

    def nbytes(self, width):
        return width + 2


@dataclasses.dataclass(frozen=True)
class NVFP4(Codec):
    """4-bit floats (e2m1), an e4m3 scale for every 16 channels, and a bf16 scale per vector: x ≈ scale · scales[c // 16] · code.

    A head narrower than 32 has two blocks. Codes are packed as in Int4: a sign bit over the index of 0, ½, 1, 1½, 2, 3, 4, 6.
    (NVIDIA's NVFP4 has its outer scale per tensor, which a cache cannot know before its last token.)
    """

    def encode(self, x):
        x = x.astype(jnp.float32)
        scale = _scale(jnp.abs(x).max(-1, keepdims=True), 6 * 448)
        blocks = x.reshape(*x.shape[:-1], -1, _block(x.shape[-1])) / scale[..., None]
        scales = (jnp.abs(blocks).max(-1, keepdims=True) / 6).astype(jnp.float8_e4m3fn)
        divisor = scales.astype(jnp.float32)
        units = (blocks / jnp.where(divisor > 0, divisor, 1)).reshape(x.shape)
        levels = sum((jnp.abs(units) > middle).astype(jnp.uint8) for middle in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
        first, second = jnp.split(levels | (units < 0).astype(jnp.uint8) << 3, 2, -1)
        return {"codes": first | (second << 4), "scale": scale.astype(jnp.bfloat16), "scales": scales[..., 0]}

    def read(self, stored):
        codes = jnp.concatenate([stored["codes"] & 15, stored["codes"] >> 4], -1)
        level = (codes & 7).astype(jnp.float32)
        size = (level + jnp.maximum(level - 4, 0) + 2 * jnp.maximum(level - 6, 0)) / 2
        values = jnp.where(codes >= 8, -size, size)
        scales = jnp.repeat(stored["scales"].astype(jnp.float32), _block(values.shape[-1]), -1)
        return values * scales * stored["scale"].astype(jnp.float32)

    def bound(self, stored):
        # Half the step from 4 to 6, and what the rounding of a block's scale to a multiple of 2⁻⁹ can cut off.
        largest = stored["scales"].astype(jnp.float32).max(-1, keepdims=True)
        return (largest + 6 * 2**-10) * 1.001 * stored["scale"].astype(jnp.float32)

    def nbytes(self, width):
        if width % 2 or width > 32 and width % 32:
            raise BadInput(f"{self.name} needs an even head width up to 32 or a multiple of 32, not {width}")
        return width // 2 + width // _block(width) + 2


def _block(head_dim: int) -> int:
    """Channels under one scale."""
    return min(16, head_dim // 2)


@functools.lru_cache
def _hadamard(head_dim: int):
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < head_dim:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return (matrix / head_dim**0.5).astype("float32")


f32 = Plain("f32", "float32")
bf16 = Plain("bf16", "bfloat16")
int8 = Int8("int8")
int4 = Int4("int4")
int4h = Int4("int4h", turned=True)
fp8 = Fp8("fp8")
nvfp4 = NVFP4("nvfp4")

CODECS = {codec.name: codec for codec in (f32, bf16, fp8, int8, int4, int4h, nvfp4)}
