"""How much memory a process may still take."""

import math

import pytest

from kvcascade.kernels import processor

SYSTEM = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   4 kB\nSwapFree: 1 kB\n"}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, math.inf),
        (SYSTEM, 5 * 1024),
        (SYSTEM | {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/b/memory.current": "9"}, 5 * 1024),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/memory.max": "900\n", "sys/fs/cgroup/a/memory.current": "500\n"}, 400),
        (
            SYSTEM
            | {
                "proc/self/cgroup": "4:cpu:/a\n3:memory:/a", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "900",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "500", "sys/fs/cgroup/memory/a/memory.stat": "cache 7\ntotal_cache 100\n",
            },
            500,
        ),
    ],
)  # fmt: skip
def test_memory_that_is_left(files, left, tmp_path, monkeypatch):
    """The least of the system's and of every group's, the files that it holds not counted; infinite where nobody says."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(processor, "ROOT", tmp_path)
    assert processor.available() == left
