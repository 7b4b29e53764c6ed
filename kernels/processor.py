"""What this process has of the machine: which processor, and how much of it."""

import itertools
import math
import os
import platform
import re
from pathlib import Path

ROOT = Path("/")
# What says which instructions there are: of x86, of Arm, of others. Not the clock and the like, which change from start to start.
_NAMES = re.compile(r"(vendor_id|cpu family|model|stepping|flags|Features|CPU \w+|cpu|isa|uarch|features)\s*:")


def identity() -> str:
    """Return what tells processors of different instructions apart; where the system does not say, this machine alone."""
    known = []
    if (path := ROOT / "proc/cpuinfo").exists():
        with path.open() as lines:
            # The first processor is enough, and on a machine of many the whole file takes long to write.
            known = [line for line in itertools.takewhile(str.strip, lines) if _NAMES.match(line)]
    return "".join([platform.machine(), "\n", *known]) if known else str(platform.uname())


def count() -> int:
    """Return how many threads can work at once: of the processors that this process may use, as many as its quota pays for."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota())))


def _quota() -> float:
    """The processors that control groups of either version grant, those around this process's own included; infinite without a limit."""
    limits = [math.inf]
    for line in _text(ROOT / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        mounts = ("cpu", controllers) if "cpu" in controllers.split(",") else () if controllers else ("", "unified")
        for mount in mounts:
            # In a container the group may be named as outside of it; then only the root of the mount is found.
            own = ROOT / "sys/fs/cgroup" / mount / group.lstrip("/")
            limits += [_limit(folder) for folder in (own, *own.parents)]
    return min(limits)


def _limit(folder: Path) -> float:
    # One file in version 2, two in version 1.
    words = " ".join(_text(folder / f"cpu.{name}") for name in ("max", "cfs_quota_us", "cfs_period_us")).split()
    return int(words[0]) / int(words[1]) if words and words[0].isdigit() else math.inf  # no limit is `max` or -1


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
