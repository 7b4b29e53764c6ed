"""How fast the kernels are on the GPU at hand, next to XLA's own and to what its memory copies."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kvcascade.cache.errors import BadInput
from kvcascade.eval.kernels.cases import Case, Program, nbytes
from kvcascade.eval.kernels.whole_step import Record
from kvcascade.eval.origin import origin
from kvcascade.eval.table import Column, Table

PASSED = 512 << 20
"""Bytes that are read before an array is read again: more than any cache on a card holds."""
REPEATS = 20


def bench(some: Sequence[Case]) -> list[Record]:
    """A record per case: seconds of one call at the size in use. Raises BadInput without a GPU."""
    if jax.default_backend() != "gpu":
        raise BadInput("there is no GPU here to time kernels on; kernels check needs none")
    copied = copy_bandwidth(PASSED)
    found = []
    for case in some:
        start = time.monotonic()
        record: Record = {"kind": "kernel_bench", "case": case.name, "copy_bandwidth": copied, "repeats": REPEATS}
        try:
            program = case.build(True)
            record |= {"floor": program.floor, "call_seconds": timed(program)}
            if case.peer:
                record["peer_seconds"] = timed(case.peer(True))
        except NotImplementedError as error:
            record["refused"] = str(error)
        found.append(record | origin(time.monotonic() - start))
    return found


def timed(program: Program) -> float:
    """`seconds` of a program, on so many sets of arguments that none is still in a cache when its turn comes again."""
    sets = max(2, math.ceil(PASSED / nbytes(program.shapes)))
    return seconds(program.call, [program.arguments() for _ in range(sets)], REPEATS)


def seconds(call: Callable, sets: Sequence[tuple[Any, ...]], repeats: int) -> float:
    """The median time of one call: all sets of arguments in turn in one program, so that a dispatch costs each of them little."""
    every = jax.jit(lambda sets: [call(*arguments) for arguments in sets])
    jax.block_until_ready(every(sets))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(every(sets))
        times.append(time.perf_counter() - start)
    return statistics.median(times) / len(sets)


def copy_bandwidth(size: int) -> float:
    """Bytes per second, read and written, of adding one to an array of so many bytes."""
    x = jnp.zeros(size // 4, jnp.float32)
    return 2 * x.nbytes / seconds(lambda x: x + 1, [(x,)], REPEATS)


def table(found: Sequence[Record]) -> Table:
    """Time, bytes per second that the floor takes, their share of a copy's, and XLA's time over ours."""
    timed = lambda value: lambda one: None if "refused" in one else value(one)
    beside = lambda value: lambda one: value(one) if one.get("peer_seconds") and "refused" not in one else None
    columns = [
        Column("kernel", lambda one: f"{one['case']}: {one['refused']}" if "refused" in one else one["case"]),
        Column("µs", timed(lambda one: one["call_seconds"] * 1e6), "{:.1f}"),
        Column("GB/s", timed(lambda one: one["floor"] / one["call_seconds"] / 1e9), "{:,.0f}"),
        Column("of a copy", timed(lambda one: one["floor"] / one["call_seconds"] / one["copy_bandwidth"]), "{:.0%}"),
        Column("XLA, µs", beside(lambda one: one["peer_seconds"] * 1e6), "{:.1f}"),
        Column("× XLA", beside(lambda one: one["peer_seconds"] / one["call_seconds"]), "{:.2f}"),
    ]
    return Table.of(f"{found[0]['device']}, copies {found[0]['copy_bandwidth'] / 1e9:,.0f} GB/s", columns, found)
