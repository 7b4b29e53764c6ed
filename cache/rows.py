"""Some rows of a cache at a time: what stands in slots of a row's own, taken out, put back, and tokens of a few rows in one call."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.cache.block_cache import BlockCache
from kvcascade.cache.whole import Cache

type State = list[Array] | list[np.ndarray]
"""All that a row keeps in slots of its own, each array with an axis of one row."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["cache", "row_N"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Lines:
    """A cache of many rows in a call that has a token of some: a line of the call is a row of the cache, and nothing happens to the others.

    So the model's products are of as many lines as there are tokens, whatever the cache has room for.
    """

    cache: Cache
    row_N: Int[Array, " N"]
    """The row of each line; -1: none."""

    @property
    def context(self) -> int:
        """The number of positions that the cache was made for."""
        return self.cache.context

    def step(
        self,
        index: int,
        q_NTKH: Float[Array, "N 1 _ H"],
        k_NTKH: Float[Array, "N 1 K H"],
        v_NTKW: Float[Array, "N 1 K W"],
        positions_NT: Int[Array, "N 1"],
        fresh: bool = False,
        written_NTK: Float[Array, "N 1 K"] | None = None,
    ) -> tuple[Float[Array, "N 1 _ W"], "Lines"]:
        """`Cache.step` of the model's layer of that number."""
        rows = count(self.cache)
        at_N = jnp.where(self.row_N < 0, rows, self.row_N)
        into = lambda x, empty: jnp.full((rows, *x.shape[1:]), empty, x.dtype).at[at_N].set(x, mode="drop")
        written = None if written_NTK is None else into(written_NTK, 0)
        q, k, v = (into(x, 0) for x in (q_NTKH, k_NTKH, v_NTKW))
        out, cache = self.cache.step(index, q, k, v, into(positions_NT, -1), fresh, written)
        return out[self.row_N.clip(0)], dataclasses.replace(self, cache=cache)


def count(cache: Cache) -> int:
    """The rows of a cache with slots of their own."""
    return cache.layers[0].slots[0].pos_BKS.shape[0]


def state(cache: Cache) -> State:
    """What all rows keep in slots of their own: one array for each of those, its first axis the rows."""
    return jax.tree.leaves([(layer.slots, layer.memories) for layer in cache.layers])


def _with(cache: Cache, content: State) -> Cache:
    """The cache with that in the place of what it has."""
    tree = jax.tree.structure([(layer.slots, layer.memories) for layer in cache.layers])
    pairs = zip(cache.layers, tree.unflatten(content), strict=True)
    layers = tuple(dataclasses.replace(each, slots=slots, memories=memories) for each, (slots, memories) in pairs)
    return dataclasses.replace(cache, layers=layers)


def take(cache: Cache, row: Int[Array, ""]) -> State:
    """What a row keeps in slots of its own."""
    return [lax.dynamic_slice_in_dim(x, row, 1) for x in state(cache)]


def put(cache: Cache, row: Int[Array, ""], content: State) -> Cache:
    """The cache with that in a row's slots."""
    pairs = zip(state(cache), content, strict=True)
    return _with(cache, [lax.dynamic_update_slice_in_dim(x, new, row, 0) for x, new in pairs])


def within[R](cache: Cache, row: Int[Array, ""], work: Callable[[Cache], tuple[R, Cache]]) -> tuple[R, Cache]:
    """Do something with one row as if it were the only one, and have the cache with what became of it; blocks are the cache's own."""
    one = _with(cache, take(cache, row))
    if isinstance(one, BlockCache):
        one = dataclasses.replace(one, table_RW=lax.dynamic_slice_in_dim(one.table_RW, row, 1))
    found, one = work(one)
    if isinstance(cache, BlockCache) and isinstance(one, BlockCache):
        cache = dataclasses.replace(cache, pools=one.pools)
    return found, put(cache, row, state(one))
