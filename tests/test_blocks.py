"""Blocks and the index of prefixes against an oracle: every token that can be read is of its own prefix, whatever was shared, copied or forgotten."""

import ast
import collections
import random
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcascade.cache import blocks as blocks_module
from kvcascade.cache import prefix as prefix_module
from kvcascade.cache.blocks import Blocks, Copy, Known, Table
from kvcascade.cache.errors import BadInput
from kvcascade.cache.prefix import HashChain, Radix, namespace
from kvcascade.cache.retention import USUAL, Retention

SPACES = namespace(salt="a"), namespace(salt="b")


class Both:
    """A chain of hashes and a radix tree, which must say the same."""

    def __init__(self, size: int):
        self.indices = HashChain(size), Radix(size)
        self.size = size

    def _same(self, name: str, *arguments):
        one, other = (getattr(each, name)(*arguments) for each in self.indices)
        assert one == other, f"{name}: {one} and {other}"
        assert len(self.indices[0]) == len(self.indices[1])
        return one

    def match(self, space, tokens):
        return self._same("match", space, tokens)

    def insert(self, space, before, part, block):
        return self._same("insert", space, before, part, block)

    def remove(self, block):
        return self._same("remove", block)

    def last(self, block):
        return self._same("last", block)

    def __contains__(self, block):
        return self._same("__contains__", block)


class World:
    """A pool whose content is what a token's keys follow from: the namespace and the prefix. All operations, and what must hold after each."""

    def __init__(self, count: int, size: int):
        self.index = Both(size)
        self.blocks = Blocks(count, size, self.index)
        self.rows: list[tuple[Table, list[int]]] = []
        self.content: dict[tuple[int, int], tuple | None] = {}
        self.now = 0.0
        self.counts = collections.Counter()

    def admit(self, tokens: list[int], space: int, retention: tuple[Retention, ...] = ()) -> None:
        table = self.blocks.admit(SPACES[space], tokens, self.now, retention)
        if table is None:
            assert self.blocks.available < self.blocks.needed(len(tokens)), "refused, and there was room"
            return
        assert table.computed < len(tokens), "nothing is left to compute"
        self.rows.append((table, tokens))
        self.counts["hits"] += table.computed > 0

    def compute(self, row: int, stop: int) -> None:
        table, tokens = self.rows[row]
        start, stop = table.computed, min(stop, len(tokens))
        if start >= stop:
            return
        copies = self.blocks.room(table, start, stop, self.now)
        if copies is None:
            return
        self.counts["copies"] += len(copies)
        held = {copy: [self.content.get((copy.source, at)) for at in range(self.blocks.size)] for copy in copies}
        for copy, found in held.items():
            for at, each in enumerate(found):
                self.content[copy.target, at] = each
        for position in range(start, stop):
            place = table.blocks[position // self.blocks.size], position % self.blocks.size
            self.content[place] = table.space, tuple(tokens[: position + 1])
        table.computed = stop

    def check(self) -> None:
        blocks, size = self.blocks, self.blocks.size
        blocks.check([table for table, _ in self.rows])
        for table, tokens in self.rows:
            for position in range(table.computed):
                found = self.content[table.blocks[position // size], position % size]
                assert found == (table.space, tuple(tokens[: position + 1])), "a row reads another's tokens"
        chain = self.index.indices[0]
        for link in chain._links.values():
            prefix, each = [], link
            while each is not None:
                prefix = [*each.part, *prefix]
                each = None if each.before is None else chain._links[each.before]
            block = chain._blocks[link.key]
            for at in range(size):
                wanted = link.space, tuple(prefix[: len(prefix) - size + at + 1])
                assert self.content[block, at] == wanted, "the index names a block of other content"

    def victims(self) -> list[int]:
        """The idle blocks in the order in which they would go, worked out anew each time."""
        chain = self.index.indices[0]
        left = {block: chain._links[block] for block in self.blocks._idle}
        order = []
        while left:
            behind = {link.before for link in left.values()} | {
                link.before for block, link in chain._links.items() if block not in self.blocks._idle
            }
            known = self.blocks._known
            rank = {b: known[b].priority if self.now < known[b].until else USUAL for b in left}
            best = min((b for b in left if b not in behind), key=lambda b: (rank[b], known[b].used))
            order.append(best)
            del left[best]
        return order


def drive(world: World, draw: random.Random, steps: int) -> None:
    """So many operations at random, everything checked after each."""
    for _ in range(steps):
        kind = draw.random()
        world.now += draw.choice([0, 0, 1, 4])
        row = draw.randrange(len(world.rows)) if world.rows else None
        if kind < 0.3 or row is None:
            stop = draw.randrange(1, 13)
            retention = (Retention(0, stop, draw.choice([0, 90]), draw.choice([3.0, 30.0, float("inf")])),)
            tokens = [draw.randrange(2) for _ in range(stop)]
            world.admit(tokens, draw.randrange(2), retention if draw.random() < 0.4 else ())
        else:
            act(world, draw, kind, row)
        world.check()
        wanted = world.victims()
        if wanted and not world.blocks._free and draw.random() < 0.7:
            # Take one, and see that it was the right one.
            taken, *_ = world.blocks._take(1, world.now) or [0]
            assert taken == wanted[0], f"block {taken} went before block {wanted[0]}"
            world.counts["evicted"] += 1
            world.blocks._drop(taken, world.now)
            world.check()


def act(world: World, draw: random.Random, kind: float, row: int) -> None:
    blocks, (table, tokens) = world.blocks, world.rows[row]
    if kind < 0.5:
        world.compute(row, draw.randrange(len(tokens) + 1))
    elif kind < 0.6:
        tokens.append(draw.randrange(2))
        world.compute(row, len(tokens))
    elif kind < 0.65:
        length = draw.randrange(len(tokens) + 1)
        blocks.truncate(table, length, world.now)
        del tokens[max(length, 1) :]
    elif kind < 0.7 and len(world.rows) < 8:
        world.rows.append((blocks.fork(table), list(tokens)))
        world.counts["forks"] += 1
    elif kind < 0.75:
        blocks.publish(table, tokens, world.now)
    else:
        blocks.publish(table, tokens, world.now)
        blocks.release(table, world.now)
        del world.rows[row]


def fuzz(seed: int, steps: int = 100) -> collections.Counter:
    draw = random.Random(seed)
    world = World(draw.choice([4, 8, 24]), draw.choice([1, 2, 4]))
    drive(world, draw, steps)
    for table, _ in world.rows:
        world.blocks.release(table, world.now)
    world.rows = []
    world.check()
    states = world.blocks.states()
    assert states["used"] == 0 and sum(states.values()) == world.blocks.count - 1
    return world.counts


def test_ten_thousand_operations() -> None:
    counts = sum((fuzz(seed) for seed in range(100)), collections.Counter())
    assert min(counts[each] for each in ("hits", "copies", "forks", "evicted")) > 20, counts


class Machine(RuleBasedStateMachine):
    """The same operations as hypothesis draws them, so that a failure is made small."""

    rows = st.integers(0, 7)

    @initialize(count=st.integers(2, 12), size=st.integers(1, 3))
    def begin(self, count: int, size: int) -> None:
        self.world = World(count, size)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), space=st.integers(0, 1))
    def admit(self, tokens: list[int], space: int) -> None:
        self.world.admit(tokens, space)

    @precondition(lambda self: self.world.rows)
    @rule(row=rows, kind=st.floats(0.31, 1), seed=st.integers(0, 99))
    def act(self, row: int, kind: float, seed: int) -> None:
        act(self.world, random.Random(seed), kind, row % len(self.world.rows))

    @rule(seconds=st.integers(0, 5))
    def wait(self, seconds: int) -> None:
        self.world.now += seconds

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


class Undone(Exception):
    """A mutation's text is not in the source any more."""


def mutant(module, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the classes of a module whose source has been changed in the place of its own."""
    source = Path(module.__file__).read_text("utf-8")
    if source.count(old) != 1:
        raise Undone(old)
    names: dict = {"__name__": module.__name__}
    exec(compile(ast.parse(source.replace(old, new)), module.__file__, "exec"), names)
    for name, value in names.items():
        for at in (module, blocks_module, prefix_module):
            if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(at, name):
                monkeypatch.setattr(at, name, value)
            elif (
                isinstance(value, Callable)
                and getattr(value, "__module__", "") == module.__name__
                and hasattr(at, name)
            ):
                monkeypatch.setattr(at, name, value)
    for name in ("Blocks", "HashChain", "Radix"):
        monkeypatch.setitem(globals(), name, getattr(blocks_module if name == "Blocks" else prefix_module, name))


B, P = blocks_module, prefix_module
MUTATIONS = {
    "room is made before what was found is held": (
        B,
        "            self._hold(block)\n        lacking = self.needed(len(tokens))",
        "            pass\n        lacking = self.needed(len(tokens))",
    ),
    "what was found is not let go without room": (
        B,
        "            for block in reversed(found):\n                self._drop(block, now)\n            return None",
        "            return None",
    ),
    "no token is left to compute": (B, "tokens[: min(len(tokens) - 1, self.limit)]) if reuse", "tokens) if reuse"),
    "a known block is written": (
        B,
        "return self.references[block] == 1 and block not in self.index",
        "return self.references[block] == 1",
    ),
    "a shared block is written": (
        B,
        "return self.references[block] == 1 and block not in self.index",
        "return block not in self.index",
    ),
    "a copied block is not let go": (
        B,
        "            self._drop(table.blocks[place], now)\n            table.blocks[place] = target",
        "            table.blocks[place] = target",
    ),
    "blocks are published that are not full": (
        B,
        "known = table.published, min(table.computed, self.limit) // self.size",
        "known = table.published, self.needed(table.computed)",
    ),
    "tokens are published that are not computed": (
        B,
        "known = table.published, min(table.computed, self.limit) // self.size",
        "known = table.published, len(tokens) // self.size",
    ),
    "a replaced block is lost": (B, "                self._drop(own, now)\n", ""),
    "a block of several rows is replaced": (
        B,
        "if block is None or block != own and self.references[own] > 1:",
        "if block is None:",
    ),
    "a replacement is not held": (
        B,
        "                self._hold(block)\n                self._drop(own",
        "                self._drop(own",
    ),
    "what is taken back stays published": (
        B,
        "        table.published = min(table.published, length // self.size)\n",
        "",
    ),
    "what is taken back stays computed": (B, "        table.computed = min(table.computed, length)\n", ""),
    "a fork holds nothing": (B, "        for block in table.blocks:\n            self._hold(block)\n", ""),
    "a fork shares its table": (
        B,
        "dataclasses.replace(table, blocks=list(table.blocks))",
        "dataclasses.replace(table)",
    ),
    "idle blocks are not known to be": (B, "            self._idle.add(block)\n", ""),
    "a held block stays idle": (B, "        self._idle.discard(block)\n", ""),
    "the newest goes first": (
        B,
        "heapq.heappush(self._first, (known.at(now), known.used, block))",
        "heapq.heappush(self._first, (known.at(now), -known.used, block))",
    ),
    "priorities do not count": (B, "return self.priority if now < self.until else USUAL", "return USUAL"),
    "priorities do not end": (B, "return self.priority if now < self.until else USUAL", "return self.priority"),
    "an end is not looked for": (B, "while self._ends and self._ends[0][0] <= now:", "while False:"),
    "what stands before one that went cannot go": (
        B,
        "        if before is not None:\n            self._offer(before, now)\n",
        "",
    ),
    "one goes that something is behind": (
        B,
        "        if not self.index.last(block):\n            return\n        known",
        "        known",
    ),
    "namespaces are one": (P, "        name, before = space, None\n", "        name, before = b'', None\n"),
    "a hash forgets what is before": (P, "hashlib.sha256(before + struct", "hashlib.sha256(b'' + struct"),
    "a chain does not count what is behind": (P, "            self._links[before].behind += 1\n", "            pass\n"),
    "a radix node splits one too far": (
        P,
        "            self._split(node, place)\n",
        "            self._split(node, min(place + 1, len(node.blocks) - 1))\n",
    ),
    "a split node keeps its children": (
        P,
        "        for each in rest.below.values():\n            each.above = rest\n",
        "",
    ),
    "a radix tree forgets to join": (P, "        if len(above.below) == 1:  # nothing", "        if False:  # nothing"),
}
EQUIVALENT = {"a radix tree forgets to join"}
"""Changes that no operation can tell: the tree is only less compact."""


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(*MUTATIONS[name], monkeypatch)
    caught = None
    for seed in range(100):
        try:
            fuzz(seed)
        except Exception as error:
            caught = error
            break
    assert (caught is None) == (name in EQUIVALENT), caught


def test_equal_hashes_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_module, "key", lambda before, part: bytes([sum(part) % 2]))
    chain = HashChain(1)
    assert chain.insert(SPACES[0], None, (0,), 1) == 1
    assert chain.insert(SPACES[0], None, (2,), 2) is None  # the same hash of other tokens
    assert chain.insert(SPACES[1], None, (0,), 3) is None  # of another tenant
    assert chain.match(SPACES[0], [0]) == [1]
    assert chain.match(SPACES[0], [2]) == chain.match(SPACES[1], [0]) == []
    pool = Blocks(8, 1, chain)
    table = pool.admit(SPACES[0], [2, 4], 0.0)
    assert table is not None
    table.computed = 2
    pool.publish(table, [2, 4], 0.0)
    assert table.published == 0
    pool.check([table])


def test_namespaces_do_not_run_together() -> None:
    assert namespace(model="ab", salt="c") != namespace(model="a", salt="bc")
    assert namespace(size=1) != namespace(size="1")
    assert namespace(a="x", b="y") == namespace(b="y", a="x")


def test_priority_protects_until_it_ends() -> None:
    pool = Blocks(4, 1)
    for first, retention in ((1, (Retention(0, 1, 90, seconds=10.0),)), (2, (Retention(0, 1, 10),)), (3, ())):
        table = pool.admit(SPACES[0], [first], 0.0, retention)
        assert table is not None
        table.computed = 1
        pool.publish(table, [first], 0.0)
        pool.release(table, 0.0)
    order = []
    for now in (1.0, 1.0, 1.0):
        before = {first for first in (1, 2, 3) if pool.index.match(SPACES[0], [first])}
        pool._evict(now)
        order += before - {first for first in (1, 2, 3) if pool.index.match(SPACES[0], [first])}
    assert order == [2, 3, 1]  # the least, the usual, the protected one
    assert Known(0, 90, until=10.0).at(10.0) == USUAL


def test_a_pool_must_have_room() -> None:
    with pytest.raises(BadInput, match="2 blocks or more"):
        Blocks(1, 16)
    pool = Blocks(3, 2)
    assert pool.admit(SPACES[0], [1] * 5, 0.0) is None
    table = pool.admit(SPACES[0], [1] * 4, 0.0)
    assert table is not None
    assert pool.room(table, 4, 5, 0.0) is None
    assert pool.states() == {"free": 0, "used": 2, "idle": 0}


def test_a_fork_copies_what_it_writes() -> None:
    pool = Blocks(8, 4)
    table = pool.admit(SPACES[0], [1, 2, 3, 4, 5, 6], 0.0)
    assert table is not None
    table.computed = 6
    other = pool.fork(table)
    assert pool.room(other, 6, 7, 0.0) == [Copy(table.blocks[1], other.blocks[1])]
    assert other.blocks[0] == table.blocks[0]
    assert pool.room(table, 6, 7, 0.0) == []  # the other has its own now
    pool.check([table, other])


def test_no_memory_grows_with_what_is_over() -> None:
    pool = Blocks(40, 2)
    for turn in range(3000):
        table = pool.admit(SPACES[0], [turn % 7, 1, 2, 3, turn % 5], float(turn), (Retention(0, 2, 80, 5.0),))
        assert table is not None
        table.computed = 5
        pool.publish(table, [turn % 7, 1, 2, 3, turn % 5], float(turn))
        pool.release(table, float(turn))
    assert len(pool._first) <= 2 * pool.count + 65 and len(pool._ends) <= 2 * pool.count + 65
    assert len(pool._known) < pool.count


@pytest.mark.parametrize("name", ["blocks", "prefix", "retention"])
def test_bookkeeping_imports_no_jax(name: str) -> None:
    source = Path(blocks_module.__file__).with_name(f"{name}.py").read_text("utf-8")
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in found if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in found if isinstance(node, ast.ImportFrom)}
    assert not [each for each in names if each.split(".")[0] in ("jax", "numpy", "jaxtyping")], names
    ours = {each for each in names if each.startswith("kvcascade")}
    assert ours <= {f"kvcascade.cache.{each}" for each in ("errors", "prefix", "retention")}
