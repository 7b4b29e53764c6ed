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
from kvcascade.eval.records import Record, stamp

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
        record = {"kind": "kernel_bench", "case": case.name, "copy_bandwidth": copied, "repeats": REPEATS}
        try:
            program = case.build(True)
            record |= {"floor": program.floor, "call_seconds": timed(program)}
            if case.peer:
                record["peer_seconds"] = timed(case.peer(True))
        except NotImplementedError as error:
            record["refused"] = str(error)
        found.append(stamp(record, time.monotonic() - start))
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


def table(found: Sequence[Record]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: time, bytes per second that the floor takes, their share of a copy's, and XLA's time over ours."""
    columns = ["kernel", "µs", "GB/s", "of a copy", "XLA, µs", "× XLA"]
    rows = []
    for one in found:
        if "refused" in one:
            rows.append([f"{one['case']}: {one['refused']}", *[""] * (len(columns) - 1)])
            continue
        rate = one["floor"] / one["call_seconds"]
        peer = one.get("peer_seconds")
        rows.append([
            one["case"], f"{one['call_seconds'] * 1e6:.1f}", f"{rate / 1e9:,.0f}", f"{rate / one['copy_bandwidth']:.0%}",
            *([f"{peer * 1e6:.1f}", f"{peer / one['call_seconds']:.2f}"] if peer else ["", ""]),
        ])  # fmt: skip
    return f"{found[0]['device']}, copies {found[0]['copy_bandwidth'] / 1e9:,.0f} GB/s", columns, rows
