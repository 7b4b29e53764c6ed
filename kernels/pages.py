"""Slots in blocks of a pool that rows share (PagedAttention, Kwon et al. 2023): written and attended to through a table.

A block holds so many consecutive tokens of one row in all layers. The token at position p of a row stands in block table[row, p / Z],
slot p % Z: nothing else has to be stored, and what stands behind the newest position is never seen.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvcascade.kernels import native
from kvcascade.kernels.backend import Implementation, Kernel, run
from kvcascade.kernels.decode import NativeTier, of_splits, on_cpu, one_width, triton_refuses
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import Partial, Weights, attend_each, joined
from kvcascade.kernels.slots import Codecs, Held, Slots, Stored, payload


class Pool(NamedTuple):
    """Encoded keys and values in blocks: arrays [P, L, K, Z, …], a block all of one index."""

    k: Stored
    v: Stored

    @classmethod
    def empty(cls, codecs: Codecs, blocks: int, layers: int, size: int, heads: Heads) -> "Pool":
        """So many blocks of so many slots in each of the layers, of zeros."""

        def zeros(codec, width):
            like = jax.eval_shape(lambda: codec.encode(jnp.zeros((blocks, layers, heads.kv, size, width))))
            return {name: jnp.zeros(x.shape, x.dtype) for name, x in like.items()}

        return cls(zeros(codecs.k, heads.width), zeros(codecs.v, heads.value_width))

    @property
    def size(self) -> int:
        """Slots of a block, Z."""
        return payload(self.k).shape[3]


@jax.named_scope("write")
def write(
    pool: Pool,
    k_NKH: Float[Array, "N K H"],
    v_NKW: Float[Array, "N K W"],
    slot_N: Int[Array, " N"],
    layer: int,
    codecs: Codecs,
    implementation: Implementation | None = None,
) -> Pool:
    """Store one layer's keys and values of tokens in the slots of these numbers, counted through all blocks; -1 is none.

    No two tokens may have one slot. `native` writes in place.
    """
    reference, by_cpu = functools.partial(_write, layer, codecs), functools.partial(_write_native, layer, codecs)
    kernels = {"native": native.kernel(by_cpu, lambda pool, *_: native.unread(pool))}
    axes = "__K _K _K _ -> __K"
    return run(implementation, reference, kernels, pool, k_NKH, v_NKW, slot_N, axes=axes)


def _write(layer, codecs: Codecs, pool: Pool, k_NKH, v_NKW, slot_N) -> Pool:
    blocks, _, _, size = payload(pool.k).shape[:4]
    block_N, offset_N = jnp.where(slot_N < 0, blocks, slot_N // size), slot_N % size

    def put(held: Stored, codec, x_NKH):
        new = codec.encode(x_NKH.astype(jnp.float32))
        return {name: held[name].at[block_N, layer, :, offset_N].set(new[name], mode="drop") for name in held}

    return Pool(put(pool.k, codecs.k, k_NKH), put(pool.v, codecs.v, v_NKW))


def _write_native(layer, codecs: Codecs, pool: Pool, k_NKH, v_NKW, slot_N) -> Pool:
    held = [*native.arrays(pool.k), *native.arrays(pool.v)]
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in held]
    aliases = {3 + index: index for index in range(len(held))}
    call = jax.ffi.ffi_call("kvcascade_write", like, input_output_aliases=aliases)
    results = call(
        k_NKH.astype(jnp.float32),
        v_NKW.astype(jnp.float32),
        slot_N.astype(jnp.int32),
        *held,
        **native.formats((pool.k, pool.v), codecs),
        layer=np.int64(layer),
    )
    return Pool(native.named(pool.k, results[: len(pool.k)]), native.named(pool.v, results[len(pool.k) :]))


@jax.named_scope("attention")
def attend(
    q_BTNH: Float[Array, "B T N H"],
    q_pos_BT: Int[Array, "B T"],
    row_B: Int[Array, " B"],
    table_RW: Int[Array, "R W"],
    pool: Pool,
    layer: int,
    codecs: Codecs,
    heads: Heads,
    limit: int | None = None,
    beside: Sequence[Held] = (),
    observed: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Partial, list[Weights]]:
    """`partial.attend` of queries to what their rows hold in blocks, at most the first `limit` positions, and beside them in slots of their own.

    A line of queries is of one row, and several lines may be of one, in any order; consecutive queries of a row share what is read. A block
    of -1 holds nothing, and a query of position -1 sees nothing. The weights are those of the slots `beside`.
    """
    limit = min(limit or pool.size * table_RW.shape[1], pool.size * table_RW.shape[1])
    own, theirs = tuple(slots for slots, _ in beside), tuple(each for _, each in beside)
    reference, by_cpu, by_gpu = (
        functools.partial(each, layer, codecs, theirs, heads, limit, observed) for each in (_xla, _native, _triton)
    )
    kernels = {
        "native": native.kernel(by_cpu, lambda *arguments: one_width(heads) or _native_refuses(*arguments)),
        "triton": Kernel(by_gpu, lambda *arguments: one_width(heads) or triton_refuses(arguments[4], *arguments[5])),
    }
    axes = "B_K B B _ __K _K -> B_K B_K B_K BK"
    found = run(implementation, reference, kernels, q_BTNH, q_pos_BT, row_B, table_RW, pool, own, axes=axes)
    return Partial(*found[:3]), found[3]


type Found = tuple[Float[Array, "B T N W"], Float[Array, "B T N"], Float[Array, "B T N"], list[Weights]]
"""A partial's arrays and the weights."""


def _xla(layer, codecs, theirs, heads, limit, observed, q_BTNH, q_pos_BT, row_B, table_RW, pool, own) -> Found:
    row_B = row_B.clip(0)
    table_BW = table_RW[row_B, : -(-limit // pool.size)]

    def of_rows(x):
        x = jnp.moveaxis(x[table_BW.clip(0), layer], 1, 2)  # [B, K, W, Z, …]
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :limit]

    k, v = jax.tree.map(of_rows, (pool.k, pool.v))
    index_S = jnp.arange(limit, dtype=jnp.int32)
    pos_BS = jnp.where(jnp.repeat(table_BW >= 0, pool.size, axis=1)[:, :limit], index_S, -1)
    held = [(Slots(k, v, jnp.broadcast_to(pos_BS[:, None], payload(k).shape[:3])), codecs)]
    held += [(jax.tree.map(lambda x: x[row_B], slots), each) for slots, each in zip(own, theirs, strict=True)]
    found = attend_each(q_BTNH, q_pos_BT, held, heads, observed)
    part, weights = joined([(found[0][0], []), *found[1:]])
    return part.out_BTNW, part.max_BTN, part.sum_BTN, weights


def _native(layer, codecs, theirs, heads, limit, observed, q_BTNH, q_pos_BT, row_B, table_RW, pool, own) -> Found:
    tiers = [NativeTier(table_RW, pool.k, pool.v, codecs, place=(pool.size, layer, limit))]
    tiers += [NativeTier(x.pos_BKS, x.k, x.v, each, observed) for x, each in zip(own, theirs, strict=True)]
    T = q_pos_BT.shape[1]
    found = on_cpu(tiers, heads, *_flat(q_BTNH, q_pos_BT), jnp.repeat(row_B, T))
    return _lines(T, *found)


def _flat(q_BTNH, q_pos_BT):
    """Each query as a line of its own."""
    return q_BTNH.reshape(-1, *q_BTNH.shape[2:]), q_pos_BT.reshape(-1)


def _lines(T: int, out, top, total, weights) -> Found:
    """The inverse of that, for what was found."""
    lines = lambda x: x.reshape(-1, T, *x.shape[1:])
    return lines(out), lines(top), lines(total), [lines(each).transpose(0, 2, 3, 1, 4) for each in weights]


def _native_refuses(q, q_pos, row, table, pool: Pool, own) -> str | None:
    size = pool.size
    if size % 16 or size & (size - 1):
        return f"made for blocks of 16, 32, 64, … tokens, not of {size}"
    return native.unread(pool, *own)


def _triton(
    layer, codecs, theirs, heads, limit, observed, q_BTNH, q_pos_BT, row_B, table_RW, pool, own, interpret
) -> Found:
    from kvcascade.kernels import decode_triton

    T = q_pos_BT.shape[1]
    row_N, (q_NNH, q_pos_N) = jnp.repeat(row_B.clip(0), T), _flat(q_BTNH, q_pos_BT)
    blocks = decode_triton.Blocks(table_RW[row_N], layer, limit)
    held = [(pool, codecs, blocks, False)]
    held += [
        (jax.tree.map(lambda x: x[row_N], slots), each, None, observed) for slots, each in zip(own, theirs, strict=True)
    ]
    found = [
        decode_triton.attend(each.k.turn(q_NNH), q_pos_N, slots, heads, wanted, interpret, blocks)
        for slots, each, blocks, wanted in held
    ]
    logits = [each for _, each in found if each is not None]
    return _lines(T, *of_splits([codecs, *theirs], [part for part, _ in found], logits))
