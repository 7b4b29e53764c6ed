"""What was measured, one JSON object per line: a record has its protocol, its bytes, its seed and where it comes from."""

import datetime
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import rich.table

from kvcascade.cache.errors import BadInput
from kvcascade.eval.record_keys import not_finite
from kvcascade.kernels import processor
from kvcascade.model.config import ModelConfig

SCHEMA = 2
"""Counted up when the meaning of a key changes."""

type Record = dict
type Table = tuple[list[str], list[list[str]]]
"""Columns and rows."""


def full_bytes(config: ModelConfig, context: int) -> int:
    """Bytes per row of a bf16 cache of all that a query may see of the context, keys and values alone.

    Σ over layers of K · (key width + value width) · 2 · slots, and slots are the context, or a layer's window if that is less.
    """
    slots = lambda heads: min(context, heads.window or context)
    return sum(heads.kv * (heads.width + heads.value_width) * 2 * slots(heads) for heads in config.layer_heads)


def stamp(record: Record, seconds: float) -> Record:
    """Add what every record says of where it comes from, and what it took. BadInput for a figure that is not finite."""
    if key := not_finite(record):
        what = ", ".join(str(record[name]) for name in ("model", "cache") if name in record)
        raise BadInput(f"{what}: {key} is not finite, so nothing is recorded")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return record | _origin() | {"date": now, "load": round(os.getloadavg()[0], 2), "seconds": round(seconds, 2)}


@functools.cache
def _origin() -> Record:
    """What is the same for all records of a process: asked once, before somebody edits the source tree."""
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    packages = ("jax", "jaxlib", "flax", "numpy", "kvcascade")
    return {
        "schema": SCHEMA,
        "device": device.device_kind + cores,
        "processor": processor.name(),
        "threads": processor.count(),
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "commit": commit(),
        "command": shlex.join(["kvcascade", *sys.argv[1:]]),
    }


def commit() -> str:
    """The commit of the source tree, with `+` if it has changes; the package's version where there is no tree."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return importlib.metadata.version("kvcascade")


def of_kind(records: list[Record], kind: str) -> list[Record]:
    """The records of one kind, in their order."""
    return [record for record in records if record["kind"] == kind]


def rich_table(title: str, columns: list[str], rows: list[list[str]]) -> rich.table.Table:
    """A table as a terminal shows it: its first column is text, the others are figures."""
    shown = rich.table.Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown(table: Table) -> str:
    """A table as GitHub shows it; the pipes of a spec are escaped."""
    columns, rows = table
    escape = lambda cells: "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    return "\n".join([escape(columns), "|" + "---|" * len(columns), *map(escape, rows)])
