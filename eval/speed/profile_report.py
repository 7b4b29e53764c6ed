"""What a profile says, made from its records alone: words, tables, CSV, figures."""

import csv
import io
from pathlib import Path

from kvcascade.eval.records import Record
from kvcascade.eval.report import figures
from kvcascade.eval.speed.profile import COMPONENTS, TOLERANCE
from kvcascade.kernels.files import write_whole

WEIGHTS = ("qkv", "output", "mlp", "head")
CACHE = ("attention", "priority", "exchange", "scores")


def table(record: Record) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of one cache: each component's part of a decode step, the longest first, in time and in bytes."""
    columns = ["component", "instructions", "ms", "of the step", "MB", "GB/s", "of bandwidth"]
    rows = []
    for each in _parts(record):
        speed = each["bytes"] / each["ms"] / 1e6
        rows.append([
            f"{each['name']}: {COMPONENTS.get(each['name'], '')}", str(each["calls"]), f"{each['ms']:.3f}", f"{each['ms'] / record['profiled_ms']:.1%}",
            f"{each['bytes'] / 1e6:,.3f}", f"{speed:.1f}", f"{speed * 1e9 / record['bandwidth']:.0%}",
        ])  # fmt: skip
        if each["name"] == "attention" and len(record["tiers"]) > 1:
            for tier in record["tiers"]:
                rows.append([f"  {tier['tier']}", "", f"~{tier['ms']:.3f}", "", f"{tier['bytes'] / 1e6:,.3f}", "", ""])
    for name, key in (
        ("between: from an instruction to the next", "between_ms"),
        ("dispatch: Python, programs started, threads woken", "around_ms"),
    ):
        rows.append([name, "", f"{record[key]:.3f}", f"{record[key] / record['profiled_ms']:.1%}", "", "", ""])
    total = f"{_moved(record) / 1e6:,.3f}"
    rows.append(["sum: the step under the profiler", "", f"{record['profiled_ms']:.3f}", "100.0%", total, "", ""])
    speed = _moved(record) / record["step_ms"] / 1e6
    share = f"{speed * 1e9 / record['bandwidth']:.0%}"
    rows.append(["step: without the profiler", "", f"{record['step_ms']:.3f}", "", "", f"{speed:.1f}", share])
    title = f"{record['model']}, {record['weights']}, batch {record['batch']}, context {record['context']:,}: {record['cache']}"
    return title, columns, rows


def summary(found: list[Record]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of several caches: where their decode steps spend their time."""
    columns = [
        "cache",
        "weights",
        "step, ms",
        "weights' products",
        "attention",
        "eviction",
        "other instructions",
        "nothing runs",
        "MB",
        "of bandwidth",
    ]
    rows = []
    for r in found:
        share = lambda ms, r=r: f"{ms / r['profiled_ms']:.0%}"
        ms = {each["name"]: each["ms"] for each in r["components"]}
        weights, cache = (sum(ms.get(name, 0.0) for name in names) for names in (WEIGHTS, CACHE))
        attention = ms.get("attention", 0.0)
        rows.append([
            r["cache"], r["weights"], f"{r['step_ms']:.2f}", share(weights), share(attention), share(cache - attention),
            share(sum(ms.values()) - weights - cache), share(r["between_ms"] + r["around_ms"]), f"{_moved(r) / 1e6:,.1f}",
            f"{_moved(r) / r['step_ms'] * 1e3 / r['bandwidth']:.0%}",
        ])  # fmt: skip
    first = found[0]
    title = f"{first['model']}: a greedy decode step at batch {first['batch']}, context {first['context']:,}"
    return title, columns, rows


def memory_table(found: list[Record]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: what one row's cache takes at each context, and the step's temporaries at the shortest and the longest."""
    contexts = found[0]["growth"]["contexts"]
    columns = ["cache", *(f"{context:,}" for context in contexts), "× the shortest", "temporaries of a step"]
    rows = []
    for r in found:
        size, temporaries = r["growth"]["kv_bytes"], r["growth"]["temporary_bytes"]
        label = figures.bytes_label
        rows.append(
            [
                r["cache"],
                *map(label, size),
                f"{size[-1] / size[0]:.1f}",
                f"{label(temporaries[0])} … {label(temporaries[-1])}",
            ]
        )
    return f"{found[0]['model']}: one row's cache by context, measured from its buffers", columns, rows


def sentences(record: Record) -> list[str]:
    """The answers, a line each: what a step is spent on, which buffers it has, what grows."""
    ms = record["profiled_ms"]
    longest = ", ".join(f"{each['name']} {each['ms'] / ms:.0%}" for each in _parts(record)[:4])
    change = record["profiled_ms"] / record["step_ms"] - 1
    close = "within" if abs(change) <= TOLERANCE else "NOT within"
    found = [
        f"A step takes {record['step_ms']:.2f} ms and moves {_moved(record) / 1e6:,.1f} MB with {record['operations'] / 1e6:,.1f} million operations; "
        f"memory is read at {record['bandwidth'] / 1e9:.1f} GB/s (above 100% of it: from the processor's caches).",
        f"Its time: {longest}; nothing runs in {(record['around_ms'] + record['between_ms']) / ms:.0%}. The shares add up to "
        f"{ms:.2f} ms under the profiler, {change:+.0%}: {close} {TOLERANCE:.0%}.",
    ]
    if len(record["tiers"]) > 1:
        found.append(
            "Attention is one call for all tiers; its time is divided (~) as the times that it takes over each tier alone."
        )
    buffers, label = record["buffers"], figures.bytes_label
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
    grew = record["watched"]
    found.append(
        f"Over {grew['steps']} steps live arrays grew by {grew['arrays']}, their bytes by {grew['bytes']:,}, the process by {label(grew['resident'])}."
    )
    growth = record["growth"]
    size, contexts = growth["kv_bytes"], growth["contexts"]
    spare = max(
        map(
            sum,
            zip(
                growth["live_bytes"],
                (-record["batch"] * s for s in size),
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


def groups(profiles: list[Record]) -> list[list[Record]]:
    """Those of one model, its weights, a batch and a context together."""
    found: dict[tuple, list[Record]] = {}
    for r in profiles:
        found.setdefault((r["model"], r["weights"], r["batch"], r["context"]), []).append(r)
    return list(found.values())


def write(folder: Path, found: list[Record], text: str) -> None:
    """Write profile.txt with this text, step.csv, memory.csv, step.svg and memory.svg."""
    parts = [
        {
            "cache": r["cache"],
            "component": name,
            "instructions": calls,
            "ms": ms,
            "share": ms / r["profiled_ms"],
            "bytes": size,
        }
        for r in found
        for name, calls, ms, size in (
            *((each["name"], each["calls"], each["ms"], each["bytes"]) for each in _parts(r)),
            ("between", 0, r["between_ms"], 0),
            ("dispatch", 0, r["around_ms"], 0),
        )
    ]
    sizes = ("kv_bytes", "held_bytes", "live_bytes", "output_bytes", "temporary_bytes")
    grown = [
        {"cache": r["cache"], "batch": r["batch"], "context": context} | {key: r["growth"][key][index] for key in sizes}
        for r in found
        for index, context in enumerate(r["growth"]["contexts"])
    ]
    files = {
        "profile.txt": text,
        "step.csv": _csv(parts),
        "memory.csv": _csv(grown),
        "step.svg": figures.step_shares(found),
        "memory.svg": figures.growth([r["growth"] for r in found]),
    }
    for name, content in files.items():
        write_whole(folder / name, content.encode())


def _parts(record: Record) -> list[dict]:
    return sorted(record["components"], key=lambda each: -each["ms"])


def _moved(record: Record) -> int:
    return sum(each["bytes"] for each in record["components"])


def _csv(rows: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
