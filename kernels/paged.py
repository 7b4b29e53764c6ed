"""Decode attention over slots in pages that rows of a batch take from one pool (PagedAttention, Kwon et al. 2023)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvcascade.kernels.backend import Implementation, Kernel, run
from kvcascade.kernels.decode import decode, triton_refuses
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import Partial, join
from kvcascade.kernels.slots import Codecs, Slots


def paged_decode(
    q_BNH: Float[Array, "B N H"],
    q_pos_B: Int[Array, " B"],
    pool: Slots,
    table_BP: Int[Array, "B P"],
    codecs: Codecs,
    heads: Heads,
    implementation: Implementation | None = None,
) -> Partial:
    """`decode.decode` over the pages that a row's line of the table names.

    The first axis of the pool counts pages, its third the slots of a page. A page number of -1 is no page; those that several rows
    name are shared. Positions stand in the pool like everything else, so pages need no order and may be part full.
    """
    reference, on_gpu = (functools.partial(each, codecs, heads) for each in (_xla, _triton))
    kernels = {"triton": Kernel(on_gpu, lambda q, q_pos, pool, table: triton_refuses(pool))}
    return run(implementation, reference, kernels, q_BNH, q_pos_B, pool, table_BP, axes="BK B _K B -> B_K")


def _xla(codecs, heads, q_BNH, q_pos_B, pool, table_BP):
    def of_rows(x):
        x = jnp.moveaxis(x[table_BP.clip(0)], 1, 2)  # [B, K, pages, slots of a page, …]
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    slots = jax.tree.map(of_rows, pool)
    named_BS = jnp.repeat(table_BP >= 0, pool.pos_BKS.shape[2], axis=1)
    slots = Slots(slots.k, slots.v, jnp.where(named_BS[:, None], slots.pos_BKS, -1))
    return decode(q_BNH, q_pos_B, [(slots, codecs)], heads, False, "xla")[0]


def _triton(codecs, heads, q_BNH, q_pos_B, pool, table_BP, interpret):
    from kvcascade.kernels import decode_triton

    q_BNH = codecs.k.turn(q_BNH)
    parts, _ = decode_triton.attend(q_BNH, q_pos_B, pool, heads, False, interpret, table_BP)
    part = join(parts)
    return part._replace(out_BTNW=codecs.v.turn(part.out_BTNW))
