"""Bytes that a kernel moves between the card's memory and its multiprocessors, counted where it loads and stores them."""

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel or copy that a compiled program starts."""

    name: str
    operation: str
    """XLA's word for it: fusion, custom-call, copy, …"""
    target: str
    """What a custom call calls."""
    moved: int
    """Bytes of its operands and results; of what it slices or updates in place, only those of the slice."""


BITS = {"pred": 8, "token": 0, "opaque": 0}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    kind: str
    operation: str
    operands: list[str]
    rest: str
    root: bool

    @property
    def size(self) -> int:
        return _size(self.kind)


def launches(hlo: str) -> list[Launch]:
    """What an optimised HLO text starts, in order; the body of a loop as often as it is known to run, else once."""
    computations = _computations(hlo)
    entry = re.search(r"^ENTRY %?(\S+)", hlo, re.MULTILINE)
    return list(_launches(computations, entry[1])) if entry else []


def _launches(computations: dict[str, list[_Instruction]], name: str) -> Iterator[Launch]:
    kinds = {each.name: each for each in computations[name]}
    for each in computations[name]:
        called = re.findall(r"(?:calls|body|to_apply|branch_computations)=\{?%?([\w.-]+)", each.rest)
        match each.operation:
            case operation if operation in FREE or operation.endswith("-done"):
                continue
            case "while" | "call" | "async-start" | "conditional":
                times = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', each.rest)
                yield from list(_launches(computations, called[0])) * (int(times[1]) if times else 1)
                continue
            case "fusion":
                moved = _fused(computations[called[0]])
            case "dynamic-slice" | "slice" | "gather":
                moved = 2 * each.size
            case "dynamic-update-slice":
                moved = 2 * kinds[each.operands[1]].size
            case _:
                moved = each.size + sum(kinds[operand].size for operand in each.operands)
        target = re.search(r'custom_call_target="([^"]*)"', each.rest)
        yield Launch(each.name, each.operation, target[1] if target else "", moved)


def _fused(body: list[_Instruction]) -> int:
    by_name = {each.name: each for each in body}
    users: dict[str, list[_Instruction]] = {}
    for each in body:
        for operand in each.operands:
            users.setdefault(operand, []).append(each)

    def read(name: str, size: int) -> int:
        total = 0
        for user in users.get(name, []):
            match user.operation:
                case "bitcast":
                    total += read(user.name, size)
                case "slice" | "dynamic-slice" | "gather" if user.operands[0] == name:
                    total += user.size
                case "dynamic-update-slice" if user.operands[0] == name:
                    pass
                case _:
                    return size
        return min(total, size)

    def written(each: _Instruction) -> int:
        match each.operation:
            case "tuple":
                return sum(written(by_name[operand]) for operand in each.operands)
            case "bitcast":
                return written(by_name[each.operands[0]])
            case "dynamic-update-slice":
                return by_name[each.operands[1]].size
            case _:
                return each.size

    root = next(each for each in body if each.root)
    return written(root) + sum(read(each.name, each.size) for each in body if each.operation == "parameter")


def _computations(hlo: str) -> dict[str, list[_Instruction]]:
    found: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in re.sub(r"/\*.*?\*/", "", hlo).splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = found.setdefault(head[1], [])
        elif one := re.match(r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$", line):
            root, name, kind, operation, rest = one.groups()
            inside = rest.split(")", 1)[0]
            operands = re.findall(r"%([\w.-]+)", inside)
            current.append(_Instruction(name, kind, operation, operands, rest, bool(root)))
    return found


def _size(kind: str) -> int:
    """Bytes of an HLO type, all elements of a tuple together."""
    total = 0
    for name, shape in re.findall(r"(\w+)\[([\d,]*)\]", kind):
        digits = re.match(r"[a-z]+(\d+)", name)
        bits = BITS[name] if name in BITS else int(digits[1]) if digits else 8
        for length in filter(None, shape.split(",")):
            bits *= int(length)
        total += -(-bits // 8)
    return total


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes by (kernel, array); what is loaded twice counts twice. Mosaic's kernels and their arrays have no names: `mosaic`, numbers."""

    read: Counter[tuple[str, str]]
    written: Counter[tuple[str, str]]
    loads: Counter[tuple[str, str]]
    """Instructions of the source that loaded, over all blocks."""

    @property
    def total(self) -> int:
        return self.read.total() + self.written.total()


@contextlib.contextmanager
def counting_mosaic() -> Iterator[Traffic]:
    """Count what Mosaic kernels that are interpreted inside of the block move; wait for their results before it ends."""
    from jax._src.pallas.mosaic_gpu import core
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    traffic = Traffic(Counter(), Counter(), Counter())
    memory = shared_memory.GPUSharedMemory
    places = list(core.MemorySpace)
    own = memory.get_buffer_content, memory.store_buffer_content, memory.swap_buffer_content

    def seen(key, thread) -> tuple[str, str] | None:
        # Without a thread it is JAX that takes the results out.
        gmem = thread is not None and places[key.memory_space_id] == core.MemorySpace.GMEM
        return ("mosaic", str(key.buffer_id)) if gmem else None

    def get(self, key, access, thread, *args, **kwargs):
        result = own[0](self, key, access, thread, *args, **kwargs)
        if (name := seen(key, thread)) and result[0] is not None:
            traffic.read[name] += result[0].nbytes
            traffic.loads[name] += 1
        return result

    def store(self, key, access, value, thread, *args, **kwargs):
        if name := seen(key, thread):
            traffic.written[name] += value.nbytes
        return own[1](self, key, access, value, thread, *args, **kwargs)

    def swap(self, key, access, value, mask, thread, *args, **kwargs):
        if name := seen(key, thread):
            traffic.written[name] += value.nbytes if mask is None else int(mask.sum()) * value.itemsize
        return own[2](self, key, access, value, mask, thread, *args, **kwargs)

    memory.get_buffer_content, memory.store_buffer_content, memory.swap_buffer_content = get, store, swap
    try:
        yield traffic
    finally:
        memory.get_buffer_content, memory.store_buffer_content, memory.swap_buffer_content = own
        jax.clear_caches()
