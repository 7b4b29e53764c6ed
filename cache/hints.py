"""What a caller asks to keep: ranges of positions, each with a priority from 0 to 100 and how long it holds."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvcascade.cache.errors import BadInput
from kvcascade.cache.statistic import Memory

USUAL = 35
"""The priority of a position that no hint is about, or none any more (TensorRT-LLM's default)."""
LAST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Hint:
    """The priority of the positions from `start` up to `stop`, until so many positions after them have come; None: for good."""

    start: int
    stop: int
    priority: int
    duration: int | None = None

    def __post_init__(self):
        if not 0 <= self.start < self.stop <= LAST:
            raise BadInput(f"a range of positions goes from 0 or more to more than that, not {self.start}:{self.stop}")
        if not 0 <= self.priority <= 100:
            raise BadInput(f"a priority is from 0 to 100, not {self.priority}")
        if self.duration is not None and not 0 <= self.duration <= LAST:
            raise BadInput(f"a priority holds for 0 positions or more, not {self.duration}")

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}={self.priority}" + ("" if self.duration is None else f"@{self.duration}")

    @property
    def until(self) -> int:
        """The newest position at which it still holds."""
        return LAST if self.duration is None else min(self.stop - 1 + self.duration, LAST)


def hint(text: str) -> Hint:
    """The hint that a text such as `0:200=90@500` or `0:200=90` says; BadInput for another."""
    found = re.fullmatch(r"(\d+):(\d+)=(\d+)(?:@(\d+))?", text)
    if not found:
        raise BadInput(f"{text!r} is no hint: a range of positions and a priority, such as 0:200=90 or 0:200=90@500")
    start, stop, priority, duration = found.groups()
    return Hint(int(start), int(stop), int(priority), None if duration is None else int(duration))


@dataclasses.dataclass(frozen=True)
class Hints(Memory):
    """The hints that a row was given, at most so many: [B, K, count, 4] int32, of each its start, stop, priority and last position."""

    count: int = 8

    def init(self, batch, heads, layer):
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
