"""What a set of slots is to a kernel: arrays, and the codecs that they are stored by."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

type Stored = dict[str, Array]
"""The arrays that hold encoded vectors: same leading axes as the vectors, the last one is the codec's own."""


@runtime_checkable
class Pair(Protocol):
    """Stored keys and values."""

    @property
    def k(self) -> Stored: ...

    @property
    def v(self) -> Stored: ...


def payload(stored: Stored) -> Array:
    """The largest of the arrays of stored vectors: their codes, or the values of a codec that keeps them as they are."""
    return max(
        (x for name, x in stored.items() if name.startswith(("values", "codes", "high"))), key=lambda x: x.shape[-1]
    )


def format_of(stored: Stored) -> str | None:
    """The name under which the kernels of GPUs know a format; None for one that they do not know."""
    known = {
        ("bfloat16", "values"): "bf16",
        ("int8", "codes scale"): "int8",
        ("float8_e4m3fn", "codes scale"): "fp8",
        ("uint8", "codes low scale"): "int4",
        ("uint8", "codes scale scales"): "nvfp4",
        ("uint8", "codes fine low scale"): "planes",
        ("uint8", "codes2 fine low scale"): "int3",
        ("uint8", "codes2 low scale"): "int2",
        ("uint8", "codes scale"): "lloyd4",
        ("uint8", "codes2 fine scale"): "lloyd3",
        ("uint8", "codes2 scale"): "lloyd2",
    }
    return known.get((payload(stored).dtype.name, " ".join(sorted(stored))))


def unknown(stored: Stored) -> str:
    """What a kernel says of vectors in a format that it does not know."""
    return f"no kernel for slots of {', '.join(f'{name} {x.dtype}' for name, x in stored.items())}"


@dataclasses.dataclass(frozen=True)
class Codec:
    """Writes vectors of H numbers and reads them back; a subclass says in which bits (cache/codec.py)."""

    name: str
    basis: str = dataclasses.field(default="", kw_only=True)
    """What vectors are taken to before they are encoded, by whoever calls (cache/basis.py); empty: nothing."""

    turned = False
    """Whether vectors are stored in the Walsh-Hadamard basis."""
    bits = 0
    """Of a code, where several are packed in a byte."""
    fine = 0
    """The lowest of them, which lie in a plane of their own."""
    skipped = 0
    """Bits below them that a code has and nobody reads."""

    @property
    def levels(self) -> Sequence[float]:
        """What packed codes stand for, in rising order, times a scale; empty: themselves."""
        return ()

    def encode(self, x: Float[Array, "*B H"]) -> Stored:
        """Store each vector by itself."""
        raise NotImplementedError

    def read(self, stored: Stored) -> Float[Array, "*B H"]:
        """The stored vectors in the basis that they are stored in, `turn`ed if the codec is."""
        raise NotImplementedError

    def bound(self, stored: Stored) -> Float[Array, "*B 1"]:
        """The largest error that `read` may have against the vector given to `encode`, per element of the stored basis."""
        raise NotImplementedError

    def nbytes(self, width: int) -> int:
        """Bytes per vector of that width, scales included; BadInput for a width that the codec cannot store."""
        raise NotImplementedError

    def turn(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        """Between the model's basis and the stored one; its own inverse. Dot products are the same in both."""
        return x

    def decode(self, stored: Stored) -> Float[Array, "*B H"]:
        """The stored vectors in the model's basis, float32."""
        return self.turn(self.read(stored).astype(jnp.float32))


class Codecs(NamedTuple):
    """How a tier stores keys, and how values."""

    k: Codec
    v: Codec

    def __str__(self) -> str:
        return self.k.name if self.k == self.v else f"{self.k.name}/{self.v.name}"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "pos_BKS", "numbers"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Slots:
    """What a tier holds in one layer: encoded keys and values, the position in each slot (-1: empty), the numbers that its tokens carry."""

    k: Stored
    v: Stored
    pos_BKS: Int[Array, "B K S"]
    numbers: tuple[Float[Array, "B K S"], ...] = ()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "pos_BKT", "numbers"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Entry:
    """Tokens on their way into a tier, per KV head, with the numbers that they carry; position -1 is no token."""

    k: Float[Array, "B K T H"]
    v: Float[Array, "B K T W"]
    pos_BKT: Int[Array, "B K T"]
    numbers: tuple[Float[Array, "B K T"], ...] = ()


type Held = tuple[Slots, Codecs]
"""A tier's slots, and how they are stored."""
