"""The kernels that are checked and timed, each at the shapes of models that are in use."""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvcascade.cache.codec import CODECS
from kvcascade.eval.kernels import two_kernel
from kvcascade.kernels import activation, activation_mosaic, aot, backend, pages
from kvcascade.kernels.backend import Implementation
from kvcascade.kernels.decode import decode
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.nonlinear import Inputs
from kvcascade.kernels.slots import Codecs, Entry, Slots
from kvcascade.kernels.write import exchange


class Program(NamedTuple):
    """A function of arrays, and what makes arrays for it."""

    call: Callable
    arguments: Callable[[], tuple[Any, ...]]
    units: int
    """How many of the case's units it works on."""
    aside: int = 0
    """Bytes of its arguments and results that are not touched, or that another way to do the same would not have."""
    donated: tuple[int, ...] = ()
    """Which arguments are written in place."""

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The arguments by shape and type."""
        return jax.eval_shape(self.arguments)

    @property
    def floor(self) -> int:
        """Bytes if every argument is read once and every result written once."""
        return nbytes(self.shapes) + nbytes(jax.eval_shape(self.call, *self.shapes)) - self.aside


def nbytes(tree) -> int:
    """Bytes of all arrays in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape, by one implementation."""

    operation: str
    shape: str
    implementation: Implementation
    build: Callable[[bool], Program]
    """Makes the program: a small one, in which one row and one KV head stand for all, or one of the size that is in use."""
    unit: str
    """What instructions are counted per."""
    most: float
    """How many times its floor the program may move."""
    turn: int = 0
    """Units that a block works on in one turn of its loop; 0 without a loop."""
    peer: Callable[[bool], Program] | None = None
    """The same by XLA."""

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.operation}, {self.shape}, {self.implementation}"


# KV heads, query heads of each, head width: SmolLM2-135M, Llama-3-8B, Phi-2, and a group of eight at Phi-3-mini's width.
HEADS = ((3, 3, 64), (8, 4, 128), (32, 1, 80), (4, 8, 96))
SLOTS = 4096
BATCH = 8
CODEC_NAMES = ("bf16", "fp8", "int8", "int4", "nvfp4")
LOW = ("planes", "int3", "int2", "lloyd4h", "lloyd3h", "lloyd2h")
"""Codecs that Triton alone reads on a GPU, and XLA writes."""
# Rows of a step's tokens and MLP width, small and in use.
HIDDEN = {False: (64, 1024), True: (8192, 4096)}
RATE = 0.1


@functools.cache
def cases() -> dict[str, Case]:
    """All of them by name. Raises `aot.NotInstalled` without Triton."""
    if not importlib.util.find_spec("triton"):
        raise aot.NotInstalled(aot.MISSING)
    return {case.name: case for case in (*_decoding(), *_filling(), *_activations())}


def _decoding() -> Iterator[Case]:
    from kvcascade.kernels import decode_mosaic, decode_triton

    assert decode_mosaic.TILE == decode_triton.TILE
    for codec in (*CODEC_NAMES, *LOW):
        for heads in HEADS:
            if codec in ("fp8", "nvfp4", *LOW) and heads not in HEADS[:2]:
                continue
            shape = f"{codec}, H {heads[2]}, G {heads[1]}"
            turn = decode_triton.TILE * 2 * CODECS[codec].nbytes(heads[2])
            # Under `observed` the logits are written, and read again for the mass once all tiers have been seen.
            ways = [("decode", 1.1, functools.partial(_decode, codec, *heads, False))]
            if heads == HEADS[1] and codec not in LOW:
                ways.append(("decode observed", 1.45, functools.partial(_decode, codec, *heads, True)))
                ways.append(("decode paged", 1.1, functools.partial(_paged, codec, *heads)))
            for operation, most, build in ways:
                peer = functools.partial(build, "xla")
                for name in ("triton",) if operation == "decode paged" or codec in LOW else ("mosaic", "triton"):
                    yield Case(operation, shape, name, functools.partial(build, name), "KV byte", most, turn, peer)


def _slots(codec: str, *shape: int) -> Slots:
    """Full slots of random vectors; the shape is that of the vectors."""
    keys = jax.random.split(jax.random.key(0))
    k, v = (CODECS[codec].encode(jax.random.normal(key, shape)) for key in keys)
    return Slots(k, v, jnp.broadcast_to(jnp.arange(shape[2], dtype=jnp.int32), shape[:3]))


def _decode(codec, kv_heads, group, head_dim, observed, implementation, in_use) -> Program:
    B, K, form = BATCH if in_use else 1, kv_heads if in_use else 1, CODECS[codec]

    def arguments():
        q_BNH = jax.random.normal(jax.random.key(1), (B, K * group, head_dim))
        return q_BNH, jnp.full(B, SLOTS, jnp.int32), _slots(codec, B, K, SLOTS, head_dim)

    heads, held = Heads(K * group, K, head_dim), Codecs(form, form)
    call = lambda q, now, slots: decode(q, now, [(slots, held)], heads, observed, implementation=implementation)
    return Program(call, arguments, 2 * B * K * SLOTS * form.nbytes(head_dim))


def _paged(codec, kv_heads, group, head_dim, implementation, in_use) -> Program:
    B, K, form, size = BATCH if in_use else 1, kv_heads if in_use else 1, CODECS[codec], 64
    heads, held = Heads(K * group, K, head_dim), Codecs(form, form)

    def arguments():
        q_BNH = jax.random.normal(jax.random.key(1), (B, K * group, head_dim))
        blocks = B * SLOTS // size
        table_BW = jax.random.permutation(jax.random.key(2), blocks).reshape(B, -1).astype(jnp.int32)
        keys = jax.random.split(jax.random.key(0))
        k, v = (form.encode(jax.random.normal(key, (blocks, 1, K, size, head_dim))) for key in keys)
        return q_BNH, jnp.full(B, SLOTS - 1, jnp.int32), table_BW, pages.Pool(k, v)

    def call(q, now, table, pool):
        rows = jnp.arange(B, dtype=jnp.int32)
        return pages.attend(q[:, None], now[:, None], rows, table, pool, 0, held, heads, implementation=implementation)[
            0
        ]

    return Program(call, arguments, 2 * B * K * SLOTS * form.nbytes(head_dim))


def _filling() -> Iterator[Case]:
    for codec in CODEC_NAMES:
        build = functools.partial(_append, codec, *HEADS[1])
        ours, peer = functools.partial(build, "triton"), functools.partial(build, "xla")
        yield Case("append", f"{codec}, H {HEADS[1][2]}", "triton", ours, "slot", 1.1, peer=peer)
    for heads in HEADS[:2]:
        build = functools.partial(_mass, *heads)
        # Keys and queries come again for every block of the others: what counts is that it does not get worse.
        yield Case("prefill mass", f"H {heads[2]}, G {heads[1]}", "triton", build, "query and key", math.inf)


def _append(codec, kv_heads, group, head_dim, implementation, in_use) -> Program:
    B, K, form = BATCH if in_use else 1, kv_heads if in_use else 1, CODECS[codec]

    def arguments():
        k, v = (jax.random.normal(jax.random.key(i), (B, K, 1, head_dim)) for i in (3, 4))
        entry = Entry(k, v, jnp.full((B, K, 1), SLOTS, jnp.int32))
        return _slots(codec, B, K, SLOTS, head_dim), entry, jax.random.uniform(jax.random.key(5), (B, K, SLOTS + 1))

    held = Codecs(form, form)
    call = lambda slots, entry, priority: exchange(slots, entry, priority, held, False, implementation=implementation)
    # Of the vectors in slots one per head is read and written; of the positions, which decide between equals, all are read.
    untouched = B * K * (SLOTS - 1)
    aside = untouched * (2 * 2 * form.nbytes(head_dim) + 4)
    return Program(call, arguments, B * K * SLOTS, aside=aside, donated=(0,))


def _mass(kv_heads, group, head_dim, in_use) -> Program:
    from kvcascade.kernels import prefill_triton

    B, K, T = (BATCH, kv_heads, SLOTS) if in_use else (1, 1, 512)

    def arguments():
        q, k = (jax.random.normal(jax.random.key(6), (B, T, N, head_dim), jnp.bfloat16) for N in (K * group, K))
        return q, k, jnp.full(B, T, jnp.int32)

    heads = Heads(K * group, K, head_dim)
    call = lambda q, k, length: prefill_triton.mass(q, k, length, heads, 0, backend.capability() is None)
    return Program(call, arguments, B * K * group * T * T // 2)


def _activations() -> Iterator[Case]:
    for kind in ("swiglu", "gelu"):
        for forward in (True, False):
            operation = f"{kind} {'forward' if forward else 'backward'}"
            shape = f"dropout {RATE}" + (", bias" if kind == "gelu" else "")
            # Every block reads the two words of the key. A bias is read once for every 32 rows, and its gradient summed over as many.
            most = 1.001 if kind == "swiglu" else 1.1
            build = functools.partial(_activation, kind, forward)
            peer = functools.partial(build, "xla")
            for name in ("mosaic", "triton"):
                yield Case(operation, shape, name, functools.partial(build, name), "element", most, peer=peer)
            yield Case(operation, shape, "xla", peer, "element", math.inf)
            yield Case(
                f"{operation} in two", shape, "xla", functools.partial(_in_two, kind, forward), "element", math.inf
            )


def _hidden(kind, in_use, arrays: int):
    """Inputs of a backward pass, as many arrays of the activation's shape, and the dropout's words."""
    rows, columns = HIDDEN[in_use]
    wide = [jax.random.normal(jax.random.key(i), (rows, columns), jnp.bfloat16) for i in range(arrays)]
    gate, bias = (wide.pop(), None) if kind == "swiglu" else (None, jnp.zeros(columns))
    return Inputs(wide[0], gate, bias, None, jnp.arange(2, dtype=jnp.uint32)), *wide[1:]


def _activation(kind, forward, implementation, in_use) -> Program:
    def call(*arguments):
        if implementation == "xla":
            return (activation.forward if forward else activation.backward)(kind, RATE, *arguments)
        from kvcascade.kernels import activation_triton

        passes = {"mosaic": activation_mosaic, "triton": activation_triton}[implementation]
        return (passes.forward if forward else passes.backward)(
            kind, RATE, *arguments, interpret=backend.capability() is None
        )

    arguments = functools.partial(_hidden, kind, in_use, 1 + (kind == "swiglu") + (not forward))
    return Program(call, arguments, math.prod(HIDDEN[in_use]))


def _in_two(kind, forward, in_use) -> Program:
    """The same with the dropout as a kernel of its own, and its mask in memory."""

    def of_forward(inputs):
        hidden = jax.lax.optimization_barrier(two_kernel.activate(kind, inputs))
        return two_kernel.drop(RATE, hidden, inputs.words)

    def of_backward(inputs, dout, mask):
        dhidden = jax.lax.optimization_barrier(two_kernel.drop_backward(RATE, mask, dout))
        return two_kernel.activate_backward(kind, inputs, dhidden)

    def arguments():
        some = _hidden(kind, in_use, 1 + (kind == "swiglu") + (not forward))
        return some if forward else (*some, jnp.ones(HIDDEN[in_use], bool))

    elements = math.prod(HIDDEN[in_use])
    return Program(of_forward if forward else of_backward, arguments, elements, aside=elements)
