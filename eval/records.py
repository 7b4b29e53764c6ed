"""What was measured, one JSON object per line: a record has its protocol, its bytes, its seed and its commit."""

import importlib.metadata
import math
import os
import subprocess
from pathlib import Path

import jax
import numpy as np

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.eval import stats
from kvcascade.eval.quality.fidelity import Fidelity
from kvcascade.eval.quality.perplexity import Scores
from kvcascade.eval.record_keys import not_finite
from kvcascade.model.config import ModelConfig
from kvcascade.model.pretrained import Model

type Record = dict
type Table = tuple[list[str], list[list[str]]]
"""Columns and rows."""


def evaluation(
    model: Model, spec: CacheSpec, data: str, rows, prefix: int, lengths, scores: Scores, batch: int, bos: bool = False
) -> Record:
    """The record of one cache on one text, whose windows begin with BOS if `bos`; `nll_windows` lets two records be compared window by window."""
    config = model.config
    first = max(prefix, 1)
    windows, context = rows.shape
    nll = float(scores.nll_BT.mean())
    per_window = scores.nll_BT.mean(-1)
    full = full_bytes(config, context)
    return {
        "kind": "evaluate",
        "model": model.name,
        "weights": model.config.weights,
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "cache": str(spec),
        "data": data,
        "context": context,
        "sequences": windows,
        "batch": min(batch, windows),
        "prefix": prefix,
        "bos": bos,
        "tokens": int(scores.nll_BT.size),
        "nll": nll,
        "nll_stderr": float(per_window.std(ddof=1) / math.sqrt(windows)) if windows > 1 else None,
        "nll_windows": [round(float(x), 6) for x in per_window],
        "ppl": math.exp(nll) if nll < 700 else math.inf,
        "bits_per_byte": float(scores.nll_BT.sum() / math.log(2) / lengths[rows[:, first:]].sum()),
        "kv_bytes": scores.kv_bytes,
        "kv_bytes_predicted": spec.nbytes(config.layer_heads, context),
        "kv_bytes_full": full,
        "compression": 1 - scores.kv_bytes / full,
        "kept": spec.slots(config.layer_heads, context),
        "tokens_per_second": round(scores.tokens_per_second, 1),
        "traces": scores.traces,
        "compile_seconds": round(scores.compile_seconds, 2),
        "seed": model.seed,
    }


def fidelity(found: Fidelity) -> Record:
    """What fidelity adds to the record of the same cache on the same windows: means over tokens, and per window for intervals."""
    kl, same = found.kl_BT.mean(-1), found.same_BT.mean(-1)
    return {
        "kl": float(kl.mean()),
        "kl_windows": [round(float(x), 8) for x in kl],
        "same_top": float(same.mean()),
        "same_top_windows": [round(float(x), 6) for x in same],
    }


def retrieval(
    model: Model,
    spec: CacheSpec,
    task: str,
    length: int,
    depth: float,
    seed: int,
    answered: list[list[bool]],
    size: int,
) -> Record:
    """The record of one task behind one cache; `score` is the share of turns answered, with its 95 % Wilson interval."""
    turns = [turn for each in answered for turn in each]
    low, high = stats.wilson(sum(turns), len(turns))
    full = full_bytes(model.config, length)
    return {
        "kind": "retrieve",
        "model": model.name,
        "weights": model.config.weights,
        "cache": str(spec),
        "task": task,
        "length": length,
        "depth": depth,
        "samples": len(answered),
        "turns": len(turns),
        "answered": sum(turns),
        "score": sum(turns) / len(turns),
        "score_low": low,
        "score_high": high,
        "kv_bytes": size,
        "kv_bytes_full": full,
        "compression": 1 - size / full,
        "seed": seed,
    }


def retrieval_table(found: list[Record]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: a row per cache, a column per task with the share answered over all lengths and depths, bytes at the longest."""
    tasks = list(dict.fromkeys(r["task"] for r in found))
    longest = max(r["length"] for r in found)
    rows = []
    for cache in dict.fromkeys(r["cache"] for r in found):
        mine = [r for r in found if r["cache"] == cache]
        size = max(mine, key=lambda r: r["length"])
        cells = []
        for part in (*([r for r in mine if r["task"] == task] for task in tasks), mine):
            hits, of = sum(r["answered"] for r in part), sum(r["turns"] for r in part)
            cells.append("{:.0%} ({:.0%}…{:.0%})".format(hits / of, *stats.wilson(hits, of)) if of else "")
        rows.append([cache, f"{size['kv_bytes']:,}", f"{size['compression']:.1%}", *cells])
    lengths, depths = sorted({r["length"] for r in found}), sorted({r["depth"] for r in found})
    title = f"{found[0]['model']}: share answered, contexts of {lengths} tokens, depths {depths}, {found[0]['samples']} samples each"
    return title, ["cache", f"KV bytes at {longest}", "saved", *tasks, "all (95 %)"], rows


def full_bytes(config: ModelConfig, context: int) -> int:
    """Bytes per row of a bf16 cache of all that a query may see of the context, keys and values alone.

    Σ over layers of K · (key width + value width) · 2 · slots, and slots are the context, or a layer's window if that is less.
    """
    slots = lambda heads: min(context, heads.window or context)
    return sum(heads.kv * (heads.width + heads.value_width) * 2 * slots(heads) for heads in config.layer_heads)


def stamp(record: Record, seconds: float) -> Record:
    """Add what every record says of where it comes from: device, versions, commit, wall-clock seconds. BadInput for a figure that is not finite."""
    if key := not_finite(record):
        what = ", ".join(str(record[name]) for name in ("model", "cache") if name in record)
        raise BadInput(f"{what}: {key} is not finite, so nothing is recorded")
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "kvcascade")}
    return record | {
        "device": device.device_kind + cores,
        "versions": versions,
        "commit": commit(),
        "seconds": round(seconds, 2),
    }


def commit() -> str:
    """The commit of the source tree, with `+` if it has changes; the package's version where there is no tree."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.strip()

    try:
        tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
        return (
            git("rev-parse", "--short=12", "HEAD")
            + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
            if tracked
            else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return importlib.metadata.version("kvcascade")


def evaluation_table(found: list[Record]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of evaluations of one model on one text, each against the first `full` among them, else the first."""
    baseline = next((r for r in found if r["cache"] == "full"), found[0])
    first = found[0]
    title = f"{first['model']} on {first['data']}: {first['sequences']} windows of {first['context']} tokens"
    title += ", with BOS" if first.get("bos") else ", without BOS"
    columns = [
        "cache",
        "kept",
        "PPL",
        f"Δ nats vs {baseline['cache']}",
        "95 % of Δ",
        "bits/byte",
        "KV bytes",
        "saved",
        "tokens/s",
        "traces",
    ]
    compared = "kl" in first
    columns += ["KL, nats", "same top-1"] if compared else []
    rows = []
    for r in found:
        low, high = paired(r, baseline)
        change = ["", ""] if r is baseline else [f"{r['nll'] - baseline['nll']:+.4f}", f"{low:+.4f} … {high:+.4f}"]
        rows.append([
            r["cache"], str(r["kept"]), f"{r['ppl']:.3f}", *change, f"{r['bits_per_byte']:.4f}", f"{r['kv_bytes']:,}",
            f"{r['compression']:.1%}", f"{r['tokens_per_second']:,.0f}", str(r["traces"]),
            *([f"{r['kl']:.5f}", f"{r['same_top']:.1%}"] if compared else []),
        ])  # fmt: skip
    return title, columns, rows


def paired(record: Record, baseline: Record) -> tuple[float, float]:
    """95 % interval of the difference in mean nats per token between two records of the same windows.

    Comparing window by window takes out the spread between windows, which is far larger than that between caches. NaN for other windows.
    """
    mine, theirs = (np.asarray(each["nll_windows"]) for each in (record, baseline))
    return stats.interval(mine - theirs) if alike(record, baseline) else (math.nan, math.nan)


def alike(record: Record, other: Record) -> bool:
    """Whether two evaluations are of the same windows."""
    return all(record[key] == other[key] for key in ("data", "context", "sequences", "tokens"))


def of_kind(records: list[Record], kind: str) -> list[Record]:
    """The records of one kind, in their order."""
    return [record for record in records if record["kind"] == kind]


def markdown(table: Table) -> str:
    """A table as GitHub shows it; the pipes of a spec are escaped."""
    columns, rows = table
    escape = lambda cells: "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    return "\n".join([escape(columns), "|" + "---|" * len(columns), *map(escape, rows)])
