"""Exchange of slots: newcomers that deserve a slot more than what is in it take its place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvcascade.kernels import launch, native
from kvcascade.kernels.backend import Implementation, Kernel, run
from kvcascade.kernels.slots import Entry, Format, Slots


@jax.named_scope("exchange")
def exchange(
    slots: Slots,
    entry: Entry,
    priority_BKST: Float[Array, "B K _"],
    form: Format,
    forget: bool,
    implementation: Implementation | None = None,
) -> tuple[Slots, Entry | None]:
    """Exchange the i-th worst slot for the i-th best newcomer while the newcomer's priority is higher; return the slots, and the T tokens left over.

    `priority` ranks the S slots, then the T newcomers. A slot that stays is not written again, so nothing is quantised twice,
    and a tie leaves things as they are. With `forget` nobody asks for those left over, and None is returned for them.
    `xla` runs everywhere; `native` is C++ for a CPU and `triton` a GPU's kernel, both for T = 1; None takes the best that there is.
    """
    reference, on_cpu, on_gpu = (functools.partial(each, form, forget) for each in (_xla, _native, _triton))
    suits = lambda slots, entry, priority: entry.pos_BKT.shape[-1] == 1 and native.reads(slots.k)
    kernels = {"native": native.kernel(on_cpu, suits), "triton": Kernel(on_gpu, _triton_refuses)}
    return run(implementation, reference, kernels, slots, entry, priority_BKST)


def _xla(form, forget, slots, entry, priority):
    S, T = slots.pos_BKS.shape[-1], entry.pos_BKT.shape[-1]
    rank_slots, rank_new = priority[..., :S], priority[..., S:]
    if T == 1:
        slot, new = argmin(rank_slots)[..., None], jnp.zeros_like(entry.pos_BKT)
    else:
        slot, new = jnp.argsort(rank_slots)[..., :T], jnp.argsort(-rank_new)[..., :S]
    swap = jnp.take_along_axis(rank_new, new, -1) > jnp.take_along_axis(rank_slots, slot, -1)

    def both(held, offered, encode=lambda x: x, decode=lambda x: x):
        """Both sides after the exchange; rows of `held` and `offered` are slots and tokens, with or without a vector's axis."""
        coming = encode(jnp.take_along_axis(offered, _over(new, offered), 2))
        leaving = decode(jax.tree.map(lambda x: jnp.take_along_axis(x, _over(slot, x), 2), held))
        left = jnp.where(_over(swap, leaving), leaving, jnp.take_along_axis(offered, _over(new, offered), 2))
        held = jax.tree.map(lambda x, y: _put(x, jnp.where(swap, slot, S), y), held, coming)
        return held, left if T == 1 else _put(offered, new, left)

    k, left_k = both(slots.k, entry.k, form.encode, form.decode)
    v, left_v = both(slots.v, entry.v, form.encode, form.decode)
    pos, left_pos = both(slots.pos_BKS, entry.pos_BKT)
    score, left_score = (None, entry.score_BKT) if slots.score_BKS is None else both(slots.score_BKS, entry.score_BKT)
    return Slots(k, v, pos, score), None if forget else Entry(left_k, left_v, left_pos, left_score)


def argmin(x: Float[Array, "*B S"]):
    """The first index of the least number along the last axis; the last index where one is NaN."""
    # Two plain reductions: XLA:CPU does not vectorise the (value, index) reduction of `jnp.argmin`.
    least = x == x.min(-1, keepdims=True)
    return jnp.where(least, jnp.arange(x.shape[-1]), x.shape[-1] - 1).min(-1)


def _over(index_BKT, like):
    """The index with a last axis of one where `like` has vectors."""
    return index_BKT[..., None] if like.ndim == 4 else index_BKT


def _put(x, index_BKT, values):
    """Write values into slots; an index past the end writes nothing."""
    B, K, _ = index_BKT.shape
    return x.at[jnp.arange(B)[:, None, None], jnp.arange(K)[:, None], index_BKT].set(values, mode="drop")


def _native(form, forget, slots, entry, priority):
    held = [slots.pos_BKS, *native.arrays(slots.k), *native.arrays(slots.v)]
    if slots.score_BKS is not None:
        held.append(slots.score_BKS)
    coming = [entry.k, entry.v, entry.pos_BKT, entry.score_BKT]
    left = [] if forget else coming
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = jax.ffi.ffi_call(
        "kvcascade_exchange",
        [*map(like, held), *map(like, left)],
        # The slots are written in place.
        input_output_aliases={1 + len(coming) + i: i for i in range(len(held))},
    )
    per_vector = len(slots.k)
    results = call(priority, *coming, *held, arrays=np.int64(per_vector), turned=form.turned, forget=forget)
    pos, results = results[0], results[1:]
    k, v = native.named(slots.k, results[:per_vector]), native.named(slots.v, results[per_vector : 2 * per_vector])
    score = None if slots.score_BKS is None else results[2 * per_vector]
    return Slots(k, v, pos, score), None if forget else Entry(*results[-4:])


def _triton(form, forget, slots, entry, priority, interpret):
    from kvcascade.kernels import write_triton

    return write_triton.exchange(slots, entry, priority, form.turned, forget, interpret)


def _triton_refuses(slots, entry, priority) -> str | None:
    if reason := launch.refuses():
        return reason
    from kvcascade.kernels import write_triton

    return write_triton.refuses(slots, entry)
