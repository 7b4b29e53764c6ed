"""What the next step runs, and who waits, stops or begins: no JAX, no clock, nothing but what is handed in.

A step takes so many tokens, of any rows: the one next token of a row that generates, or a part of a prompt. In this order: rows that
generate, the one that has not run for longest first; prompts that have begun; those that wait, by priority and then by arrival. Nobody
overtakes one that there is no room for. Where a row that has begun finds no block, the one of the last priority that came last stops and
waits again; what it had computed stays known as long as there is room, and is put aside in host memory where that is quicker than to
compute it again.

Where rows keep slots of their own, what is in them depends on how tokens entered. So a prompt enters in chunks cut at multiples of a number
of tokens, whatever else a step has, and what follows it token by token; a row that stops is put aside, never computed again; and one that
begins like another goes on from a snapshot of what that had after one of its chunks.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kvcascade.cache.blocks import Blocks, Table
from kvcascade.cache.errors import BadInput
from kvcascade.cache.retention import Retention
from kvcascade.cache.snapshots import Snapshots

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Sizes of a step's programs; there is one more for the most that a step may have."""
CHUNK = 64
"""Tokens of a prompt that enter slots of a row's own at once."""


def sizes(most: int) -> list[int]:
    """Sizes of programs for so many at most."""
    return sorted({count for count in BUCKETS if count < most} | {most})


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
    snapshots: int = 0
    """Bytes of host memory for what rows had in slots of their own after chunks of their prompts."""
    ahead: int = 0
    """Tokens that a row's step computes beyond the next one, at most, where something foresees them."""
    itself: bool = False
    """Whether that is the model, reading less of what is in blocks."""

    def __post_init__(self):
        if self.tokens < 1 or self.rows < 1 or not self.patience >= 0:
            raise BadInput(
                "a step has room for a token and a row at least, and nobody is patient for less than 0 seconds"
            )
        if min(self.aside, self.snapshots, self.ahead) < 0:
            raise BadInput("host memory has room for 0 blocks and bytes at least, and 0 tokens or more are foreseen")

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that enter slots of a row's own at once."""
        return min(CHUNK, max(2, self.tokens))

    @functools.cached_property
    def buckets(self) -> list[int]:
        """Tokens of each program."""
        return sizes(self.tokens)

    def drawn(self, bucket: int) -> int:
        """The most tokens that a program draws; of a prompt's last token several rows may go on, so the largest has room for all."""
        most = min(bucket, self.rows * (1 + self.ahead))
        return max(most, self.rows) if bucket == self.tokens else most

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
    prompt: int = 0
    """How many of its tokens came with the request."""
    draft: list[int] = dataclasses.field(default_factory=list)
    """What is foreseen to follow its tokens, in its next step."""
    state: Any = None
    """What is to be put in its own slots when it begins: a snapshot, or what it had when it stopped."""

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
    """The tokens of a row from `start` up to `stop`, its draft behind its own; with the last one of its own comes the next token."""

    row: Row
    start: int
    stop: int

    @property
    def ahead(self) -> int:
        """How many of them are foreseen."""
        return max(0, self.stop - len(self.row.tokens))

    @property
    def tokens(self) -> list[int]:
        """They themselves."""
        return [*self.row.tokens[self.start : self.stop], *self.row.draft[: self.ahead]]

    @property
    def prompts(self) -> bool:
        """Whether they are of its prompt."""
        return self.start < self.row.prompt


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
    place: int = -1
    """Where the row was."""


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
    snapshots: Snapshots | None = None,
) -> Plan:
    """Choose the next step and take the blocks that it needs; `now` is in seconds. Without `reuse` no prefix is looked for.

    `quicker` says whether so many blocks are sooner moved to host memory and back than computed again. `snapshots` are of rows' own slots.
    """
    found = Plan(left=limits.tokens)
    queue.step += 1
    for row in sorted(queue.running, key=_order):
        if row.held:  # it has not stopped for another
            _go_on(queue, blocks, limits, found, row, now, quicker)
    while queue.waiting and found.left > 0:
        row = queue.first(limits, now)
        promised = sum(each.forks for each in queue.running)
        if len(queue.places) < promised + 1 + row.forks:
            break
        known, state = 0, row.state
        if snapshots and reuse and state is None:
            known, state = snapshots.find(row.space, row.tokens[: min(row.prompt, len(row.tokens) - 1)])
        # Each row that runs will want a block before long: to take the last ones would be to stop soon.
        spare = sum(len(each.tokens) < blocks.limit for each in queue.running)
        table = blocks.admit(row.space, row.tokens, now, row.retention, reuse, spare, known)
        if table is None:
            break
        if row.state is None and table.computed == known:
            row.state = state
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
        new = {"tokens": list(row.tokens), "draft": []}
        more = dataclasses.replace(row, id=each, held=table, place=place, forks=0, **new)
        queue.running.append(more)
        found.append(more)
    row.forks = 0
    return found


def _go_on(queue: Queue, blocks: Blocks, limits: Limits, found: Plan, row: Row, now: float, quicker) -> None:
    """Let a row run as far as the step has room, others stopping for its blocks where they must."""
    table = row.table
    start = table.computed
    count = _count(row, start, blocks.own, limits, found)
    if not count:
        return
    copies = blocks.room(table, start, start + count, now)
    if copies is None:
        count = min(count, len(row.tokens) - start)  # nobody stops for what is only foreseen
        copies = blocks.room(table, start, start + count, now)
    while copies is None:
        victim = max(queue.running, key=_turn)
        _stop(queue, blocks, limits, found, victim, now, quicker)
        if victim is row:
            return
        copies = blocks.room(table, start, start + count, now)
    if copies:
        found.copies |= {copy.target: copy.source for copy in copies}
    row.draft = row.draft[: max(0, start + count - len(row.tokens))]
    found.runs.append(Run(row, start, start + count))
    found.left -= count
    row.last = queue.step


def _count(row: Row, start: int, own: bool, limits: Limits, found: Plan) -> int:
    """How many tokens of a row a step takes. Of a prompt that goes into slots of the row's own it is a chunk or nothing: the first of a step
    always, so that those that generate do not keep prompts out."""
    left = max(0, found.left)
    if not own or start >= row.prompt:
        return min(len(row.tokens) + len(row.draft) - start, left)
    count = min(limits.chunk - start % limits.chunk, row.prompt - start)
    return count if count <= left or not any(run.prompts for run in found.runs) else 0


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
    if blocks.own or (count and queue.aside + count <= limits.aside and quicker(count)):
        # What is to be copied into a block is not there yet either.
        sources = [found.copies.get(block, block) for block in row.table.blocks[:count]]
        found.out.append(Move(row, 0, sources, row.place))
        row.aside = row.table.computed
        row.state = () if blocks.own else None  # until the step is run: no snapshot is to take its place
        queue.aside += count
    blocks.publish(row.table, row.tokens, now)
    _give_back(queue, blocks, row, now)
    queue.wait(row)


def _bring_back(queue: Queue, blocks: Blocks, found: Plan, row: Row) -> None:
    """What is put aside of a row and is not known any more comes back."""
    if not row.aside:
        return
    count, first = blocks.needed(row.aside), row.table.computed // blocks.size
    found.back.append(Move(row, first, row.table.blocks[first:count], row.place))
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
