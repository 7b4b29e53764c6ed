"""The caches of all layers as one value, and a draft: tokens that have looked at it and may be thrown away."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvcascade.cache.errors import BadInput
from kvcascade.cache.hints import Hints
from kvcascade.cache.layer import LayerCache, Look
from kvcascade.cache.retention import Hint
from kvcascade.cache.statistic import Statistic


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["of"])
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a model's layers hold. It goes through them one after the other: each step returns the cache for the next."""

    layers: tuple[LayerCache, ...]
    of: tuple[int, ...]
    """Which of them each of the model's layers uses; -1: none, where all is on blocks."""

    def step(
        self,
        index: int,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKW: Float[Array, "B T K W"],
        positions_BT: Int[Array, "B T"],
        fresh: bool = False,
        written_BTK: Float[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T N W"], "Cache"]:
        """`LayerCache.step` of the model's layer of that number."""
        place = self.of[index]
        out_BTNW, layer = self.layers[place].step(q_BTNH, k_BTKH, v_BTKW, positions_BT, fresh, written_BTK)
        return out_BTNW, dataclasses.replace(self, layers=put(self.layers, place, layer))

    @property
    def context(self) -> int:
        """The number of positions that it was made for."""
        return self.layers[0].context

    @property
    def kept(self) -> int:
        """Tokens that it has room for, in the layer that has most."""
        return max(layer.kept for layer in self.layers)

    def held(self, tokens: int) -> int:
        """Tokens that it holds, of rows that have seen so many, in the layer and the row that hold most."""
        return max(layer.tokens for layer in self.layers)

    def places(self, row: int, tokens: int) -> Int[np.ndarray, "L K T"]:
        """Which tier of its layer holds each of a row's first so many positions, the first tier being 0; -1: none does."""
        found = np.full((len(self.of), max(each.heads.kv for each in self.layers), tokens), -1, np.int8)
        for index, place in enumerate(self.of):
            for tier, slots in enumerate(self.layers[place].slots):
                for head, pos_S in enumerate(np.asarray(slots.pos_BKS[row])):
                    found[index, head, pos_S[(pos_S >= 0) & (pos_S < tokens)]] = tier
        return found

    @property
    def rereads(self) -> tuple[Statistic, ...]:
        """The numbers for which a prompt is read a second time."""
        return tuple(dict.fromkeys(each for layer in self.layers for each in layer.cascade.rereads))

    def answering(self) -> "Cache":
        """`LayerCache.answering` in each layer."""
        return dataclasses.replace(self, layers=tuple(each.answering() for each in self.layers))

    def settled(self) -> "Cache":
        """`LayerCache.settled` in each layer."""
        return dataclasses.replace(self, layers=tuple(each.settled() for each in self.layers))

    def hinted(self, rows: Sequence[Sequence[Hint]]) -> "Cache":
        """The cache with these hints of each row in the place of those that it had; BadInput where no tier reads them."""
        layers = tuple(each.hinted(rows) for each in self.layers)
        if not any(isinstance(each, Hints) for layer in layers for each in layer.cascade.memories):
            raise BadInput("no tier of the cache reads hints: give it one, such as `hinted 256`")
        return dataclasses.replace(self, layers=layers)

    def draft(self) -> "Draft":
        """A draft of no tokens."""
        return Draft(self, (None,) * len(self.layers))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["cache", "looks"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Draft:
    """A cache that tokens look at and do not enter: to be committed, wholly or in part, or forgotten. Nothing has to be rolled back.

    It goes through a model's layers as a cache does. Tokens of a second call also see those of the first.
    """

    cache: Cache
    looks: tuple[Look | None, ...]

    @property
    def context(self) -> int:
        """The context that the cache was made for."""
        return self.cache.context

    def step(
        self,
        index: int,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKW: Float[Array, "B T K W"],
        positions_BT: Int[Array, "B T"],
        fresh: bool = False,
        written_BTK: Float[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T N W"], "Draft"]:
        """`LayerCache.look` of the model's layer of that number."""
        place = self.cache.of[index]
        look = self.cache.layers[place].look(q_BTNH, k_BTKH, v_BTKW, positions_BT, self.looks[place], written_BTK)
        return look.out_BTNW, dataclasses.replace(self, looks=put(self.looks, place, look))

    def accept(self, accepted_BT: Bool[Array, "B T"]) -> "Draft":
        """The draft with the rejected ones of all its tokens turned into padding."""
        return dataclasses.replace(self, looks=tuple(look and look.accept(accepted_BT) for look in self.looks))

    def commit(self) -> Cache:
        """The cache with the draft's tokens in it."""
        pairs = zip(self.cache.layers, self.looks, strict=True)
        return dataclasses.replace(
            self.cache, layers=tuple(layer.commit(look) if look else layer for layer, look in pairs)
        )


def put[T](parts: tuple[T, ...], place: int, part: T) -> tuple[T, ...]:
    """The tuple with that part in its place."""
    return (*parts[:place], part, *parts[place + 1 :])


def nbytes(cache: Cache | LayerCache) -> int:
    """Measured bytes: the sum over the cache's device buffers, positions and numbers included."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
