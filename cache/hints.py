"""What a caller asks to keep, as a memory of each row that policies read."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvcascade.cache.errors import BadInput
from kvcascade.cache.retention import Hint
from kvcascade.cache.statistic import Memory


@dataclasses.dataclass(frozen=True)
class Hints(Memory):
    """The hints that a row was given, at most so many: [B, K, count, 4] int32, of each its start, stop, priority and last position."""

    count: int = 8

    def init(self, batch, heads, ids):
        return jnp.zeros((batch, heads.kv, self.count, 4), jnp.int32)

    def filled(self, held_BKR4: jax.Array, rows: Sequence[Sequence[Hint]]) -> jax.Array:
        """These hints of each row in the place of those that were held; BadInput for more than there is room for, and for ranges that overlap."""
        if len(rows) != len(held_BKR4):
            raise BadInput(f"hints of {len(rows)} rows are given to a cache of {len(held_BKR4)}")
        table = np.zeros((len(rows), 1, self.count, 4), np.int32)
        for row, hints in enumerate(rows):
            if len(hints) > self.count:
                raise BadInput(f"hinted[ranges={self.count}] has room for so many hints, not for {len(hints)}")
            ordered = sorted(hints, key=lambda each: each.start)
            for each, following in itertools.pairwise(ordered):
                if following.start < each.stop:
                    raise BadInput(f"the hints {each} and {following} are about the same positions")
            for place, each in enumerate(ordered):
                table[row, 0, place] = each.start, each.stop, each.priority, each.until
        return jax.device_put(np.broadcast_to(table, held_BKR4.shape), held_BKR4.sharding)
