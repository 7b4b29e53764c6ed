"""What this process has of the machine: which processor, and how much of it."""

import functools
import itertools
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
# What says which instructions there are: of x86, of Arm, of others. Not the clock and the like, which change from start to start.
_NAMES = re.compile(r"(vendor_id|cpu family|model|stepping|flags|Features|CPU \w+|cpu|isa|uarch|features)\s*:")


def identity() -> str:
    """Return what tells processors of different instructions apart; where the system does not say, this machine alone."""
    known = []
    if (path := ROOT / "proc/cpuinfo").exists():
        with path.open(encoding="utf-8") as lines:
            # The first processor is enough, and on a machine of many the whole file takes long to write.
            known = [line for line in itertools.takewhile(str.strip, lines) if _NAMES.match(line)]
    return "".join([platform.machine(), "\n", *known]) if known else str(platform.uname())


@functools.cache
def tiles() -> bool:
    """Return whether the processor multiplies tiles of bfloat16 (AMX), which XLA uses."""
    return "amx_bf16" in identity().split()


def name() -> str:
    """Return what the processor is called; the architecture where the system does not say."""
    found = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", _text(ROOT / "proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def count() -> int:
    """Return how many threads can work at once: of the processors that this process may use, as many as its quota pays for."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota())))


def _quota() -> float:
    """The processors that control groups of either version grant, those around this process's own included; infinite without a limit."""
    return min(map(_limit, _groups("cpu")), default=math.inf)


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups of either version that this process is in, the inner ones first."""
    for line in _text(ROOT / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        mounts = (controller, controllers) if controller in controllers.split(",") else ()
        for mount in mounts if controllers else ("", "unified"):
            # In a container the group may be named as outside of it; then only the root of the mount is found.
            own = ROOT / "sys/fs/cgroup" / mount / group.lstrip("/")
            yield from (own, *own.parents)


def available() -> int | float:
    """Return how many bytes this process may still take: of the system's memory and swap, and of each control group's; infinite where nobody says."""
    known = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(ROOT / "proc/meminfo"), re.MULTILINE))
    system = (
        1024 * (int(known["MemAvailable"]) + int(known.get("SwapFree", 0))) if "MemAvailable" in known else math.inf
    )
    return min([system, *map(_free, _groups("memory"))])


def _free(folder: Path) -> int | float:
    """Bytes that a control group has left; what it holds of files can be taken back."""
    for limit, used, files in (("max", "current", "file"), ("limit_in_bytes", "usage_in_bytes", "total_cache")):
        numbers = [_text(folder / f"memory.{name}").strip() for name in (limit, used)]
        if all(map(str.isdigit, numbers)):
            held = re.search(rf"^{files} (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
            return int(numbers[0]) - int(numbers[1]) + (int(held[1]) if held else 0)
    return math.inf  # no limit is `max`


def _limit(folder: Path) -> float:
    # One file in version 2, two in version 1.
    words = " ".join(_text(folder / f"cpu.{name}") for name in ("max", "cfs_quota_us", "cfs_period_us")).split()
    return int(words[0]) / int(words[1]) if words and words[0].isdigit() else math.inf  # no limit is `max` or -1


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""
