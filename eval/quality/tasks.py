"""Records of lm-evaluation-harness's tasks, which need it only to be made."""

import importlib.metadata

from kvcascade.cache.spec import CacheSpec
from kvcascade.eval.records import Record, full_bytes
from kvcascade.model.pretrained import Model


def record(model: Model, spec: CacheSpec, result: Record, context: int, longest: int, size: int, chat: bool) -> Record:
    """The record of one of lm-evaluation-harness's tasks behind one cache: its `result`, and the bytes of the cache of the longest row.

    `context` are the most tokens that a row was let have, `longest` those that the longest had.
    """
    full = full_bytes(model.config, longest)
    return {
        "kind": "harness",
        "model": model.name,
        "weights": model.config.weights,
        "cache": str(spec),
        **result,
        "chat": chat,
        "context": context,
        "longest": longest,
        "kv_bytes": size,
        "kv_bytes_full": full,
        "compression": 1 - size / full,
        "lm_eval": importlib.metadata.version("lm-eval"),
        "seed": model.seed,
    }


def table(found: list[Record]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: a row per task, metric and cache, with lm-eval's standard error."""
    rows, order = [], list(dict.fromkeys(r["task"] for r in found))
    for r in sorted(found, key=lambda r: order.index(r["task"])):
        for each in r["metrics"]:
            name = each["metric"] + ("" if each["filter"] == "none" else f" ({each['filter']})")
            value = " ± ".join(
                f"{x:.4f}" if abs(x) < 1e6 else f"{x:.4g}" for x in (each["value"], each["stderr"]) if x is not None
            )
            rows.append([
                r["task"], name, r["cache"], value, str(r["samples"]), str(r["longest"]), f"{r['kv_bytes']:,}",
                f"{r['compression']:.1%}",
            ])  # fmt: skip
    title = f"{found[0]['model']}: tasks of lm-evaluation-harness {found[0]['lm_eval']}, rows of up to {found[0]['context']} tokens"
    return (
        title,
        ["task", "metric", "cache", "value ± stderr", "samples", "longest row", "KV bytes of it", "saved"],
        rows,
    )
