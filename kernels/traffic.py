"""Bytes that a kernel moves between the card's memory and its multiprocessors, counted where it loads and stores them."""

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple


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
    result: str
    """The type of what it writes."""
    scope: str
    """Where the model does it: the names of the scopes that it was traced in, separated by slashes; of an unnamed one, its first user's."""


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
    def scope(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def size(self) -> int:
        return size(self.kind)


def launches(hlo: str) -> list[Launch]:
    """What an optimised HLO text starts, in order; the body of a loop as often as it is known to run, else once."""
    computations = _computations(hlo)
    entry = re.search(r"^ENTRY %?(\S+)", hlo, re.MULTILINE)
    return list(_launches(computations, entry[1])) if entry else []


def returned(hlo: str) -> set[str]:
    """The instructions whose results an optimised HLO text returns, and what those are parts of."""
    entry = re.search(r"^ENTRY %?(\S+)", hlo, re.MULTILINE)
    by_name = {each.name: each for each in _computations(hlo)[entry[1]]} if entry else {}
    found, todo = set(), [name for name, each in by_name.items() if each.root]
    while todo:
        name = todo.pop()
        found.add(name)
        if by_name[name].operation in ("tuple", "bitcast", "get-tuple-element"):
            todo += by_name[name].operands
    return found


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
        users = (user for user in computations[name] if each.name in user.operands)
        scope = each.scope or next((user.scope for user in users if user.scope), "")
        yield Launch(each.name, each.operation, target[1] if target else "", moved, each.kind, scope)


def _fused(body: list[_Instruction]) -> int:
    by_name = {each.name: each for each in body}
    users: dict[str, list[_Instruction]] = {}
    for each in body:
        for operand in each.operands:
            users.setdefault(operand, []).append(each)

    def read(name: str, whole: int) -> int:
        total = 0
        for user in users.get(name, []):
            match user.operation:
                case "bitcast":
                    total += read(user.name, whole)
                case "slice" | "dynamic-slice" | "gather" if user.operands[0] == name:
                    total += user.size
                case "dynamic-update-slice" if user.operands[0] == name:
                    pass
                case _:
                    return whole
        return min(total, whole)

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


def kinds(result: str) -> list[str]:
    """The types of the arrays in an HLO type, without their layouts."""
    return re.findall(r"\w+\[[\d,]*\]", result)


def size(kind: str) -> int:
    """Bytes of an HLO type, all elements of a tuple together."""
    total = 0
    for name, shape in re.findall(r"(\w+)\[([\d,]*)\]", kind):
        digits = re.match(r"[a-z]+(\d+)", name)
        bits = BITS[name] if name in BITS else int(digits[1]) if digits else 8
        for length in filter(None, shape.split(",")):
            bits *= int(length)
        total += -(-bits // 8)
    return total


class Traffic(NamedTuple):
    """What kernels loaded and stored, by (kernel, array); Mosaic's kernels and arrays have no names there: `mosaic` and a number."""

    read: Counter[tuple[str, str]]
    """Bytes; what two instructions load counts twice, what is masked never."""
    written: Counter[tuple[str, str]]
    detectors: dict[int, Any]
    """Of races, one for every Mosaic kernel that ran."""

    @property
    def races(self) -> bool:
        """Whether a Mosaic kernel that was interpreted with `detect_races` has a race."""
        return any(detector.races_found for detector in self.detectors.values())


_observers: list[Traffic] = []


def note(what: tuple[str, str], loads: bool, size: int) -> None:
    """Tell those who count that an interpreted kernel loads or stores so many bytes of an array."""
    for traffic in _observers:
        (traffic.read if loads else traffic.written)[what] += size


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    """Count what all interpreted kernels move inside of the block; wait for the results (`jax.block_until_ready`) before it ends."""
    traffic = Traffic(Counter(), Counter(), {})
    _observers.append(traffic)
    with _mosaic_told():
        try:
            yield traffic
        finally:
            _observers.remove(traffic)


@contextlib.contextmanager
def _mosaic_told() -> Iterator[None]:
    """The memory of JAX's interpreter for Mosaic tells of every access to global memory."""
    from jax._src.pallas.mosaic_gpu import core
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory

    memory, places = shared_memory.GPUSharedMemory, list(core.MemorySpace)
    own = memory.get_buffer_content, memory.store_buffer_content, memory.swap_buffer_content

    def seen(key, thread, loads: bool, size: int) -> None:
        # Without a thread it is JAX that takes the results out.
        if thread is not None and places[key.memory_space_id] == core.MemorySpace.GMEM:
            note(("mosaic", str(key.buffer_id)), loads, size)
            detector = gpu_callbacks.get_races()
            for traffic in _observers:
                traffic.detectors[id(detector)] = detector

    def get(self, key, access, thread, *args, **kwargs):
        result = own[0](self, key, access, thread, *args, **kwargs)
        if result[0] is not None:
            seen(key, thread, True, result[0].nbytes)
        return result

    def store(self, key, access, value, thread, *args, **kwargs):
        seen(key, thread, False, value.nbytes)
        return own[1](self, key, access, value, thread, *args, **kwargs)

    def swap(self, key, access, value, mask, thread, *args, **kwargs):
        seen(key, thread, False, value.nbytes if mask is None else int(mask.sum()) * value.itemsize)
        return own[2](self, key, access, value, mask, thread, *args, **kwargs)

    memory.get_buffer_content, memory.store_buffer_content, memory.swap_buffer_content = get, store, swap
    try:
        yield
    finally:
        memory.get_buffer_content, memory.store_buffer_content, memory.swap_buffer_content = own
