"""The caches of all layers as one value, and a draft: tokens that have looked at it and may be thrown away."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvcascade.cache.basis import Basis
from kvcascade.cache.errors import BadInput
from kvcascade.cache.groups import Group, Share, Vectors, joined
from kvcascade.cache.hints import Hints
from kvcascade.cache.layer import LayerCache, Look
from kvcascade.cache.retention import Hint
from kvcascade.cache.statistic import Statistic
from kvcascade.kernels.decode import Members, decode_groups


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["of"])
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a model's layers hold. It goes through them one after the other: each step returns the cache for the next."""

    layers: tuple[LayerCache, ...]
    """Layers, or groups of their KV heads that have cascades of their own."""
    of: tuple[tuple[Share, ...], ...]
    """Which of them each of the model's layers uses; none where all is on blocks."""

    @classmethod
    def of_groups(cls, groups: Sequence[Group], made: Iterable[LayerCache]) -> "Cache":
        """What groups of heads hold, in their order, as a model's cache."""
        shares: dict[int, tuple[Share, ...]] = {}
        for place, group in enumerate(groups):
            shares[group.layer] = (*shares.get(group.layer, ()), Share(place, group.chosen))
        return cls(tuple(made), tuple(shares.values()))

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
        """`LayerCache.step` of the model's layer of that number; a decode step attends once for all groups of its heads."""
        shares, whole = self.of[index], Vectors(q_BTNH, k_BTKH, v_BTKW, written_BTK)
        layers = [(self.layers[share.place], whole.of(share.chosen)) for share in shares]
        if positions_BT.shape[1] == 1:
            layers = [(layer.entered(*some[:3], positions_BT, some.written_BTK), some) for layer, some in layers]
            if len(shares) == 1 or any(layer.bases for layer, _ in layers):
                found = [layer.decoded(some.q_BTNH, positions_BT) for layer, some in layers]
            else:
                groups = [
                    Members(share.chosen, layer.held, layer.cascade.observed)
                    for share, (layer, _) in zip(shares, layers, strict=True)
                ]
                heads = layers[0][0].heads.part(k_BTKH.shape[2])
                found = decode_groups(q_BTNH[:, 0], positions_BT[:, 0], groups, heads)
            pairs = zip(layers, found, strict=True)
            made = [layer.attended(each, some.q_BTNH, positions_BT) for (layer, some), each in pairs]
        else:
            made = [layer.step(*some[:3], positions_BT, fresh, some.written_BTK) for layer, some in layers]
        cache = self
        for share, (_, layer) in zip(shares, made, strict=True):
            cache = dataclasses.replace(cache, layers=put(cache.layers, share.place, layer))
        return joined(shares, [out for out, _ in made]), cache

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
        """Which tier of its layer holds each of a row's first so many positions, the first tier being 0; -1: none does.

        The tiers of a second group of heads are numbered on from those of the first.
        """
        heads = max(1 + max(share.chosen) for shares in self.of for share in shares)
        found = np.full((len(self.of), heads, tokens), -1, np.int8)
        for index, shares in enumerate(self.of):
            tiers = ((share.chosen, slots) for share in shares for slots in self.layers[share.place].slots)
            for number, (chosen, slots) in enumerate(tiers):
                for head, pos_S in zip(chosen, np.asarray(slots.pos_BKS[row]), strict=True):
                    found[index, head, pos_S[(pos_S >= 0) & (pos_S < tokens)]] = number
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
        shares, draft, outs = self.cache.of[index], self, []
        whole = Vectors(q_BTNH, k_BTKH, v_BTKW, written_BTK)
        for place, chosen in shares:
            some = whole.of(chosen)
            look = self.cache.layers[place].look(*some[:3], positions_BT, self.looks[place], some.written_BTK)
            draft = dataclasses.replace(draft, looks=put(draft.looks, place, look))
            outs.append(look.out_BTNW)
        return joined(shares, outs), draft

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
    """Measured bytes: the sum over the cache's device buffers, positions and numbers included; but for bases, which are a model's."""
    leaves = jax.tree.leaves(cache, is_leaf=lambda leaf: isinstance(leaf, Basis))
    return sum(leaf.nbytes for leaf in leaves if not isinstance(leaf, Basis))
