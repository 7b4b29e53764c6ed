"""How a vector is written in bits."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Integer

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.levels import normal_levels
from kvcascade.kernels.slots import Codec, Stored


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
class Packed(Codec):
    """Codes of 2, 3, 4 or 8 bits, several in a byte; a subclass says what a code stands for.

    A `turned` vector was multiplied by a Walsh-Hadamard matrix, which spreads an outlier channel over all
    (QuaRot, Ashkboos et al. 2024, §4). The lowest `fine` bits of a code lie in a plane of their own, so that the others can be read alone.
    """

    bits: int = 4
    fine: int = 0
    skipped: int = 0
    turned: bool = False

    def packed(self, codes: Integer[Array, "*B H"]) -> Stored:
        """The planes of codes."""
        planes = {self._name: pack(codes >> self.fine, self.bits - self.fine)}
        return planes | {"fine": pack(codes & (1 << self.fine) - 1, self.fine)} if self.fine else planes

    @property
    def _name(self) -> str:
        """Of the array of codes: a kernel is to know four bits from two without being told."""
        return "high" if self.skipped else "codes" if self.bits - self.fine == 4 else "codes2"

    def unpacked(self, stored: Stored) -> Integer[Array, "*B H"]:
        """The inverse of that."""
        codes = unpack(stored[self._name], self.bits - self.fine).astype(jnp.int32)
        return codes << self.fine | unpack(stored["fine"], self.fine) if self.fine else codes

    def check(self, width: int) -> int:
        """Bytes of a vector's codes; BadInput for a width of which they do not fill whole bytes, or that cannot be turned."""
        planes = [each for each in (self.bits - self.fine, self.fine) if each]
        least = max(8 // each for each in planes)
        if width % least or (self.turned and width & (width - 1)):
            plain = "even" if least == 2 else f"a multiple of {least}"
            what = ("a power of two" + f" from {least} on" * (least > 2)) if self.turned else plain
            raise BadInput(f"{self.name} needs a head width that is {what}, not {width}")
        return width * self.bits // 8

    def turn(self, x):
        # On a GPU the products would otherwise be rounded to TF32's eleven bits.
        return jnp.matmul(x.astype(jnp.float32), _hadamard(x.shape[-1]), precision="highest") if self.turned else x


def pack(codes: Integer[Array, "*B H"], bits: int) -> Integer[Array, "*B W"]:
    """Codes of 1, 2 or 4 bits in bytes.

    Of two or four bits the channels of a byte are H/2 or H/4 apart, the first in the lowest bits, so that unpacking needs no interleave; of
    one bit they follow one another, so that a run of channels is a mask of a processor's.
    """
    each = 8 // bits
    codes = codes.astype(jnp.uint8)
    shape = (-1, each) if bits == 1 else (each, -1)
    parts = codes.reshape(*codes.shape[:-1], *shape)
    parts = jnp.moveaxis(parts, -1 if bits == 1 else -2, 0)
    return functools.reduce(operator.or_, [part << bits * place for place, part in enumerate(parts)])


def unpack(packed: Integer[Array, "*B W"], bits: int) -> Integer[Array, "*B H"]:
    """The inverse of `pack`."""
    parts = [packed >> bits * place & (1 << bits) - 1 for place in range(8 // bits)]
    if bits == 1:
        return jnp.stack(parts, -1).reshape(*packed.shape[:-1], -1)
    return jnp.concatenate(parts, -1)


@dataclasses.dataclass(frozen=True)
class Uniform(Packed):
    """Unsigned codes with a bf16 scale and a bf16 low end per vector: x ≈ low + scale · code, code in 0…2^bits − 1.

    Of a code whose lowest bits are `skipped` the middle of what it may be is taken.
    """

    def encode(self, x):
        x = self.turn(x.astype(jnp.float32))
        most = 2 ** (self.bits + self.skipped) - 1
        low = _round_to_bf16(x.min(-1, keepdims=True))
        scale = _scale(x.max(-1, keepdims=True) - low, most)
        codes = jnp.clip(jnp.round((x - low) / scale), 0, most).astype(jnp.uint8)
        stored = {"scale": scale.astype(jnp.bfloat16), "low": low.astype(jnp.bfloat16)}
        return self.packed(codes >> self.skipped) | stored

    def read(self, stored):
        codes = self.unpacked(stored).astype(jnp.float32) * 2**self.skipped + self._middle
        return codes * stored["scale"].astype(jnp.float32) + stored["low"].astype(jnp.float32)

    def bound(self, stored):
        scale, low = stored["scale"].astype(jnp.float32), stored["low"].astype(jnp.float32)
        # The low end is rounded to bf16's eight significant bits.
        return (self._middle + 0.501) * scale + jnp.abs(low) * 2**-8

    @property
    def _middle(self) -> float:
        return (2**self.skipped - 1) / 2

    def nbytes(self, width):
        return self.check(width) + 4


@dataclasses.dataclass(frozen=True)
class LloydMax(Packed):
    """Codes for the levels that are best for a normal distribution (Max 1960, table I; Lloyd 1982), times a bf16 scale per vector.

    The channels of a vector that was turned are nearly normal, of variance ‖x‖²/H, which is the scale's square: TurboQuant's form for the
    mean square error (Zandieh et al. 2025, arXiv 2504.19874, algorithm 1), with the levels of its limit of a wide head, and without QJL.
    """

    @property
    def levels(self) -> tuple[float, ...]:
        """What codes stand for, in rising order."""
        return normal_levels(self.bits)

    def encode(self, x):
        scale, units = _deviation(self.turn(x.astype(jnp.float32)))
        return self.packed(_nearest(units, self.levels)) | {"scale": scale.astype(jnp.bfloat16)}

    def read(self, stored):
        return jnp.asarray(self.levels, jnp.float32)[self.unpacked(stored)] * stored["scale"].astype(jnp.float32)

    def bound(self, stored):
        width = stored[self._name].shape[-1] * 8 // (self.bits - self.fine)
        return _farthest(width, self.levels) * stored["scale"].astype(jnp.float32)

    def nbytes(self, width):
        return self.check(width) + 2


def _deviation(x):
    """The root mean square of each vector's channels in bf16, and the channels over it."""
    most = jnp.abs(x).max(-1, keepdims=True)
    shares = x / jnp.where(most > 0, most, 1)  # whose squares are neither too large nor too small
    deviation = jnp.maximum(most * jnp.sqrt((shares**2).mean(-1, keepdims=True)), LEAST)
    scale = jnp.where(most > 0, _round_to_bf16(deviation), 0)
    return scale, x / jnp.where(scale > 0, scale, 1)


def _nearest(units, levels: Sequence[float]):
    """The number of the level that is nearest to each."""
    found = np.asarray(levels, np.float32)
    return (units[..., None] > (found[1:] + found[:-1]) / 2).sum(-1).astype(jnp.uint8)


def _farthest(width: int, levels: Sequence[float]) -> float:
    """How far a channel may be from its level, over the vector's deviation: all of a vector may be in one channel, the square root of the width
    times that, of which the outermost level is all that is kept."""
    return max(width**0.5 * 1.01 - levels[-1], max(np.diff(levels)) / 2) * 1.001


@dataclasses.dataclass(frozen=True)
class Banded(Codec):
    """Codes of one more bit for the first quarter of channels, of one less for the last, and a bf16 scale per vector; levels are Lloyd–Max's.

    In a basis of principal components, each over its deviation, the largest first, this is KVTC's transform (Staniszewski & Łańcucki 2025,
    arXiv 2511.01815, §3), which chooses the bits of each head's channels by a dynamic program; here all heads have the same.
    """

    bits: int
    """Of a code, on average: 2, 3 or 4."""

    def _bands(self, width: int) -> list[tuple[slice, int]]:
        """Channels and their bits."""
        quarter = width // 4
        parts = (0, quarter, self.bits + 1), (quarter, 3 * quarter, self.bits), (3 * quarter, width, self.bits - 1)
        return [(slice(start, stop), bits) for start, stop, bits in parts]

    def encode(self, x):
        scale, units = _deviation(x.astype(jnp.float32))
        stored = {"scale": scale.astype(jnp.bfloat16)}
        for some, bits in self._bands(x.shape[-1]):
            codes = _nearest(units[..., some], normal_levels(bits))
            low = bits % 2 if bits > 1 else 0  # three and five bits are a plane of two or four, and one of one
            stored[f"codes{bits}"] = pack(codes >> low, bits - low)
            if low:
                stored[f"low{bits}"] = pack(codes & 1, 1)
        return stored

    def read(self, stored):
        found = []
        for bits in (self.bits + 1, self.bits, self.bits - 1):
            low = stored.get(f"low{bits}")
            codes = unpack(stored[f"codes{bits}"], bits - (low is not None))
            codes = codes if low is None else codes << 1 | unpack(low, 1)
            found.append(jnp.asarray(normal_levels(bits), jnp.float32)[codes])
        return jnp.concatenate(found, -1) * stored["scale"].astype(jnp.float32)

    def bound(self, stored):
        width = stored[f"codes{self.bits}"].shape[-1] * 8 // (self.bits - self.bits % 2) * 2
        farthest = max(_farthest(width, normal_levels(bits)) for _, bits in self._bands(width))
        return farthest * stored["scale"].astype(jnp.float32)

    def nbytes(self, width):
        if width % 32:
            raise BadInput(f"{self.name} needs a head width that is a multiple of 32, not {width}")
        return width * self.bits // 8 + 2


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

    A head narrower than 32 has two blocks. Codes are packed as in `pack`: a sign bit over the index of 0, ½, 1, 1½, 2, 3, 4, 6.
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
fp8 = Fp8("fp8")
nvfp4 = NVFP4("nvfp4")
planes = Uniform("planes", bits=8, fine=4)
high = Uniform("high", bits=4, skipped=4)
int4 = Uniform("int4")
int3 = Uniform("int3", bits=3, fine=1)
int2 = Uniform("int2", bits=2)
lloyd4 = LloydMax("lloyd4")
lloyd3 = LloydMax("lloyd3", bits=3, fine=1)
lloyd2 = LloydMax("lloyd2", bits=2)
kvtc4, kvtc3, kvtc2 = (Banded(f"kvtc{bits}", bits=bits) for bits in (4, 3, 2))

BASES = {
    "h": "turned by a Hadamard matrix",
    "r": "signs drawn by lot, then a Hadamard matrix (TurboQuant's random rotation)",
    "m": "less the head's mean, then a Hadamard matrix; of a calibration",
    "s": "less the head's mean, each channel over its deviation; of a calibration",
    "o": "the eigenvectors of what attention reads, then a Hadamard matrix (OSCAR); of a calibration",
    "p": "less the head's mean, principal components, each over its deviation, the largest first (KVTC); of a calibration",
}
"""What the last letter of a codec's name says of the basis that it encodes in (cache/basis.py)."""
TURNED = "hrmo"
BANDED = "p"
"""The one in which channels come in the order of their importance."""


def in_basis[C: Packed | Banded](codec: C, letter: str) -> C:
    """The codec in a basis."""
    changed: dict[str, Any] = {"name": codec.name + letter, "basis": "" if letter == "h" else letter}
    return dataclasses.replace(codec, **changed | ({"turned": True} if letter in TURNED else {}))


int4h, int3h, int2h = (in_basis(codec, "h") for codec in (int4, int3, int2))
lloyd4h, lloyd3h, lloyd2h = (in_basis(codec, "h") for codec in (lloyd4, lloyd3, lloyd2))


def has_high(codec: Codec) -> bool:
    """Whether the high bits of its codes lie in a plane of their own, as in `planes`."""
    return (codec.bits, codec.fine) == (8, 4)


def coarse(codec: Codec, stored: Stored) -> tuple[Codec, Stored]:
    """What the high plane alone says of vectors in `planes`: half of the bytes, and nothing is copied; BadInput for another codec."""
    if not has_high(codec):
        raise BadInput(f"{codec.name} has no plane of high bits, as `planes` has")
    assert isinstance(codec, Packed)
    kept = {"high" if name == "codes" else name: x for name, x in stored.items() if name != "fine"}
    return dataclasses.replace(high, turned=codec.turned, basis=codec.basis), kept


CODECS = {
    codec.name: codec
    for codec in (f32, bf16, fp8, int8, planes, int4, int4h, nvfp4, int3, int3h, int2, int2h, lloyd4h, lloyd3h, lloyd2h)
}
"""Those that need to know nothing of a model."""
NAMES = CODECS | {
    codec.name + letter: in_basis(codec, letter)
    for letter in BASES
    for codec in ((kvtc4, kvtc3, kvtc2) if letter == BANDED else (planes, int4, int3, int2, lloyd4, lloyd3, lloyd2))
}
"""All, by their names."""
