"""Exchange of slots: newcomers that deserve a slot more than what is in it take its place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from kvcascade.kernels import launch, native
from kvcascade.kernels.backend import Implementation, Kernel, run
from kvcascade.kernels.slots import Codecs, Entry, Slots

FEW = 64
"""Newcomers up to which the C++ kernel takes them: one after the other on one core, where XLA encodes all of a prompt's at once."""


@jax.named_scope("exchange")
def exchange(
    slots: Slots,
    entry: Entry,
    priority_BKST: Float[Array, "B K _"],
    codecs: Codecs,
    forget: bool,
    implementation: Implementation | None = None,
) -> tuple[Slots, Entry | None]:
    """Exchange the i-th worst slot for the i-th best newcomer while the newcomer ranks higher; return the slots, and the T tokens left over.

    `priority` ranks the S slots, then the T newcomers; of equals the one of the higher position ranks higher, so the order of slots and
    of tokens does not matter. A newcomer of priority -inf, like padding, never comes in. A slot that stays is not written again, so
    nothing is quantised twice. The newcomers carry as many numbers as the slots. With `forget` nobody asks for those left over, and None
    is returned for them. `xla` runs everywhere; `native` is C++ for a CPU and T up to FEW, `triton` a GPU's kernel for T = 1; None takes
    the best that there is.
    """
    reference, on_cpu, on_gpu = (functools.partial(each, codecs, forget) for each in (_xla, _native, _triton))
    kernels = {"native": native.kernel(on_cpu, _native_refuses), "triton": Kernel(on_gpu, _triton_refuses)}
    return run(implementation, reference, kernels, slots, entry, priority_BKST)


def _xla(codecs: Codecs, forget, slots, entry, priority):
    S, T = slots.pos_BKS.shape[-1], entry.pos_BKT.shape[-1]
    rank_slots, rank_new = priority[..., :S], priority[..., S:]
    if T == 1:
        least = rank_slots.min(-1, keepdims=True)
        oldest = jnp.where(rank_slots == least, slots.pos_BKS, jnp.iinfo(jnp.int32).max)
        slot, new = argmin(oldest)[..., None], jnp.zeros_like(entry.pos_BKT)
    else:
        slot = jnp.lexsort((slots.pos_BKS, rank_slots))[..., :T]
        new = jnp.lexsort((-entry.pos_BKT, -rank_new))[..., :S]
    of = jnp.take_along_axis
    coming, leaving = of(rank_new, new, -1), of(rank_slots, slot, -1)
    younger = (coming == leaving) & (of(entry.pos_BKT, new, -1) > of(slots.pos_BKS, slot, -1))
    swap = (coming > leaving) | younger & (coming > -jnp.inf)

    def both(held, offered, encode=lambda x: x, decode=lambda x: x):
        """Both sides after the exchange; rows of `held` and `offered` are slots and tokens, with or without a vector's axis."""
        coming = encode(of(offered, _over(new, offered), 2))
        leaving = decode(jax.tree.map(lambda x: of(x, _over(slot, x), 2), held))
        left = jnp.where(_over(swap, leaving), leaving, of(offered, _over(new, offered), 2))
        held = jax.tree.map(lambda x, y: _put(x, jnp.where(swap, slot, S), y), held, coming)
        return held, left if T == 1 else _put(offered, new, left)

    k, left_k = both(slots.k, entry.k, codecs.k.encode, codecs.k.decode)
    v, left_v = both(slots.v, entry.v, codecs.v.encode, codecs.v.decode)
    pos, left_pos = both(slots.pos_BKS, entry.pos_BKT)
    carried = [both(*pair) for pair in zip(slots.numbers, entry.numbers, strict=True)]
    numbers, left_numbers = tuple(x for x, _ in carried), tuple(x for _, x in carried)
    return Slots(k, v, pos, numbers), None if forget else Entry(left_k, left_v, left_pos, left_numbers)


def argmin(x: Shaped[Array, "*B S"]):
    """The first index of the least number along the last axis; the last index where one is NaN."""
    # Two plain reductions: XLA:CPU does not vectorise the (value, index) reduction of `jnp.argmin`.
    least = x == x.min(-1, keepdims=True)
    return jnp.where(least, jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape[-1] - 1).min(-1)


def _over(index_BKT, like):
    """The index with a last axis of one where `like` has vectors."""
    return index_BKT[..., None] if like.ndim == 4 else index_BKT


def _put(x, index_BKT, values):
    """Write values into slots; an index past the end writes nothing."""
    B, K, _ = index_BKT.shape
    return x.at[jnp.arange(B)[:, None, None], jnp.arange(K)[:, None], index_BKT].set(values, mode="drop")


def _native(codecs: Codecs, forget, slots, entry, priority):
    held = [slots.pos_BKS, *native.arrays(slots.k), *native.arrays(slots.v), *slots.numbers]
    coming = [entry.k, entry.v, entry.pos_BKT, *entry.numbers]
    left = [] if forget else coming
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = jax.ffi.ffi_call(
        "kvcascade_exchange",
        [*map(like, held), *map(like, left)],
        # The slots are written in place.
        input_output_aliases={1 + len(coming) + i: i for i in range(len(held))},
    )
    results = iter(
        call(
            priority,
            *coming,
            *held,
            **native.formats((slots.k, slots.v), codecs),
            numbers=np.int64(len(slots.numbers)),
            forget=forget,
        )
    )
    pos = next(results)
    k, v = (native.named(stored, [next(results) for _ in stored]) for stored in (slots.k, slots.v))
    slots = Slots(k, v, pos, tuple(next(results) for _ in slots.numbers))
    return slots, None if forget else Entry(next(results), next(results), next(results), tuple(results))


def _native_refuses(slots, entry, priority) -> str | None:
    return f"made for {FEW} newcomers per KV head" if entry.pos_BKT.shape[-1] > FEW else native.unread(slots)


def _triton(codecs: Codecs, forget, slots, entry, priority, interpret):
    from kvcascade.kernels import write_triton

    return write_triton.exchange(slots, entry, priority, codecs, forget, interpret)


def _triton_refuses(slots, entry, priority) -> str | None:
    if reason := launch.refuses():
        return reason
    from kvcascade.kernels import write_triton

    return write_triton.refuses(slots, entry)
