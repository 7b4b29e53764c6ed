"""Who has which block of a pool: references, copies on write, and whose content goes first when there is no room. No JAX here.

A block is free, in use (somebody's table names it), or idle: nobody's, but the index knows its content, so it can be found again until
its room is needed. Block 0 is nobody's for ever: what stands for no block, and may be written by padding.
"""

import dataclasses
import heapq
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvcascade.cache.errors import BadInput
from kvcascade.cache.prefix import HashChain, Index
from kvcascade.cache.retention import USUAL, Retention

EVERY = sys.maxsize
"""As many tokens as there are."""


@dataclasses.dataclass
class Table:
    """The blocks of one row of tokens, in the order of their positions."""

    space: bytes
    """The namespace of its prefixes."""
    blocks: list[int]
    computed: int = 0
    """Tokens whose keys and values are written, and will not be taken back."""
    published: int = 0
    """Blocks that the index knows."""
    retention: tuple[Retention, ...] = ()


class Copy(NamedTuple):
    """A block that must be copied before anything is written. All copies of a step read before one of them writes."""

    source: int
    target: int


@dataclasses.dataclass
class Known:
    """What counts when an idle block's room is wanted."""

    used: int
    priority: int = USUAL
    until: float = -math.inf
    """When the priority becomes the usual one, in seconds."""

    def at(self, now: float) -> int:
        """The priority at a time."""
        return self.priority if now < self.until else USUAL


class Blocks:
    """The bookkeeping of a pool of blocks, each of so many tokens; what is in them lies elsewhere (cache/block_cache.py).

    Whatever must be made room for is of the least priority, of equals the one used longest ago, and never one that something known is behind.
    Times are the caller's, in seconds, and must not go back.
    """

    def __init__(
        self, count: int, size: int, index: Index | None = None, limit: int = EVERY, enough: int | None = None
    ):
        """The first `limit` tokens of a row are on blocks; of the first `enough`, by default of all, there is nothing elsewhere."""
        if count < 2 or size < 1:
            raise BadInput(f"a pool has 2 blocks or more of 1 token or more, not {count} of {size}")
        self.count, self.size, self.limit = count, size, limit
        self.enough = EVERY if enough is None else enough
        self.index: Index = HashChain(size) if index is None else index
        self.references = [0] * count
        self.evictions = 0
        self._free = list(range(count - 1, 0, -1))
        self._known: dict[int, Known] = {}
        self._idle: set[int] = set()
        self._clock = 0
        self._first: list[tuple[int, int, int]] = []  # priority, last use, block; some are out of date
        self._ends: list[tuple[float, int, int]] = []  # when a priority ends, last use, block

    @property
    def own(self) -> bool:
        """Whether rows keep something else than their blocks."""
        return self.enough < EVERY

    @property
    def available(self) -> int:
        """Blocks that could be taken now."""
        return len(self._free) + len(self._idle)

    def states(self) -> dict[str, int]:
        """How many blocks are free, in use and idle."""
        free, idle = len(self._free), len(self._idle)
        return {"free": free, "used": self.count - 1 - free - idle, "idle": idle}

    def needed(self, tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-min(tokens, self.limit) // self.size)

    def admit(
        self,
        space: bytes,
        tokens: Sequence[int],
        now: float,
        retention: Sequence[Retention] = (),
        reuse: bool = True,
        spare: int = 0,
        elsewhere: int = 0,
    ) -> Table | None:
        """A table for all these tokens, with the longest prefix that is known, but for the last token; None, and no change, without room.

        What was found is held before anything is taken: room might be made of it. So many blocks must be `spare` after that. What a row has
        `elsewhere` after so many tokens is known: they are computed if those of them that belong on blocks are found there.
        """
        found = self.index.match(space, tokens[: min(len(tokens) - 1, self.limit)]) if reuse else []
        both = elsewhere and len(found) * self.size >= min(elsewhere, self.limit)
        computed = elsewhere if both else min(len(found), self.enough // self.size) * self.size
        del found[self.needed(computed) :]
        for block in found:
            self._hold(block)
        lacking = self.needed(len(tokens)) - len(found)
        fresh = self._take(lacking, now) if lacking + spare <= self.available else None
        if fresh is None:
            for block in reversed(found):
                self._drop(block, now)
            return None
        table = Table(space, found + fresh, computed, min(computed, self.limit) // self.size, tuple(retention))
        self._use(table, range(len(found)), now)
        return table

    def room(self, table: Table, start: int, stop: int, now: float) -> list[Copy] | None:
        """Let a row write the positions from `start` up to `stop`: it gets the blocks that it lacks, and its own copy of those that others
        read or the index knows. None, and no change, without room."""
        have, lacking = len(table.blocks), self.needed(stop) - len(table.blocks)
        places = range(start // self.size, min(have + lacking, have))
        shared = [place for place in places if not self._own(table.blocks[place])]
        if not shared and lacking <= 0:
            return []
        fresh = self._take(len(shared) + max(0, lacking), now)
        if fresh is None:
            return None
        copies = []
        for place, target in zip(shared, fresh, strict=False):
            copies.append(Copy(table.blocks[place], target))
            self._drop(table.blocks[place], now)
            table.blocks[place] = target
        table.blocks += fresh[len(shared) :]
        return copies

    def publish(self, table: Table, tokens: Sequence[int], now: float) -> None:
        """Let others find the full blocks of what is computed; where a prefix is known already, its block takes the place of the row's own.

        Rows that share a block must share all before it, else what is in use could stand behind what is idle: so a block of several rows is
        not replaced, and nothing behind it published, until one row has it.
        """
        first, known = table.published, min(table.computed, self.limit) // self.size
        if first >= known:
            return
        for place in range(first, known):  # what is published is not looked at again: this runs for every token
            part = tuple(tokens[place * self.size : (place + 1) * self.size])
            own, before = table.blocks[place], table.blocks[place - 1] if place else None
            block = self.index.insert(table.space, before, part, own)
            if block is None or block != own and self.references[own] > 1:
                known = place
                break
            if block != own:
                self._hold(block)
                self._drop(own, now)
                table.blocks[place] = block
        table.published = max(first, known)
        self._use(table, range(first, table.published), now)

    def truncate(self, table: Table, length: int, now: float) -> None:
        """Take back all tokens from a length on: blocks that have none of the others are given back."""
        keep = self.needed(length)
        for block in reversed(table.blocks[keep:]):
            self._drop(block, now)
        del table.blocks[keep:]
        table.computed = min(table.computed, length)
        table.published = min(table.published, length // self.size)

    def fork(self, table: Table) -> Table:
        """Another row with the same past; what either writes into a block of both is written into a copy."""
        for block in table.blocks:
            self._hold(block)
        return dataclasses.replace(table, blocks=list(table.blocks))

    def release(self, table: Table, now: float) -> None:
        """Give all blocks back; what the index knows of them can be found until its room is needed, the end of the row first."""
        self._use(table, range(table.published), now)
        self.truncate(table, 0, now)

    def check(self, tables: Iterable[Table]) -> None:
        """AssertionError if a block is lost, is in two states, or is named by another number of these tables, which are all, than is counted."""
        live = Counter(block for table in tables for block in table.blocks)
        assert 0 not in live, "block 0 is in use"
        free = Counter(self._free)
        for block in range(1, self.count):
            assert self.references[block] == live[block], (
                f"block {block}: {self.references[block]} references, {live[block]} tables"
            )
            states = free[block] + (block in self._idle) + (live[block] > 0)
            assert states == 1, f"block {block} is in {states} states"
            assert block not in self._idle or block in self.index, f"block {block} is idle and not known"
            assert not free[block] or block not in self.index, f"block {block} is free and known"

    def _own(self, block: int) -> bool:
        return self.references[block] == 1 and block not in self.index

    def _take(self, count: int, now: float) -> list[int] | None:
        if count > self.available:
            return None
        while len(self._free) < count:
            self._evict(now)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self.references[block] = 1
        return taken

    def _hold(self, block: int) -> None:
        self.references[block] += 1
        self._idle.discard(block)

    def _drop(self, block: int, now: float) -> None:
        self.references[block] -= 1
        if self.references[block]:
            return
        if block in self.index:
            self._idle.add(block)
            self._offer(block, now)
        else:
            self._free.append(block)

    def _use(self, table: Table, places: range, now: float) -> None:
        """Note that known blocks of a row are used, the last ones first, so that of a row its end goes first."""
        for place in reversed(places):
            start, stop = place * self.size, (place + 1) * self.size
            self._clock += 1
            block = table.blocks[place]
            known = self._known.setdefault(block, Known(self._clock))
            known.used = self._clock
            over = [each for each in table.retention if each.start < stop and start < each.stop]
            best = max(over, key=lambda each: (each.priority, each.seconds), default=None)
            if best is None:
                continue
            said = best.priority, now + best.seconds
            if now >= known.until or said > (known.priority, known.until):  # of several that hold the highest counts
                known.priority, known.until = said

    def _offer(self, block: int, now: float) -> None:
        """Put an idle block among those that may go, if nothing is behind it."""
        if block not in self._idle:
            return
        if max(len(self._first), len(self._ends)) > 2 * self.count + 64:  # most of it is out of date
            self._first, self._ends = [], []
            for each in self._idle:
                self._push(each, now)
        else:
            self._push(block, now)

    def _push(self, block: int, now: float) -> None:
        if not self.index.last(block):
            return
        known = self._known[block]
        heapq.heappush(self._first, (known.at(now), known.used, block))
        if now < known.until < math.inf:
            heapq.heappush(self._ends, (known.until, known.used, block))

    def _evict(self, now: float) -> None:
        """Make a free block of the idle one that goes first; there must be one."""
        while self._ends and self._ends[0][0] <= now:
            _, used, block = heapq.heappop(self._ends)
            if block in self._idle and self._known[block].used == used:
                self._offer(block, now)
        while True:
            priority, used, block = heapq.heappop(self._first)
            if block not in self._idle or self._known[block].used != used:
                continue
            if self._known[block].at(now) != priority:  # it has ended since
                self._offer(block, now)
                continue
            break
        before = self.index.remove(block)
        self._idle.remove(block)
        del self._known[block]
        self._free.append(block)
        self.evictions += 1
        if before is not None:
            self._offer(before, now)
