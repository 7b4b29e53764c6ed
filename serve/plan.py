"""What the next step runs, and who waits, stops or begins: no JAX, no clock, nothing but what is handed in.

A step takes so many tokens, of any rows: the one next token of a row that generates, or a part of a prompt. In this order: rows that
generate, the one that has not run for longest first; prompts that have begun; those that wait, by priority and then by arrival. Nobody
overtakes one that there is no room for. Where a row that has begun finds no block, the one of the last priority that came last stops and
waits again; what it had computed stays known as long as there is room.
"""

import dataclasses
import math
from typing import NamedTuple

from kvcascade.cache.blocks import Blocks, Table
from kvcascade.cache.errors import BadInput
from kvcascade.cache.retention import Retention


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one step may do."""

    tokens: int = 128
    """Tokens of a step."""
    rows: int = 32
    """Rows that have begun and are not over."""
    patience: float = math.inf
    """Seconds after which one that waits goes before all that came later, whatever their priority."""

    def __post_init__(self):
        if self.tokens < 1 or self.rows < 1 or not self.patience >= 0:
            raise BadInput(
                "a step has room for a token and a row at least, and nobody is patient for less than 0 seconds"
            )


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
    step: int = 0
    places: list[int] = dataclasses.field(default_factory=list)
    """Lines of the table that nobody has."""

    @classmethod
    def of(cls, limits: Limits) -> "Queue":
        """Nobody yet."""
        return cls(places=list(range(limits.rows))[::-1])


@dataclasses.dataclass
class Plan:
    """A step: what it runs, the blocks that are copied before, and who had to stop or has begun."""

    runs: list[Run] = dataclasses.field(default_factory=list)
    copies: dict[int, int] = dataclasses.field(default_factory=dict)
    """What is copied into a block before anything is written: all is read before any is copied."""
    stopped: list[Row] = dataclasses.field(default_factory=list)
    begun: list[Row] = dataclasses.field(default_factory=list)


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


def plan(queue: Queue, blocks: Blocks, limits: Limits, now: float, reuse: bool = True) -> Plan:
    """Choose the next step and take the blocks that it needs; `now` is in seconds. Without `reuse` no prefix is looked for."""
    found = Plan()
    queue.step += 1
    for row in sorted(queue.running, key=_order):
        if row in queue.running:  # it has not stopped for another
            _go_on(queue, blocks, limits, found, row, now)
    while queue.waiting and _left(found, limits):
        row = min(queue.waiting, key=lambda row: _turn(row, limits, now))
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
        _go_on(queue, blocks, limits, found, row, now)
    return found


def end(queue: Queue, blocks: Blocks, row: Row, now: float) -> None:
    """Take a row out, wherever it is; its blocks are there for others at once."""
    if row in queue.waiting:
        queue.waiting.remove(row)
        return
    queue.running.remove(row)
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


def _go_on(queue: Queue, blocks: Blocks, limits: Limits, found: Plan, row: Row, now: float) -> None:
    """Let a row run as far as the step has room, others stopping for its blocks where they must."""
    count = min(row.behind, _left(found, limits))
    start = row.table.computed
    if not count:
        return
    while (copies := blocks.room(row.table, start, start + count, now)) is None:
        victim = max(queue.running, key=lambda each: (each.priority, each.arrival, each.id))
        found.runs = [run for run in found.runs if run.row is not victim]
        found.stopped.append(victim)
        blocks.publish(victim.table, victim.tokens, now)
        end(queue, blocks, victim, now)
        queue.waiting.append(victim)
        if victim is row:
            return
    found.copies |= {copy.target: copy.source for copy in copies}
    found.runs.append(Run(row, start, start + count))
    row.last = queue.step


def _give_back(queue: Queue, blocks: Blocks, row: Row, now: float) -> None:
    blocks.release(row.table, now)
    queue.places.append(row.place)
    row.held, row.place = None, -1


def _left(found: Plan, limits: Limits) -> int:
    return limits.tokens - sum(run.stop - run.start for run in found.runs)


def _order(row: Row) -> tuple:
    generates = row.behind == 1
    return not generates, row.last if generates else row.priority, row.arrival, row.id


def _turn(row: Row, limits: Limits, now: float) -> tuple:
    overdue = now - row.arrival > limits.patience
    return not overdue, 0 if overdue else row.priority, row.arrival, row.id
