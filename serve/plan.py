"""What the next step runs, and who waits, stops or begins: no JAX, no clock, nothing but what is handed in.

A step takes so many tokens, of any rows: the one next token of a row that generates, or a part of a prompt. In this order: rows that
generate, the one that has not run for longest first; prompts that have begun; those that wait, by priority and then by arrival. Nobody
overtakes one that there is no room for. Where a row that has begun finds no block, the one of the last priority that came last stops and
waits again; what it had computed stays known as long as there is room, and is put aside in host memory where that is quicker than to
compute it again.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from kvcascade.cache.blocks import Blocks, Table
from kvcascade.cache.errors import BadInput
from kvcascade.cache.retention import Retention

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Tokens of a step's programs; there is one more for the most that a step may have."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one step may do."""

    tokens: int = 128
    """Tokens of a step."""
    rows: int = 32
    """Rows that have begun and are not over."""
    patience: float = math.inf
    """Seconds after which one that waits goes before all that came later, whatever their priority."""
    aside: int = 0
    """Blocks of rows that have stopped that host memory has room for."""

    def __post_init__(self):
        if self.tokens < 1 or self.rows < 1 or not self.patience >= 0 or self.aside < 0:
            raise BadInput(
                "a step has room for a token and a row at least, host memory for 0 blocks, and nobody is patient for less than 0 seconds"
            )

    @functools.cached_property
    def buckets(self) -> list[int]:
        """Tokens of each program."""
        return sorted({count for count in BUCKETS if count < self.tokens} | {self.tokens})

    def drawn(self, bucket: int) -> int:
        """The most tokens that a program draws; of a prompt's last token several rows may go on, so the largest has room for all."""
        return self.rows if bucket == self.tokens else min(bucket, self.rows)

    def bucket(self, tokens: int, drawn: int) -> int:
        """The smallest program for so many tokens, and so many that are drawn."""
        return next(n for n in self.buckets if n >= tokens and self.drawn(n) >= drawn)


@dataclasses.dataclass(eq=False)
class Row:
    """One text that is continued."""

    id: int
    tokens: list[int]
    """The prompt and what has been generated."""
    limit: int
    """The most tokens that it has in the end."""
    arrival: float = 0.0
    priority: int = 0
    """The lowest goes first, as in vLLM."""
    space: bytes = b""
    """The namespace of its prefixes."""
    retention: tuple[Retention, ...] = ()
    forks: int = 0
    """Rows that begin where its prompt ends."""
    last: int = 0
    """The step in which it last ran."""
    place: int = -1
    """Its line of the table of blocks, while it runs."""
    held: Table | None = None
    """Its blocks, while it runs."""
    aside: int = 0
    """Tokens whose keys and values lie in host memory, while it waits after it has stopped."""

    @property
    def table(self) -> Table:
        """Its blocks; AssertionError while it does not run."""
        assert self.held is not None, f"row {self.id} does not run"
        return self.held

    @property
    def behind(self) -> int:
        """Tokens whose keys and values are not there yet: one where it generates."""
        return len(self.tokens) - (self.held.computed if self.held else 0)


class Run(NamedTuple):
    """The tokens of a row from `start` up to `stop`; with the last one comes the next token."""

    row: Row
    start: int
    stop: int


@dataclasses.dataclass
class Queue:
    """All rows that are not over."""

    running: list[Row] = dataclasses.field(default_factory=list)
    waiting: list[Row] = dataclasses.field(default_factory=list)
    """By priority, then by arrival: see `wait`."""
    step: int = 0
    places: list[int] = dataclasses.field(default_factory=list)
    """Lines of the table that nobody has."""
    aside: int = 0
    """Blocks in host memory."""

    @classmethod
    def of(cls, limits: Limits) -> "Queue":
        """Nobody yet."""
        return cls(places=list(range(limits.rows))[::-1])

    def wait(self, row: Row) -> None:
        """Let a row wait for its turn."""
        bisect.insort(self.waiting, row, key=_turn)

    def first(self, limits: Limits, now: float) -> Row:
        """Whose turn it is of those that wait: of those that have waited too long the first that came, if there are any."""
        if limits.patience < math.inf:
            longest = min(self.waiting, key=lambda row: (row.arrival, row.id))
            if now - longest.arrival > limits.patience:
                return longest
        return self.waiting[0]


class Move(NamedTuple):
    """Blocks of a row from the `first` of its text on that go to host memory or come back from it."""

    row: Row
    first: int
    blocks: list[int]


@dataclasses.dataclass
class Plan:
    """A step: what it runs, the blocks that are moved and copied before, and who had to stop or has begun.

    What goes to host memory goes first, then all copies read before one writes, then comes what comes back, and then the step runs.
    """

    runs: list[Run] = dataclasses.field(default_factory=list)
    copies: dict[int, int] = dataclasses.field(default_factory=dict)
    """What is copied into a block."""
    stopped: list[Row] = dataclasses.field(default_factory=list)
    begun: list[Row] = dataclasses.field(default_factory=list)
    out: list[Move] = dataclasses.field(default_factory=list)
    back: list[Move] = dataclasses.field(default_factory=list)
    left: int = 0
    """Tokens that there is room for."""


def check(row: Row, blocks: Blocks, limits: Limits) -> None:
    """BadInput for a row that could never end: it would wait, or stop others, for ever."""
    if not row.tokens:
        raise BadInput("the prompt is empty")
    if len(row.tokens) >= row.limit:
        raise BadInput(f"a prompt of {len(row.tokens)} tokens leaves nothing to generate of {row.limit}")
    if blocks.needed(row.limit) > blocks.count - 1:
        raise BadInput(
            f"{row.limit} tokens take {blocks.needed(row.limit)} blocks of {blocks.size}, and the pool has {blocks.count - 1}"
        )
    if row.forks >= limits.rows:
        raise BadInput(f"{row.forks + 1} continuations are more rows than the {limits.rows} that run at once")


def plan(
    queue: Queue,
    blocks: Blocks,
    limits: Limits,
    now: float,
    reuse: bool = True,
    quicker: Callable[[int], bool] = lambda blocks: True,
) -> Plan:
    """Choose the next step and take the blocks that it needs; `now` is in seconds. Without `reuse` no prefix is looked for.

    `quicker` says whether so many blocks are sooner moved to host memory and back than computed again.
    """
    found = Plan(left=limits.tokens)
    queue.step += 1
    for row in sorted(queue.running, key=_order):
        if row.held:  # it has not stopped for another
            _go_on(queue, blocks, limits, found, row, now, quicker)
    while queue.waiting and found.left:
        row = queue.first(limits, now)
        promised = sum(each.forks for each in queue.running)
        if len(queue.places) < promised + 1 + row.forks:
            break
        # Each row that runs will want a block before long: to take the last ones would be to stop soon.
        table = blocks.admit(row.space, row.tokens, now, row.retention, reuse, spare=len(queue.running))
        if table is None:
            break
        queue.waiting.remove(row)
        queue.running.append(row)
        found.begun.append(row)
        row.held, row.place = table, queue.places.pop()
        _bring_back(queue, blocks, found, row)
        _go_on(queue, blocks, limits, found, row, now, quicker)
    return found


def end(queue: Queue, blocks: Blocks, row: Row, now: float) -> None:
    """Take a row out, wherever it is; its blocks are there for others at once."""
    if row.held is None:
        queue.waiting.remove(row)
        queue.aside -= blocks.needed(row.aside)
        row.aside = 0
        return
    _give_back(queue, blocks, row, now)


def fork(queue: Queue, blocks: Blocks, row: Row, ids: list[int]) -> list[Row]:
    """The rows that begin where a row's prompt ends, which share its blocks; the places were kept for them."""
    found = []
    for each in ids:
        table, place = blocks.fork(row.table), queue.places.pop()
        more = dataclasses.replace(row, id=each, tokens=list(row.tokens), held=table, place=place, forks=0)
        queue.running.append(more)
        found.append(more)
    row.forks = 0
    return found


def _go_on(queue: Queue, blocks: Blocks, limits: Limits, found: Plan, row: Row, now: float, quicker) -> None:
    """Let a row run as far as the step has room, others stopping for its blocks where they must."""
    table = row.table
    start = table.computed
    count = min(len(row.tokens) - start, found.left)
    if not count:
        return
    while (copies := blocks.room(table, start, start + count, now)) is None:
        victim = max(queue.running, key=_turn)
        _stop(queue, blocks, limits, found, victim, now, quicker)
        if victim is row:
            return
    if copies:
        found.copies |= {copy.target: copy.source for copy in copies}
    found.runs.append(Run(row, start, start + count))
    found.left -= count
    row.last = queue.step


def _stop(queue: Queue, blocks: Blocks, limits: Limits, found: Plan, row: Row, now: float, quicker) -> None:
    """Let a row wait again, its keys and values put aside where there is room and it is worth it.

    It is none that has begun in this step, whose keys and values might not be there yet: such a row has blocks for all of its tokens, and
    whoever comes after it has as well, so nobody stops any more.
    """
    kept = [run for run in found.runs if run.row is not row]
    found.left += sum(run.stop - run.start for run in found.runs) - sum(run.stop - run.start for run in kept)
    found.runs = kept
    found.stopped.append(row)
    count = blocks.needed(row.table.computed)
    if count and queue.aside + count <= limits.aside and quicker(count):
        # What is to be copied into a block is not there yet either.
        sources = [found.copies.get(block, block) for block in row.table.blocks[:count]]
        found.out.append(Move(row, 0, sources))
        row.aside = row.table.computed
        queue.aside += count
    blocks.publish(row.table, row.tokens, now)
    _give_back(queue, blocks, row, now)
    queue.wait(row)


def _bring_back(queue: Queue, blocks: Blocks, found: Plan, row: Row) -> None:
    """What is put aside of a row and is not known any more comes back."""
    if not row.aside:
        return
    count, first = blocks.needed(row.aside), row.table.computed // blocks.size
    found.back.append(Move(row, first, row.table.blocks[first:count]))
    queue.aside -= count
    row.table.computed = max(row.table.computed, row.aside)
    row.aside = 0


def _give_back(queue: Queue, blocks: Blocks, row: Row, now: float) -> None:
    """Take a row out of those that run, its blocks and its place with it."""
    queue.running.remove(row)
    blocks.release(row.table, now)
    queue.places.append(row.place)
    row.held, row.place = None, -1


def _order(row: Row) -> tuple:
    """Rows that generate first, by when they last ran; then prompts."""
    generates = row.behind == 1
    return not generates, row.last if generates else row.priority, row.arrival, row.id


def _turn(row: Row) -> tuple:
    return row.priority, row.arrival, row.id
