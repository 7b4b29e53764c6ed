"""Some rows of a cache at a time: what stands in slots of a row's own, taken out, put back, and tokens of a few rows in one call."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from kvcascade.cache.block_cache import BlockCache
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.whole import Cache
from kvcascade.cache.whole import put as replaced

type State = list[Array] | list[np.ndarray]
"""All that a row keeps in slots of its own, each array with an axis of one row."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["cache", "row_N", "place_N", "after"], meta_fields=["most"]
)
@dataclasses.dataclass(frozen=True)
class Lines:
    """A cache of many rows in a call that has tokens of some: a line of the call is a token of a row, and nothing happens to other rows.

    So the model's products are of as many lines as there are tokens, whatever the cache has room for. Of a row's tokens each enters when
    those before it have attended, as in calls of their own; `accept` takes back those that should not have come.
    """

    cache: Cache
    row_N: Int[Array, " N"]
    """The row of each line; -1: none."""
    place_N: Int[Array, " N"]
    """Which of its row's tokens it is, counted from 0."""
    after: tuple[Any, ...]
    """The numbers and memories of each part of the cache as they were after the first token of each row, the second, and so on; () where
    rows have one token at most."""
    most: int
    """Tokens of a row, at most."""

    @classmethod
    def of(cls, cache: Cache, line_RA: Int[Array, "R A"], lines: int) -> "Lines":
        """A call of so many lines: those of each row's tokens in their order, -1 where it has no more."""
        at_RA = jnp.where(line_RA < 0, lines, line_RA)
        each = lambda numbers, none: (
            jnp.full(lines, none, jnp.int32).at[at_RA].set(jnp.broadcast_to(numbers, line_RA.shape), mode="drop")
        )
        rows, most = line_RA.shape
        after = () if most == 1 else (None,) * len(cache.layers)
        return cls(cache, each(jnp.arange(rows)[:, None], -1), each(jnp.arange(most), 0), after, most)

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
        q, k, v = (self._by_row(x, 0) for x in (q_NTKH, k_NTKH, v_NTKW))
        written = None if written_NTK is None else self._by_row(written_NTK, 0)
        given = q, k, v, self._by_row(positions_NT, -1), written
        if self.most == 1:
            q, k, v, positions, written = jax.tree.map(lambda x: x[0], given)
            out, cache = self.cache.step(index, q, k, v, positions, fresh, written)
            return out[self.row_N.clip(0)], dataclasses.replace(self, cache=cache)
        places = [share.place for share in self.cache.of[index]]

        def one(place, carry):
            layers, pools, outs, after = carry
            at = functools.partial(lax.dynamic_index_in_dim, index=place, keepdims=False)
            q, k, v, positions, written = jax.tree.map(at, given)
            cache = _having(self.cache, places, layers, pools)
            out, cache = cache.step(index, q, k, v, positions, fresh, written)
            layers = [cache.layers[each] for each in places]
            put = lambda every, new: lax.dynamic_update_index_in_dim(every, new, place, 0)
            after = jax.tree.map(put, after, [*map(_changing, layers)])
            return layers, _pools(cache), put(outs, out), after

        layers = [self.cache.layers[each] for each in places]
        outs = jnp.zeros((*q.shape[:4], v.shape[-1]), q.dtype)
        after = jax.tree.map(lambda x: jnp.zeros((self.most, *x.shape), x.dtype), [*map(_changing, layers)])
        calls = jnp.where(self.row_N < 0, 0, self.place_N + 1).max()
        layers, pools, outs, after = lax.fori_loop(0, calls, one, (layers, _pools(self.cache), outs, after))
        found = list(self.after)
        for place, each in zip(places, after, strict=True):
            found[place] = each
        cache = _having(self.cache, places, layers, pools)
        return outs[self.place_N, self.row_N.clip(0)], dataclasses.replace(self, cache=cache, after=tuple(found))

    def accept(self, kept_R: Int[Array, " R"], positions_N: Int[Array, " N"]) -> Cache:
        """The cache as it is without the tokens of each row after the first so many of the call.

        Of tokens behind which others wait in `pending` that is so; without it a token may have taken another's slot.
        """
        if self.most == 1:
            return self.cache
        at_1R = (kept_R - 1).clip(0)[None]
        pick = lambda x: jnp.take_along_axis(x, at_1R.reshape(1, -1, *(1,) * (x.ndim - 2)), 0)[0]
        there = lambda x: (kept_R > 0).reshape(-1, *(1,) * (x.ndim - 1))
        keep = lambda now, after: jnp.where(there(now), pick(after), now)
        newest_R = jnp.where(kept_R > 0, pick(self._by_row(positions_N, -1)), jnp.iinfo(jnp.int32).max)
        layers = []
        for layer, after in zip(self.cache.layers, self.after, strict=True):
            numbers, memories = jax.tree.map(keep, _changing(layer), after)
            slots = [dataclasses.replace(*each, numbers=made) for *each, made in zip(layer.slots, numbers, strict=True)]
            waiting = slots[0].pos_BKS
            slots[0] = dataclasses.replace(slots[0], pos_BKS=jnp.where(waiting > newest_R[:, None, None], -1, waiting))
            layers.append(dataclasses.replace(layer, slots=tuple(slots), memories=memories))
        return dataclasses.replace(self.cache, layers=tuple(layers))

    def _by_row(self, x_N: Shaped[Array, "N *more"], none: int) -> Shaped[Array, "A R *more"]:
        """What lines have, by the places and the rows of their tokens."""
        rows = count(self.cache)
        empty = jnp.full((self.most, rows, *x_N.shape[1:]), none, x_N.dtype)
        return empty.at[self.place_N, jnp.where(self.row_N < 0, rows, self.row_N)].set(x_N, mode="drop")


def _pools(cache: Cache) -> tuple[Any, ...]:
    return cache.pools if isinstance(cache, BlockCache) else ()


def _having(cache: Cache, places: Sequence[int], layers: Sequence[LayerCache], pools: tuple[Any, ...]) -> Cache:
    """The cache with these parts in their places."""
    for place, layer in zip(places, layers, strict=True):
        cache = dataclasses.replace(cache, layers=replaced(cache.layers, place, layer))
    return dataclasses.replace(cache, pools=pools) if isinstance(cache, BlockCache) else cache


def _changing(layer: LayerCache) -> tuple[Any, Any]:
    """What changes of what a layer knows of its tokens when one more has attended."""
    return [slots.numbers for slots in layer.slots], layer.memories


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
