"""The scheduler over blocks and index with a fake model: keys are the prefix, the next token a hash of what is read through the table."""

import collections
import hashlib
import math
import random

import pytest
from test_blocks import SPACES, Both

from kvcascade.cache.blocks import Blocks
from kvcascade.cache.errors import BadInput
from kvcascade.cache.snapshots import Snapshots
from kvcascade.serve.plan import Limits, Queue, Row, check, end, fork, plan


def follows(space: bytes, prefix: tuple[int, ...]) -> int:
    return hashlib.sha256(space + repr(prefix).encode()).digest()[0] % 3


def alone(row: Row, limit: int) -> list[int]:
    tokens = list(row.tokens)
    while len(tokens) < limit:
        tokens.append(follows(row.space, tuple(tokens)))
    return tokens


class Service:
    """A pool, an index and a queue, and a model that reads and writes through tables."""

    def __init__(self, blocks: Blocks, limits: Limits, reuse: bool = True):
        self.blocks, self.limits, self.reuse, self.queue = blocks, limits, reuse, Queue.of(limits)
        self.content: dict[tuple[int, int], tuple | None] = {}
        self.over: dict[int, list[int]] = {}
        self.counts = collections.Counter()
        self.now = 0.0
        self.host: dict[int, list] = {}

    def quicker(self, blocks: int) -> bool:
        return blocks != 2  # neither always nor never

    def step(self) -> None:
        found = plan(self.queue, self.blocks, self.limits, self.now, self.reuse, self.quicker)
        size = self.blocks.size
        slots = lambda block: [(block, at) for at in range(size)]
        self.counts["found"] += sum(row.table.published for row in found.begun)
        for row, _, taken, _ in found.out:
            assert row in found.stopped and row.id not in self.host
            self.host[row.id] = [[self.content.get(slot) for slot in slots(block)] for block in taken]
        assert sum(run.stop - run.start for run in found.runs) <= self.limits.tokens
        assert len(self.queue.running) + len(self.queue.places) == self.limits.rows
        self.content |= {
            to: self.content.get(slot)
            for target, source in found.copies.items()
            for to, slot in zip(slots(target), slots(source), strict=True)
        }
        for row, first, targets, _ in found.back:
            content = self.host.pop(row.id)
            for block, each in zip(targets, content[first:], strict=True) if targets else ():
                assert self.blocks._own(block), "a block comes back where others read"
                self.content |= dict(zip(slots(block), each, strict=True))
        places = [row.place for row in self.queue.running]
        assert len({*places}) == len(places)
        # All write before one reads, as in a step.
        for run in found.runs:
            for position in range(run.start, run.stop):
                slot = run.row.table.blocks[position // size], position % size
                assert self.blocks._own(slot[0]), "a block is written that others read"
                self.content[slot] = run.row.space, tuple(run.row.tokens[: position + 1])
        for run in found.runs:
            row = run.row
            for position in range(run.stop):
                slot = row.table.blocks[position // size], position % size
                assert self.content[slot] == (row.space, tuple(row.tokens[: position + 1])), "another's tokens are read"
            row.table.computed = run.stop
            if run.stop < len(row.tokens):
                continue
            more = fork(self.queue, self.blocks, row, [row.id * 1000 + index + 1 for index in range(row.forks)])
            self.counts["forks"] += len(more)
            for each in (row, *more):
                each.tokens.append(follows(each.space, tuple(each.tokens)))
                self.blocks.publish(each.table, each.tokens, self.now)
                if len(each.tokens) == each.limit:
                    end(self.queue, self.blocks, each, self.now)
                    self.over[each.id] = each.tokens
        self.counts.update(
            steps=1, stopped=len(found.stopped), back=len(found.back),
            tokens=sum(run.stop - run.start for run in found.runs),
        )  # fmt: skip
        waiting = [row for row in self.queue.waiting if row.aside]
        assert {row.id for row in waiting} == {*self.host}
        assert self.queue.aside == sum(self.blocks.needed(row.aside) for row in waiting) <= self.limits.aside
        self.blocks.check([row.table for row in self.queue.running])
        assert found.runs or not (self.queue.running or self.queue.waiting), "nothing runs, and somebody waits"


def requests(draw: random.Random, count: int, blocks: Blocks, limits: Limits):
    """Rows that could end, half of them with a common beginning."""
    common = [draw.randrange(3) for _ in range(7)]
    for index in range(count):
        most = (blocks.count - 1) * blocks.size
        prompt = (common if draw.random() < 0.5 else []) + [draw.randrange(3) for _ in range(draw.randrange(1, 9))]
        limit = len(prompt) + draw.randrange(1, 12)
        if limit > most:
            continue
        forks = min(draw.choice([0, 0, 0, 1, 3]), limits.rows - 1)
        priority, space = draw.choice([0, 0, 1]), draw.choice(SPACES)
        yield Row(index + 1, prompt, limit, float(index), priority, space, forks=forks)


def serve(seed: int) -> collections.Counter:
    draw = random.Random(seed)
    size = draw.choice([1, 2, 4])
    count = draw.choice([9, 14, 40]) if size > 1 else draw.choice([22, 60])
    limits = Limits(
        draw.choice([1, 3, 8, 64]), draw.choice([1, 2, 6]), draw.choice([math.inf, 5.0]), draw.choice([0, 4, 100])
    )
    service = Service(Blocks(count, size, Both(size)), limits, reuse=draw.random() < 0.8)
    wanted, coming = {}, collections.deque(requests(draw, 12, service.blocks, limits))
    for row in coming:
        check(row, service.blocks, limits)
        for number in (row.id, *(row.id * 1000 + index + 1 for index in range(row.forks))):
            wanted[number] = alone(row, row.limit)
    gone = set()
    for _ in range(3000):
        service.now += 1
        if coming and draw.random() < 0.4:
            service.queue.wait(coming.popleft())
        everyone = service.queue.running + service.queue.waiting
        if everyone and draw.random() < 0.02:
            row = draw.choice(everyone)
            gone |= {row.id} if not row.forks else {row.id, *(row.id * 1000 + index + 1 for index in range(row.forks))}
            end(service.queue, service.blocks, row, service.now)
            service.host.pop(row.id, None)
            service.counts["cancelled"] += 1
        service.step()
        if not coming and not service.queue.running and not service.queue.waiting:
            break
    assert {number: tokens for number, tokens in wanted.items() if number not in gone} == service.over
    assert service.blocks.states()["used"] == 0
    return service.counts


@pytest.mark.slow
def test_everybody_gets_what_they_would_get_alone() -> None:
    counts = sum(map(serve, range(150)), collections.Counter())
    assert min(counts[each] for each in ("stopped", "forks", "found", "cancelled", "back")) > 30, counts


def rows(*prompts: int, **more) -> list[Row]:
    return [Row(index, [1] * count, count + 4, float(index), **more) for index, count in enumerate(prompts)]


def test_who_generates_runs_before_a_prompt_that_begins() -> None:
    limits, blocks = Limits(tokens=4, rows=4), Blocks(40, 2)
    queue = Queue.of(limits)
    queue.waiting += rows(1, 9)
    for runs in ([(0, 0, 1), (1, 0, 3)], [(0, 1, 2), (1, 3, 6)], [(0, 2, 3), (1, 6, 9)]):
        found = plan(queue, blocks, limits, 0.0)
        assert [(run.row.id, run.start, run.stop) for run in found.runs] == runs
        for run in found.runs:
            run.row.table.computed = run.stop
            if run.stop == len(run.row.tokens):
                run.row.tokens.append(2)


def test_with_too_few_tokens_all_take_turns() -> None:
    few, blocks = Limits(tokens=2, rows=4), Blocks(40, 4)
    queue = Queue.of(few)
    queue.waiting += rows(1, 1, 1, 1)
    ran = collections.Counter()
    for step in range(13):  # in the first all begin
        for run in plan(queue, blocks, few if step else Limits(tokens=4, rows=4), 0.0).runs:
            run.row.table.computed = run.stop
            run.row.tokens.append(2)
            ran[run.row.id] += 1
    assert max(ran.values()) - min(ran.values()) <= 1 and len(ran) == 4


def test_priority_and_patience() -> None:
    limits = Limits(tokens=8, rows=1, patience=10.0)
    for now, first in ((5.0, 1), (11.0, 0)):
        queue = Queue.of(limits)
        for row in (Row(0, [1], 4, 0.0, priority=5), Row(1, [1], 4, 1.0, priority=0)):
            queue.wait(row)
        assert [row.id for row in plan(queue, Blocks(9, 2), limits, now).begun] == [first]


def test_what_is_put_aside_comes_back() -> None:
    """The row that came last stops for the first one's blocks; what its prefix does not find in the pool comes from the host."""
    limits, blocks = Limits(tokens=64, rows=2, aside=9), Blocks(9, 2)
    queue = Queue.of(limits)
    first, last = Row(0, [1] * 5, 16, 0.0), Row(1, [2] * 5, 16, 1.0)
    for row in (first, last):
        queue.wait(row)
    while not (found := plan(queue, blocks, limits, 0.0)).stopped:
        for row, _, stop in found.runs:
            row.table.computed = stop
            row.tokens.append(3)
    assert [(row.id, at, len(moved)) for row, at, moved, _ in found.out] == [(1, 0, 4)]
    assert last.aside == 8 and queue.aside == 4 and not found.back
    end(queue, blocks, first, 0.0)
    found = plan(queue, blocks, limits, 0.0)
    assert last.table.computed == 8 and queue.aside == last.aside == 0
    (move,) = found.back
    assert move.blocks == last.table.blocks[move.first : 4] and [run.start for run in found.runs] == [8]


def test_nobody_overtakes_one_that_there_is_no_room_for() -> None:
    limits, blocks = Limits(tokens=64, rows=4), Blocks(6, 2)
    queue = Queue.of(limits)
    queue.waiting += rows(6, 6, 1)
    assert [row.id for row in plan(queue, blocks, limits, 0.0).begun] == [0]


@pytest.mark.parametrize(
    "row, reason",
    [
        (Row(0, [], 4), "the prompt is empty"),
        (Row(0, [1, 2], 2), "leaves nothing to generate of 2"),
        (Row(0, [1], 17), "17 tokens take 9 blocks of 2, and the pool has 8"),
        (Row(0, [1], 4, forks=3), "4 continuations are more rows than the 3"),
    ],
)
def test_what_could_never_end_is_refused(row: Row, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        check(row, Blocks(9, 2), Limits(rows=3))
    with pytest.raises(BadInput, match="a token and a row at least"):
        Limits(tokens=0)


def groups(prompt: int, limit: int, chunk: int, enough: int) -> list[tuple[int, int]]:
    """In which pieces a text's tokens are to come into slots of its own: of those that are not on blocks alone."""
    stops = [*range(chunk, prompt, chunk), *range(prompt, limit)]
    pieces = zip([0, *stops], stops, strict=False)
    return [(max(start, enough), stop) for start, stop in pieces if stop > enough]


def serve_rows(seed: int) -> collections.Counter:
    """Rows with slots of their own, which are a list of the pieces in which tokens came: moved, copied and found again as contents are."""
    draw = random.Random(seed)
    size, limit = draw.choice([1, 2, 4]), draw.choice([0, 4, 6, 8])
    enough = draw.choice([limit, limit, 0])
    limits = Limits(draw.choice([2, 4, 7, 30]), draw.choice([1, 3, 6]), snapshots=draw.choice([0, 3, 50]))
    chunk, counts = limits.chunk, collections.Counter()
    blocks = Blocks(max(2, draw.choice([6, 9, 30])), size, limit=limit, enough=enough)
    snapshots, queue = Snapshots(limits.snapshots, chunk), Queue.of(limits)
    own: dict[int, list] = {}
    coming = collections.deque(requests(draw, 14, Blocks(40, 4), limits))
    for row in coming:
        row.prompt = len(row.tokens)
    if limit:
        coming = collections.deque(row for row in coming if blocks.needed(row.limit) < blocks.count)
    now, over = 0.0, []
    for _ in range(3000):
        now += 1
        if coming and draw.random() < 0.5:
            check(coming[0], blocks, limits)
            queue.wait(coming.popleft())
        everyone = queue.running + queue.waiting
        if everyone and draw.random() < 0.02:
            end(queue, blocks, draw.choice(everyone), now)
        found = plan(queue, blocks, limits, now, True, lambda blocks: True, snapshots)
        for move in found.out:
            move.row.state = list(own[move.place])
        for row in found.begun:
            counts["snapshots"] += row.state is not None and row not in [move.row for move in found.back]
            own[row.place], row.state = list(row.state or []), None
        counts.update(
            stopped=len(found.stopped), back=len(found.back), blocks=sum(0 < r.table.published for r in found.begun)
        )
        for run in found.runs:
            row, held = run.row, own[run.row.place]
            assert run.start == row.table.computed and (held[-1][1] if held else min(run.start, enough)) == run.start
            held += [(max(run.start, enough), run.stop)] if run.stop > enough else []
            row.table.computed = run.stop
            begun = row.tokens[: run.stop]
            if run.prompts and run.stop > enough and snapshots.lacks(row.space, begun):
                snapshots.keep(row.space, begun, list(held), 1)
            if run.stop < len(row.tokens):
                continue
            more = fork(queue, blocks, row, [row.id * 1000 + index + 1 for index in range(row.forks)])
            counts["forks"] += len(more)
            for each in more:
                own[each.place] = list(held)
            for each in (row, *more):
                each.tokens.append(follows(each.space, tuple(each.tokens)))
                blocks.publish(each.table, each.tokens, now)
                if len(each.tokens) == each.limit:
                    assert own[each.place] == groups(each.prompt, each.limit, chunk, enough)
                    assert each.tokens == alone(Row(0, each.tokens[: each.prompt], 0, space=each.space), each.limit)
                    end(queue, blocks, each, now)
                    over.append(each)
        blocks.check([row.table for row in queue.running])
        assert found.runs or not (queue.running or queue.waiting), "nothing runs, and somebody waits"
        if not (coming or queue.running or queue.waiting):
            break
    assert not queue.running and not queue.waiting and blocks.states()["used"] == 0 and not queue.aside
    counts["over"] += len(over)
    return counts


@pytest.mark.slow
def test_whatever_happens_tokens_come_into_slots_of_their_own_in_the_same_pieces(monkeypatch) -> None:
    """A row that was stopped, copied, or began from a snapshot has in its slots what it would have alone: a function of its tokens."""
    monkeypatch.setattr("kvcascade.serve.plan.CHUNK", 4)
    counts = sum(map(serve_rows, range(100)), collections.Counter())
    assert min(counts[each] for each in ("stopped", "back", "forks", "snapshots", "blocks", "over")) > 15, counts
