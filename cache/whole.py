"""The caches of all layers as one value; a draft: tokens that have looked at it and may be thrown away; and a prompt, to be put into several."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
from jaxtyping import Array, Bool, Float, Int

from kvcascade.cache.errors import BadInput
from kvcascade.cache.hints import Hint, Hints
from kvcascade.cache.layer import LayerCache, Look
from kvcascade.kernels.causal import causal_attention
from kvcascade.kernels.heads import Heads


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["of"])
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a model's layers hold. It goes through them one after the other: each step returns the cache for the next."""

    layers: tuple[LayerCache, ...]
    of: tuple[int, ...]
    """Which of them each of the model's layers uses."""

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
        return out_BTNW, dataclasses.replace(self, layers=_put(self.layers, place, layer))

    @property
    def context(self) -> int:
        """The number of positions that it was made for."""
        return self.layers[0].context

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
        return look.out_BTNW, dataclasses.replace(self, looks=_put(self.looks, place, look))

    def accept(self, accepted_BT: Bool[Array, "B T"]) -> "Draft":
        """The draft with the rejected ones of all its tokens turned into padding."""
        return dataclasses.replace(self, looks=tuple(look and look.accept(accepted_BT) for look in self.looks))

    def commit(self) -> Cache:
        """The cache with the draft's tokens in it."""
        pairs = zip(self.cache.layers, self.looks, strict=True)
        return dataclasses.replace(
            self.cache, layers=tuple(layer.commit(look) if look else layer for layer, look in pairs)
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["heads", "context"])
@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model's layers make of whole prompts, to be put into any number of empty caches: the model goes over them once for all.

    It goes through a model's layers as a cache does.
    """

    heads: tuple[Heads, ...]
    """What the attention of each layer is."""
    context: int
    """The context of the caches."""
    parts: tuple[tuple[Float[Array, "B T ..."] | None, ...], ...] = ()
    """Queries, keys, values and what those write, of each layer that it has gone through."""

    def step(
        self,
        index: int,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKW: Float[Array, "B T K W"],
        positions_BT: Int[Array, "B T"],
        fresh: bool = True,
        written_BTK: Float[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T N W"], "Prompt"]:
        """Causal attention of rows from position 0 on, which is what any empty cache gives. Raises ValueError for a part of them."""
        if not fresh:
            raise ValueError(
                "a prompt for several caches enters whole: what a later part sees is not the same for all of them"
            )
        out_BTNW = causal_attention(q_BTNH, k_BTKH, v_BTKW, self.heads[index])
        return out_BTNW, dataclasses.replace(self, parts=(*self.parts, (q_BTNH, k_BTKH, v_BTKW, written_BTK)))

    def enter(self, cache: Cache, positions_BT: Int[Array, "B T"]) -> Cache:
        """The cache, which is donated and must be empty, with the prompts in it."""
        layers = list(cache.layers)
        for place, part in zip(cache.of, self.parts, strict=True):
            layers[place] = _enter(layers[place], positions_BT, *part)
        return dataclasses.replace(cache, layers=tuple(layers)).answering()

    def answering(self) -> "Prompt":
        """Itself: what goes past the tiers in front is decided where it enters."""
        return self


@functools.partial(jax.jit, donate_argnames="layer")
def _enter(layer: LayerCache, positions_BT, q_BTNH, k_BTKH, v_BTKW, written_BTK) -> LayerCache:
    """One program for all layers that are alike."""
    return layer.step(q_BTNH, k_BTKH, v_BTKW, positions_BT, fresh=True, written_BTK=written_BTK)[1]


def _put[T](parts: tuple[T, ...], place: int, part: T) -> tuple[T, ...]:
    return (*parts[:place], part, *parts[place + 1 :])


def nbytes(cache: Cache | LayerCache) -> int:
    """Measured bytes: the sum over the cache's device buffers, positions and numbers included."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
