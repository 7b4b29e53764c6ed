"""What a set of slots is to a kernel: arrays, and the format that they are stored in."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

type Stored = dict[str, Array]
"""The arrays that hold encoded vectors: same leading axes as the vectors, the last one is the format's own."""


def payload(stored: Stored) -> Array:
    """The largest of the arrays of stored vectors: their codes, or the values of a format that is kept as it is."""
    return stored["values"] if "values" in stored else stored["codes"]


class Format:
    """How vectors of H numbers are stored."""

    turned = False
    """Whether they are stored in the Walsh-Hadamard basis."""

    def encode(self, x: Float[Array, "*B H"]) -> Stored:
        """Store each vector by itself."""
        raise NotImplementedError

    def read(self, stored: Stored) -> Float[Array, "*B H"]:
        """The stored vectors in the basis that they are stored in, `turn`ed if the format is."""
        raise NotImplementedError

    def turn(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        """Between the model's basis and the stored one; its own inverse. Dot products are the same in both."""
        return x

    def decode(self, stored: Stored) -> Float[Array, "*B H"]:
        """The stored vectors in the model's basis, float32."""
        return self.turn(self.read(stored).astype(jnp.float32))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "pos_BKS", "score_BKS"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Slots:
    """What a tier holds in one layer: encoded keys and values, the position in each slot (-1: empty), the score if one is kept."""

    k: Stored
    v: Stored
    pos_BKS: Int[Array, "B K S"]
    score_BKS: Float[Array, "B K S"] | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "pos_BKT", "score_BKT"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Entry:
    """Tokens on their way into a tier, per KV head; position -1 is no token."""

    k: Float[Array, "B K T H"]
    v: Float[Array, "B K T H"]
    pos_BKT: Int[Array, "B K T"]
    score_BKT: Float[Array, "B K T"]
