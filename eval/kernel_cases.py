"""The kernels that are checked and timed, each at the shapes of models that are in use."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvcascade.cache.codec import CODECS
from kvcascade.kernels.backend import Implementation
from kvcascade.kernels.decode import decode
from kvcascade.kernels.slots import Slots


class Program(NamedTuple):
    """A function of arrays, and what makes arrays for it."""

    call: Callable
    arguments: Callable[[], tuple[Any, ...]]
    units: int
    """How many of the case's units it works on."""

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The arguments by shape and type."""
        return jax.eval_shape(self.arguments)

    @property
    def floor(self) -> int:
        """Bytes if every argument is read once and every result written once."""
        return nbytes(self.shapes) + nbytes(jax.eval_shape(self.call, *self.shapes))


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape, by one implementation."""

    operation: str
    shape: str
    implementation: Implementation
    build: Callable[[int, Implementation], Program]
    """Makes the program for a batch of so many rows."""
    unit: str
    """What instructions are counted per."""
    most: float
    """How many times the floor it may move."""
    turn: int = 0
    """Units that a block works on in one turn of its loop; 0 without a loop."""

    @property
    def name(self) -> str:
        return f"{self.operation} {self.shape}, {self.implementation}"

    def program(self, batch: int = 1) -> Program:
        return self.build(batch, self.implementation)


# KV heads, query heads of each, head width: SmolLM2-135M, Llama-3-8B, Phi-2, Phi-3-mini's width with a group of eight.
HEADS = ((3, 3, 64), (8, 4, 128), (32, 1, 80), (4, 8, 96))
SLOTS = 4096


def _decode(codec: str, kv_heads: int, group: int, head_dim: int):
    form = CODECS[codec]

    def build(batch: int, implementation: Implementation) -> Program:
        # One row and head stand for all where bytes are counted; a batch has the model's heads.
        heads = 1 if batch == 1 else kv_heads

        def arguments():
            q_key, *keys = jax.random.split(jax.random.key(0), 3)
            k, v = (form.encode(jax.random.normal(key, (batch, heads, SLOTS, head_dim))) for key in keys)
            pos_BKS = jnp.broadcast_to(jnp.arange(SLOTS, dtype=jnp.int32), (batch, heads, SLOTS))
            q_BNH = jax.random.normal(q_key, (batch, heads * group, head_dim))
            return q_BNH, jnp.full(batch, SLOTS, jnp.int32), Slots(k, v, pos_BKS, None)

        call = lambda q_BNH, now_B, slots: decode(q_BNH, now_B, [(slots, form)], True, implementation=implementation)
        return Program(call, arguments, 2 * batch * heads * SLOTS * form.nbytes(head_dim))

    return build


@functools.cache
def cases() -> dict[str, Case]:
    """All of them by name; needs Triton."""
    return {case.name: case for case in _cases()}


def _cases() -> Iterator[Case]:
    from kvcascade.kernels import decode_triton

    for codec in ("bf16", "fp8", "int8", "int4", "nvfp4"):
        for kv_heads, group, head_dim in HEADS:
            if codec == "nvfp4" and head_dim % 32:
                continue
            build = _decode(codec, kv_heads, group, head_dim)
            turn = decode_triton.TILE * 2 * CODECS[codec].nbytes(head_dim)
            yield Case(f"decode {codec}", f"H {head_dim} G {group}", "triton", build, "KV byte", 1.1, turn)
