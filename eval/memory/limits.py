"""A child process under a hard limit of memory, told apart by how it ended; nothing of it outlives its parent.

Two ways to a limit, both the kernel's. A memory cgroup counts the pages that a process has touched, the kernel's tables for them and
the file pages that it was first to read, which the kernel takes back before it kills. `RLIMIT_DATA`, where no cgroup may be made,
counts private writable addresses, touched or not: stacks of threads and what allocators keep in reserve as well. (`RLIMIT_AS` would
count even addresses that nobody may write to, several GB with XLA.)
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcascade.cache.errors import BadInput
from kvcascade.eval.worker import Worker, WorkerEnded

SYSTEM = Path("/sys/fs/cgroup")
NAMES = {
    # version of cgroups: the limit, that of swap, the most that was used, the file that counts kills
    1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"),
    2: ("memory.max", "memory.swap.max", "memory.peak", "memory.events"),
}
UNITS = {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, base in (("B", 1000), ("iB", 1024))
}
# What the C++ and the Python runtimes, the C library and XLA say when they are refused memory.
REFUSED = re.compile(r"bad_alloc|MemoryError|[Oo]ut of memory|Cannot allocate memory|failed to map segment")


def parse_bytes(text: str) -> int:
    """Bytes of a text such as `6GB` (10⁹) or `700MiB` (2²⁰); BadInput if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", text)
    if not match or not float(match[1]):
        raise BadInput(f"{text!r} is not an amount of memory, such as 6GB or 700MiB")
    return int(float(match[1]) * UNITS[match[2]])


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a child ended: `failed` is empty if it lived, `memory` if the limit killed it, else what happened in one line."""

    said: dict
    """What it said as JSON on its standard output, later lines over earlier ones."""
    failed: str
    peak: int | None
    """The most bytes that its cgroup counted."""


@dataclasses.dataclass(frozen=True)
class Cgroup:
    """Where groups can be made."""

    parent: Path
    version: int

    @contextlib.contextmanager
    def group(self, limit: int) -> Iterator[Path]:
        """A new group with a limit, removed afterwards; groups that dead processes left are removed too. OSError if it may not be made."""
        for folder in self.parent.glob("kvcascade-*"):
            if not Path("/proc", folder.name.rpartition("-")[2]).exists():
                _remove(folder)
        folder = self.parent / f"kvcascade-{os.getpid()}"
        folder.mkdir()
        try:
            for name, value in zip(NAMES[self.version], (limit, limit if self.version == 1 else 0), strict=False):
                if "sw" not in name or (folder / name).exists():  # a kernel may count no swap
                    (folder / name).write_text(str(value), "utf-8")
            yield folder
        finally:
            _remove(folder)

    def peak(self, folder: Path) -> int | None:
        """The most bytes that a group has had, None where the kernel does not say (version 2 before Linux 5.19)."""
        file = folder / NAMES[self.version][2]
        return int(file.read_text("utf-8")) if file.exists() else None

    def killed(self, folder: Path, limit: int) -> bool:
        """Whether the group's own limit killed something in it, and not the machine's memory that ran out."""
        found = re.search(r"^oom_kill (\d+)", (folder / NAMES[self.version][3]).read_text("utf-8"), re.MULTILINE)
        peak = self.peak(folder)
        return found is not None and int(found[1]) > 0 and (peak is None or peak > 0.99 * limit)


def _remove(folder: Path) -> None:
    for _ in range(100):  # what was killed in it takes a moment to be gone
        with contextlib.suppress(OSError):
            folder.rmdir()
        if not folder.exists():
            return
        time.sleep(0.05)


def cgroup(own: str | None = None, system: Path = SYSTEM) -> Cgroup | None:
    """Where this process may make memory cgroups that its children may enter: in its own group, or with version 2 beside it; None if nowhere."""
    try:
        lines = [
            line.split(":", 2)
            for line in (Path("/proc/self/cgroup").read_text("utf-8") if own is None else own).splitlines()
        ]
    except OSError:
        return None
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            mount, version = system / "memory", 1
        elif not controllers and (system / "cgroup.controllers").exists():
            mount, version = system, 2
        else:
            continue
        mine = mount / path.lstrip("/")
        for parent in dict.fromkeys((mine, mine.parent) if mine.is_dir() and mine != mount else (mount,)):
            found = Cgroup(parent, version)
            with contextlib.suppress(OSError), found.group(2**30) as folder:
                if not subprocess.run([*_enter(folder), "true"], stderr=subprocess.DEVNULL).returncode:
                    return found
    return None


def _enter(folder: Path) -> list[str]:
    """What a command starts with to be run in a group from its first byte on."""
    return ["sh", "-c", 'echo 0 > "$0" && exec "$@"', str(folder / "cgroup.procs")]


def run(command: Sequence[str], wanted: dict, limit: int | None, place: Cgroup | None, seconds: float) -> Ended:
    """Run a worker, which is told what is wanted, in a cgroup at `place`, else under RLIMIT_DATA, or without a limit; wait until it has ended.

    Whatever ends this call, it is killed, with what it started, and its group removed; should this process be killed itself, the worker's
    own `attend` sees to that.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(place.group(limit)) if place and limit else None
        if folder:
            before = _enter(folder)
        else:
            before = ["sh", "-c", 'ulimit -d "$0" && exec "$@"', str(limit // 1024)] if limit else []
        worker = stack.enter_context(Worker([*before, *command]))
        worker.tell(wanted)
        said, until = {}, time.monotonic() + seconds
        try:
            while True:
                said |= worker.hear(until - time.monotonic())
        except WorkerEnded as ended:
            failed = "" if ended.status == 0 else str(ended) if ended.status else f"took longer than {seconds:g} s"
            killed = ended.status and folder and place and place.killed(folder, limit or 0)
            if killed or ended.status and REFUSED.search("\n".join(ended.said[-20:])):
                failed = "memory"
        return Ended(said, failed, place.peak(folder) if folder and place else None)
