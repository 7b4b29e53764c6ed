"""What a profile says, made from its records alone: words, tables, CSV, figures."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

from kvcascade.eval.records import Profile
from kvcascade.eval.report import figures
from kvcascade.eval.speed.profile import COMPONENTS, TOLERANCE
from kvcascade.eval.table import CACHE, Column, Table
from kvcascade.kernels.files import write_whole

WEIGHTS = ("qkv", "output", "mlp", "head")
EVICTION = ("priority", "exchange", "scores")


def table(record: Profile) -> Table:
    """Of one cache: each component's part of a decode step, the longest first, in time and in bytes."""
    parts: list[_Part] = []
    for each in record.longest_first:
        told = f"{each['name']}: {COMPONENTS.get(each['name'], '')}"
        parts.append(_Part(told, each["ms"], each["calls"], each["bytes"], each["bytes"] / each["ms"]))
        if each["name"] == "attention" and len(record.tiers) > 1:
            parts += [
                _Part(f"  {tier['tier']}", tier["ms"], size=tier["bytes"], ms_form="~{:.3f}", share=False)
                for tier in record.tiers
            ]
    parts += [
        _Part("between: from an instruction to the next", record.between_ms),
        _Part("dispatch: Python, programs started, threads woken", record.around_ms),
        _Part("sum: the step under the profiler", record.profiled_ms, size=record.moved),
        _Part("step: without the profiler", record.step_ms, speed=record.moved / record.step_ms, share=False),
    ]
    columns = [
        Column("component", "name"), Column("instructions", "calls"), Column("ms", lambda part: part.ms_form.format(part.ms)),
        Column("of the step", lambda part: part.ms / record.profiled_ms if part.share else None, "{:.1%}"),
        Column("MB", lambda part: None if part.size is None else part.size / 1e6, "{:,.3f}"),
        Column("GB/s", lambda part: None if part.speed is None else part.speed / 1e6, "{:.1f}"),
        Column("of bandwidth", lambda part: None if part.speed is None else part.speed * 1e3 / record.bandwidth, "{:.0%}"),
    ]  # fmt: skip
    title = f"{record.model}, {record.weights}, batch {record.batch}, context {record.context:,}: {record.cache}"
    return Table.of(title, columns, parts)


class _Part(NamedTuple):
    """A row of a step: bytes, and bytes per millisecond."""

    name: str
    ms: float
    calls: float | None = None
    size: float | None = None
    speed: float | None = None
    ms_form: str = "{:.3f}"
    share: bool = True


def summary(found: list[Profile]) -> Table:
    """Of several caches: where their decode steps spend their time."""
    of = lambda wanted: lambda r: sum(each["ms"] for each in r.components if wanted(each["name"])) / r.profiled_ms
    others = lambda name: name not in (*WEIGHTS, "attention", *EVICTION)
    share = lambda name, value: Column(name, value, "{:.0%}")
    columns = [
        CACHE, Column("weights", "weights"), Column("step, ms", "step_ms", "{:.2f}"), share("weights' products", of(WEIGHTS.__contains__)),
        share("attention", of("attention".__eq__)), share("eviction", of(EVICTION.__contains__)), share("other instructions", of(others)),
        share("nothing runs", lambda r: (r.between_ms + r.around_ms) / r.profiled_ms), Column("MB", lambda r: r.moved / 1e6, "{:,.1f}"),
        share("of bandwidth", lambda r: r.moved / r.step_ms * 1e3 / r.bandwidth),
    ]  # fmt: skip
    first = found[0]
    title = f"{first.model}: a greedy decode step at batch {first.batch}, context {first.context:,}"
    return Table.of(title, columns, found)


def memory_table(found: list[Profile]) -> Table:
    """What one row's cache takes at each context, and the step's temporaries at the shortest and the longest."""
    label = figures.bytes_label
    ends = lambda r: f"{label(r.growth['temporary_bytes'][0])} … {label(r.growth['temporary_bytes'][-1])}"
    columns = [
        CACHE,
        *(
            Column(f"{context:,}", lambda r, index=index: label(r.growth["kv_bytes"][index]))
            for index, context in enumerate(found[0].growth["contexts"])
        ),
        Column("× the shortest", lambda r: r.growth["kv_bytes"][-1] / r.growth["kv_bytes"][0], "{:.1f}"),
        Column("temporaries of a step", ends),
    ]
    return Table.of(f"{found[0].model}: one row's cache by context, measured from its buffers", columns, found)


def sentences(record: Profile) -> list[str]:
    """The answers, a line each: what a step is spent on, which buffers it has, what grows."""
    ms = record.profiled_ms
    longest = ", ".join(f"{each['name']} {each['ms'] / ms:.0%}" for each in record.longest_first[:4])
    change = record.profiled_ms / record.step_ms - 1
    close = "within" if abs(change) <= TOLERANCE else "NOT within"
    found = [
        f"A step takes {record.step_ms:.2f} ms and moves {record.moved / 1e6:,.1f} MB with {record.operations / 1e6:,.1f} million operations; "
        f"memory is read at {record.bandwidth / 1e9:.1f} GB/s (above 100% of it: from the processor's caches).",
        f"Its time: {longest}; nothing runs in {(record.around_ms + record.between_ms) / ms:.0%}. The shares add up to "
        f"{ms:.2f} ms under the profiler, {change:+.0%}: {close} {TOLERANCE:.0%}.",
    ]
    if len(record.tiers) > 1:
        found.append(
            "Attention is one call for all tiers; its time is divided (~) as the times that it takes over each tier alone."
        )
    buffers, label = record.buffers, figures.bytes_label
    largest = ", ".join(
        f"{b['component']} {b['type']}{' in each layer' if b['count'] > 1 else ''} ({label(b['bytes'])})"
        for b in buffers["largest"][:3]
    )
    copies = (
        "no instruction writes a whole K or V buffer"
        if not buffers["copies"]
        else f"{buffers['copies']} INSTRUCTIONS WRITE A WHOLE K OR V BUFFER"
    )
    found.append(
        f"The cache's {label(buffers['cache'])} are changed in place ({buffers['aliased'] / buffers['cache']:.0%} aliased) and {copies}; "
        f"all temporaries together take {label(buffers['temporaries'])}, the largest: {largest}."
    )
    grew = record.watched
    found.append(
        f"Over {grew['steps']} steps live arrays grew by {grew['arrays']}, their bytes by {grew['bytes']:,}, the process by {label(grew['resident'])}."
    )
    growth = record.growth
    size, contexts = growth["kv_bytes"], growth["contexts"]
    spare = max(
        map(
            sum,
            zip(
                growth["live_bytes"],
                (-record.batch * s for s in size),
                (-o for o in growth["output_bytes"]),
                strict=True,
            ),
        )
    )
    found.append(
        f"From {contexts[0]:,} to {contexts[-1]:,} tokens a row's cache grows from {label(size[0])} to {label(size[-1])}, × {size[-1] / size[0]:.1f}; "
        f"live arrays beside it and the logits: {spare:,} bytes."
    )
    return found


def write(folder: Path, found: list[Profile], text: str) -> None:
    """Write profile.txt with this text, step.csv, memory.csv, step.svg and memory.svg."""
    parts = [
        {
            "cache": r.cache,
            "component": name,
            "instructions": calls,
            "ms": ms,
            "share": ms / r.profiled_ms,
            "bytes": size,
        }
        for r in found
        for name, calls, ms, size in (
            *((each["name"], each["calls"], each["ms"], each["bytes"]) for each in r.longest_first),
            ("between", 0, r.between_ms, 0),
            ("dispatch", 0, r.around_ms, 0),
        )
    ]
    sizes = ("kv_bytes", "held_bytes", "live_bytes", "output_bytes", "temporary_bytes")
    grown = [
        {"cache": r.cache, "batch": r.batch, "context": context} | {key: vars(r)["growth"][key][index] for key in sizes}
        for r in found
        for index, context in enumerate(r.growth["contexts"])
    ]
    files = {
        "profile.txt": text,
        "step.csv": _csv(parts),
        "memory.csv": _csv(grown),
        "step.svg": figures.step_shares(found),
        "memory.svg": figures.growth(found),
    }
    for name, content in files.items():
        write_whole(folder / name, content.encode())


def _csv(rows: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
