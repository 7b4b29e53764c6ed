"""Where a record comes from: the device, the versions, the commit, the command."""

import datetime
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from kvcascade.eval.records import SCHEMA
from kvcascade.kernels import processor


def origin(seconds: float) -> dict[str, Any]:
    """What every record says of where it comes from, and what it took."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return _process() | {"date": now, "load": round(os.getloadavg()[0], 2), "seconds": round(seconds, 2)}


@functools.cache
def _process() -> dict[str, Any]:
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
