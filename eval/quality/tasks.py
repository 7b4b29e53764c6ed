"""Records of lm-evaluation-harness's tasks, which need it only to be made."""

import importlib.metadata
from types import SimpleNamespace
from typing import Any

from kvcascade.cache.spec import CacheSpec
from kvcascade.eval.memory.arithmetic import full_bytes
from kvcascade.eval.records import TaskResult, grouped
from kvcascade.eval.table import CACHE, KV_BYTES, SAVED, Column, Table
from kvcascade.model.pretrained import Model


def record(
    model: Model, spec: CacheSpec, result: dict[str, Any], context: int, longest: int, size: int, chat: bool
) -> TaskResult:
    """The record of one of lm-evaluation-harness's tasks behind one cache: its `result`, and the bytes of the cache of the longest row.

    `context` are the most tokens that a row was let have, `longest` those that the longest had.
    """
    full = full_bytes(model.config, longest)
    return TaskResult(
        model=model.name, weights=model.config.weights, cache=str(spec), **result, chat=chat, context=context, longest=longest, kv_bytes=size,
        kv_bytes_full=full, compression=1 - size / full, lm_eval=importlib.metadata.version("lm-eval"), seed=model.seed,
    )  # fmt: skip


def table(found: list[TaskResult]) -> Table:
    """A row per task, metric and cache, with lm-eval's standard error."""
    short = lambda value: f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
    metric = lambda row: row.metric + ("" if row.filter == "none" else f" ({row.filter})")
    value = lambda row: " ± ".join(short(x) for x in (row.value, row.stderr) if x is not None)
    columns = [
        Column("task", "task"), Column("metric", metric), CACHE, Column("value ± stderr", value), Column("samples", "samples"),
        Column("longest row", "longest"), KV_BYTES._replace(name="KV bytes of it"), SAVED,
    ]  # fmt: skip
    each = [(r, metric) for mine in grouped(found, lambda r: r.task) for r in mine for metric in r.metrics]
    first = found[0]
    title = f"{first.model}: tasks of lm-evaluation-harness {first.lm_eval}, rows of up to {first.context} tokens"
    return Table.of(title, columns, [SimpleNamespace(**vars(r) | metric) for r, metric in each])
