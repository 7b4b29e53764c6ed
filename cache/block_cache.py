"""A cache whose first tiers live in the blocks of a pool, which rows of the same tokens can share."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvcascade.cache.basis import Bases, inside
from kvcascade.cache.codec import coarse
from kvcascade.cache.errors import BadInput
from kvcascade.cache.groups import Group, Share
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.tier import BLOCK
from kvcascade.cache.whole import Cache, put
from kvcascade.kernels import pages
from kvcascade.kernels.decode import decode
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.pages import Pool
from kvcascade.kernels.partial import joined, normalise
from kvcascade.kernels.slots import Codecs


class Shared(NamedTuple):
    """Where the tier on blocks of one of a model's layers is."""

    pool: int
    """Which of the pools: layers that are alike are in one."""
    layer: int
    """Its place among the layers of that pool."""
    codecs: Codecs
    heads: Heads
    limit: int
    """The first so many positions of a row are there, the others in slots of its own."""


def limit(groups: Sequence[Group], context: int) -> int:
    """The first so many tokens of a row are on blocks, 0 where no layer has a tier there.

    BadInput where layers do not have equally many: a block has room for its tokens in each of them.
    """
    found = {str(tier): tier.slots(context) for each in groups if (tier := each.cascade.shared)}
    if len({*found.values()}) > 1:
        raise BadInput(
            f"{' and '.join(found)} are for unlike numbers of tokens, and a block has the same ones in all layers"
        )
    return max(found.values(), default=0)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "pools", "table_RW", "row_B", "bases"],
    meta_fields=["of", "shared", "room", "coarsely"],
)
@dataclasses.dataclass(frozen=True)
class BlockCache(Cache):
    """Blocks of tokens in all layers, and beside them what rows keep in slots of their own.

    What stands in blocks is attended to *as stored*: a token is written, and then read back through its codec by its own query as by all
    later ones. So the content of a block is a function of the tokens in and before it alone, however they were grouped into calls, and
    rows that begin alike can share it. A line of a call has tokens of one row; of rows with slots of their own each must have one line.
    """

    pools: tuple[Pool, ...]
    """A block has the same number in all of them."""
    table_RW: Int[Array, "R W"]
    """The blocks of each row, in the order of its positions; -1: none."""
    row_B: Int[Array, " B"] | None
    """The row of each line of a call; None: each line is the row of its number."""
    shared: tuple[Shared | None, ...]
    """For each of the model's layers; None where it has no tier on blocks."""
    room: int
    """The number of positions that it was made for."""
    bases: tuple[Bases | None, ...] = ()
    """Of what each layer has in blocks; (): none is in a basis of its own."""
    coarsely: bool = False
    """Whether only the high plane is read of what is in blocks, which must be in `planes`."""

    @classmethod
    def empty(
        cls,
        groups: Sequence[Group],
        rows: int,
        context: int,
        blocks: int | None = None,
        size: int = BLOCK,
        bases: Sequence[Sequence[Bases | None]] = (),
    ) -> "BlockCache":
        """So many blocks of so many tokens, which nobody has; by default as many as rows of `context` tokens need, each with its own.

        BadInput for layers whose prompt must be read twice, which takes all of it at once, and for groups of heads: a block has all of them.
        """
        if not all(each.whole for each in groups):
            raise BadInput(
                "a block has all KV heads of its tokens, so a cache with tiers on blocks is not parted by heads"
            )
        if any(each.cascade.rereads for each in groups):
            raise BadInput(
                "a cache that reads its prompt twice has no tiers on blocks, into which its tokens go at once"
            )
        most = limit(groups, context)
        alike = [(tier.codecs, each.of) if (tier := each.cascade.shared) else None for each in groups]
        kinds = [each for each in dict.fromkeys(alike) if each]
        shared = tuple(
            each and Shared(kinds.index(each), alike[:index].count(each), *each, most)
            for index, each in enumerate(alike)
        )
        own = [(each, cascade) for each in groups if (cascade := each.cascade.own)]
        of = {each.layer: (Share(place, each.chosen),) for place, (each, _) in enumerate(own)}
        of_groups = dict(zip(groups, bases or [()] * len(groups), strict=True))
        own_bases = lambda each, cascade: tuple(some) if any(some := of_groups[each][-len(cascade.tiers) :]) else ()
        on_blocks = tuple(some[0] if some and each.cascade.shared else None for each, some in of_groups.items())
        width = -(-most // size)
        count = rows * width if blocks is None else blocks
        each = jnp.arange(rows * width, dtype=jnp.int32).reshape(rows, width)
        return cls(
            layers=tuple(
                LayerCache.empty(cascade, rows, each.of, context, each.ids, own_bases(each, cascade))
                for each, cascade in own
            ),
            of=tuple(of.get(each.layer, ()) for each in groups),
            pools=tuple(
                Pool.empty(codecs, count, alike.count((codecs, heads)), size, heads) for codecs, heads in kinds
            ),
            table_RW=each if blocks is None else jnp.full_like(each, -1),
            row_B=None,
            shared=shared,
            room=context,
            bases=on_blocks if any(on_blocks) else (),
        )

    def step(
        self,
        index: int,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKW: Float[Array, "B T K W"],
        positions_BT: Int[Array, "B T"],
        fresh: bool = False,
        written_BTK: Float[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T N W"], "BlockCache"]:
        """Write what belongs into blocks, and let the layer's other tiers have the rest; attend to all of it."""
        shared = self.shared[index]
        if shared is None:
            out_BTNW, cache = super().step(index, q_BTNH, k_BTKH, v_BTKW, positions_BT, fresh, written_BTK)
            assert isinstance(cache, BlockCache)
            return out_BTNW, cache
        row_B = jnp.arange(len(positions_BT), dtype=jnp.int32) if self.row_B is None else self.row_B
        bases, tokens = self.bases[index] if self.bases else None, lambda x: x.reshape(-1, *x.shape[2:])
        stored = lambda basis, x: basis.into(x.swapaxes(1, 2)).swapaxes(1, 2)
        k, v = (stored(bases.k, k_BTKH), stored(bases.v, v_BTKW)) if bases else (k_BTKH, v_BTKW)
        slots_N = tokens(self._slots(row_B, positions_BT, shared.limit))
        pool = self.pools[shared.pool]
        pool = pages.write(pool, tokens(k), tokens(v), slots_N, shared.layer, shared.codecs)

        read, codecs = pool, shared.codecs
        if self.coarsely:
            (k_codec, k_read), (v_codec, v_read) = (coarse(*pair) for pair in zip(shared.codecs, pool, strict=True))
            read, codecs = Pool(k_read, v_read), Codecs(k_codec, v_codec)

        def attention(held, observed):
            def attend(q_BTNH, held):
                arguments = q_BTNH, positions_BT, row_B, self.table_RW, read, shared.layer, codecs, shared.heads
                return pages.attend(*arguments, shared.limit, held, observed)

            if not bases or not held:
                return inside(bases, q_BTNH, shared.heads, lambda q: attend(q, held))
            own = decode(q_BTNH[:, 0], positions_BT[:, 0], held, shared.heads, observed)
            return joined([inside(bases, q_BTNH, shared.heads, lambda q: attend(q, [])), own])

        layers = self.layers
        if not self.of[index]:
            out_BTNW = normalise([attention([], False)])[0].astype(q_BTNH.dtype)
        else:
            behind_BT = jnp.where(positions_BT < shared.limit, -1, positions_BT)
            arguments, ((place, _),) = (q_BTNH, k_BTKH, v_BTKW, behind_BT), self.of[index]
            out_BTNW, layer = layers[place].step(*arguments, written_BTK=written_BTK, beside=attention)
            layers = put(layers, place, layer)
        return out_BTNW, dataclasses.replace(self, layers=layers, pools=put(self.pools, shared.pool, pool))

    def _slots(self, row_B, positions_BT, limit: int) -> Int[Array, "B T"]:
        """Where tokens are written, counted through all blocks; -1 for padding, and for those that do not belong there."""
        size = self.pools[0].size
        inside_BT = (positions_BT >= 0) & (positions_BT < limit)
        block_BT = self.table_RW[row_B[:, None], jnp.where(inside_BT, positions_BT // size, 0)]
        return jnp.where(inside_BT & (block_BT >= 0), block_BT * size + positions_BT % size, -1)

    @property
    def context(self) -> int:
        """The number of positions that it was made for."""
        return self.room

    @property
    def kept(self) -> int:
        """Tokens that a row has room for, in the layer that has most."""
        return self._most([layer.kept for layer in self.layers], self.room)

    def held(self, tokens: int) -> int:
        """Tokens that it holds, of rows that have seen so many, in the layer and the row that hold most."""
        return self._most([layer.tokens for layer in self.layers], tokens)

    def places(self, row: int, tokens: int) -> Int[np.ndarray, "L K T"]:
        """As `Cache.places`; where a layer has a tier on blocks, that is its first."""
        found = super().places(row, tokens)
        for index, shared in enumerate(self.shared):
            if shared:
                found[index] += found[index] >= 0
                found[index, :, : shared.limit] = 0
        return found

    def _most(self, own: list[int], tokens: int) -> int:
        on_blocks = [min(each.limit, tokens) if each else 0 for each in self.shared]
        return max(
            limit + sum(own[place] for place, _ in shares) for limit, shares in zip(on_blocks, self.of, strict=True)
        )

    def draft(self):
        """NotImplementedError: tokens on blocks are written at once, and forgotten by being written over."""
        raise NotImplementedError("a cache on blocks has no draft")
