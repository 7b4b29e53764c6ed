"""How many users fit: decode steps with full caches in child processes under a hard limit of memory, more and more until one dies.

Each size is a process of its own (`crash_child.py`), because what runs out of memory is killed. A child of one user measures what the
first user costs; the arithmetic (bytes of a row's cache by its spec, workspace of a step by the compiled program) says how many more
should fit; the search starts there and ends between a size that lived and one that the limit killed, wherever the arithmetic was.
"""

import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.eval.measure import Job
from kvcascade.eval.memory import limits
from kvcascade.eval.records import Crash, baseline
from kvcascade.eval.table import CACHE, Column, Table
from kvcascade.kernels import processor

type Child = Callable[[int], limits.Ended]
"""Runs so many users to its end."""

PROGRAM = [sys.executable, "-m", "kvcascade.eval.memory.crash_child"]


def job(
    model: str,
    spec: CacheSpec,
    context: int,
    limit: int,
    resolution: float,
    steps: int,
    weights: str | None,
    seconds: float,
    trace: str = "",
    requests: Sequence[int] | None = None,
) -> Job:
    """The measurement of one cache; a model is known by its name, since only children load it.

    Users have the context's tokens each, or as many as the requests of a trace, where one is named.
    """
    about = {
        "kind": "crash", "model": model, "cache": str(spec), "context": context, "limit": limit, "resolution": resolution, "steps": steps,
        "weights": weights, "seconds": seconds, "processor": processor.name(),
    }  # fmt: skip
    if requests is not None:
        about |= {"trace": trace, "requests": requests}
    run = lambda: [crash(model, spec, context, limit, resolution, steps, weights, seconds, trace, requests)]
    return Job(about, "eval/memory", run, str(spec) + (f", {trace}" if trace else ""))


def crash(
    model: str,
    spec: CacheSpec,
    context: int,
    limit: int,
    resolution: float,
    steps: int,
    weights: str | None,
    seconds: float,
    trace: str = "",
    requests: Sequence[int] | None = None,
    report: Callable[[str], None] = lambda words: None,
) -> Crash:
    """The record of one cache: the most users that lived, the fewest that did not, peaks of memory, and what the arithmetic said.

    `context` 0: the model's, at most 2,048 tokens; `limit` in bytes, `resolution` as a share of the users, `seconds` per child. On an
    accelerator the limit is its own memory. BadInput where a child ends for another reason than memory, or one user does not fit.
    """
    on_cpu = not _accelerated()
    if on_cpu and sys.platform != "linux":
        raise BadInput("on a CPU the crash test needs Linux, whose kernel holds a process to its limit of memory")
    place = limits.cgroup()
    wanted = {
        "model": model,
        "weights": weights,
        "context": context,
        "cache": str(spec),
        "steps": steps,
        "lengths": requests,
    }
    children: list[Any] = []

    def child(users: int) -> limits.Ended:
        report(f"{users:,} users")
        before = time.monotonic()
        ended = limits.run(PROGRAM, wanted | {"users": users}, limit if on_cpu else None, place, seconds)
        one = {"users": users, "lived": not ended.failed, "seconds": round(time.monotonic() - before, 1)}
        children.append(one | {"peak": ended.said.get("peak"), "peak_cgroup": ended.peak} | _died(ended))
        return ended

    first = _measured(child(1))
    limit = first["limit"] = first.get("limit", limit)
    way = "device" if not on_cpu else f"cgroup v{place.version}" if place else "RLIMIT_DATA"
    lived = {1: first}

    def lives(users: int) -> bool:
        ended = child(users)
        if ended.failed != "memory":
            lived[users] = _measured(ended)
        return users in lived

    users, died = search(lives, predicted(first, first, 1, limit, way), resolution)
    most = lived[users]
    found: dict[str, Any] = {
        "model": model, "weights": most["weights"], "cache": str(spec), "context": most["context"], "limit": limit, "way": way, "users": users,
        "died": died, "resolution": resolution, "peak": most["peak"], "peak_rss": most.get("peak_rss"), "peak_one": first["peak"],
        "weight_bytes": most["weight_bytes"], "kv_bytes": most["cache_bytes"] // users,
        "kv_bytes_predicted": most["cache_bytes_predicted"] // users, "workspace_bytes": most["workspace"] // users,
        "user_bytes_predicted": user_bytes(most, users), "user_bytes": (most["peak"] - first["peak"]) / (users - 1) if users > 1 else None,
        "users_predicted": predicted(first, most, users, limit, way), "step_seconds": round(most["step_seconds"], 4), "steps": steps,
        "trace": trace, "tokens": most["tokens"], "room": most["room"], "children": children,
    }  # fmt: skip
    return Crash(**found)


def _died(ended: limits.Ended) -> dict[str, str]:
    return {"died": ended.said.get("stage", "starting")} if ended.failed else {}


def _measured(ended: limits.Ended) -> dict[str, Any]:
    """What a child measured; BadInput that says how it ended if it did not live."""
    if not ended.failed:
        return ended.said
    if "bad_input" in ended.said:
        raise BadInput(ended.said["bad_input"])
    stage = ended.said.get("stage", "starting")
    if ended.failed == "memory":
        raise BadInput(f"one user does not fit: memory ran out while {stage}")
    raise BadInput(f"a child failed, and not for want of memory, while {stage}: {ended.failed}")


def user_bytes(child: Mapping, users: int) -> float:
    """Predicted bytes of a user: a row's cache, and its share of what a step takes beside it."""
    return (child["cache_bytes_predicted"] + child["workspace"]) / users


def predicted(first: Mapping, child: Mapping, users: int, limit: int, way: str) -> int:
    """How many users should fit: the first one's measured peak, and for each other one the bytes predicted from a child's program."""
    taken = first["peak"] + (first["reserved"] if way == "RLIMIT_DATA" else 0)
    return max(1, 1 + int((limit - taken) / user_bytes(child, users)))


def search(lives: Callable[[int], bool], guess: int, resolution: float) -> tuple[int, int]:
    """The largest size that lived and the smallest that did not, at most a share `resolution` apart; 1 is known to live.

    From the guess outward in strides that double until both are known, then by bisection.
    """
    low, high, size = 1, 0, max(2, guess)
    stride = max(1, int(resolution * size))
    while True:
        if lives(size):
            low = size
        else:
            high = size
        if high and high - low <= max(1, int(resolution * low)):
            return low, high
        outward = high - stride if high else low + stride
        stride *= 2
        size = outward if not high or low == 1 < outward else (low + high) // 2


def _accelerated() -> bool:
    """Whether JAX runs on something other than the CPU; asked of a child, since asking here would take a GPU's memory from the others."""
    if not importlib.metadata.entry_points(group="jax_plugins"):
        return False
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(asked, capture_output=True, encoding="utf-8", errors="replace").stdout.strip() not in (
        "",
        "cpu",
    )


def _baseline(found: Sequence[Crash], record: Crash) -> Crash:
    """The `full` cache in the same case, else its first."""
    return baseline(record, found) or next(r for r in found if r.case == record.case)


def sentences(found: Sequence[Crash]) -> list[str]:
    """The baseline against each other cache of its model."""
    each = lambda r: f"requests of {r.trace} up to {r.context:,} tokens" if r.trace else f"{r.context:,} tokens each"
    return [
        f"{r.name}, {each(r)} in {r.limit / 1e9:g} GB: `{full.cache}` {full.users:,} users, "
        f"`{r.cache}` {r.users:,} users, {r.users / full.users - 1:+.0%}."
        for r in found
        if (full := _baseline(found, r)) is not r
    ]


def table(found: Sequence[Crash]) -> Table:
    """Users that lived, their peak, and how far the arithmetic was off."""
    change = lambda r: None if (full := _baseline(found, r)) is r else r.users / full.users - 1
    columns = [
        CACHE, Column("model", "name"), Column("tokens each", lambda r: f"{'up to ' if r.trace else ''}{r.context:,}"), Column("users", "users", "{:,}"),
        Column("died at", "died", "{:,}"), Column("change", change, "{:+.0%}"), Column("peak, GB", lambda r: r.peak / 1e9, "{:.2f}"),
        Column("MB a user", lambda r: r.user_bytes and r.user_bytes / 1e6, "{:.3f}"),
        Column("predicted", lambda r: r.user_bytes_predicted / 1e6, "{:.3f}"),
        Column("off", lambda r: r.user_bytes and r.user_bytes_predicted / r.user_bytes - 1, "{:+.1%}"),
        Column("users predicted", "users_predicted", "{:,}"), Column("off", lambda r: r.users_predicted / r.users - 1, "{:+.1%}"),
        Column("room without a token", lambda r: r.room and 1 - r.tokens / r.room, "{:.0%}"),
    ]  # fmt: skip
    traces = ", ".join(dict.fromkeys(r.trace for r in found if r.trace))
    title = f"Users until memory broke under {found[0].limit / 1e9:g} GB ({found[0].way})"
    return Table.of(title + (f"; up to so many tokens: the requests of {traces}" if traces else ""), columns, found)
