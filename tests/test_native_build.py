"""How the C++ kernels are built, found again and shared among threads: by any compiler, without one, under a quota, after a fork."""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slots_reference import attended, held

from kvcascade.kernels import linear, native, processor

KERNELS = Path(native.__file__).parent
needs_compiler = pytest.mark.skipif(not native.ready(), reason="no C++ compiler")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that writes its arguments where the library should be, in an empty cache; returns how often it has run."""
    path, log = tmp_path / "compiler", tmp_path / "log"
    path.write_text(f'#!/bin/sh\necho run >> {log}\nfor last; do :; done\necho "$@" > "$last"\n')
    path.chmod(0o755)
    log.touch()
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("KVCASCADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KVCASCADE_CXXFLAGS", raising=False)
    return lambda: len(log.read_text().splitlines())


def test_a_library_is_built_once(compiler):
    first = native.library()
    assert native.library() == first and compiler() == 1


@pytest.mark.parametrize("missing", ["false", "/no/such/compiler"])
def test_a_library_needs_no_compiler_any_more(compiler, missing, monkeypatch):
    built = native.library()
    monkeypatch.setenv("CXX", missing)
    assert native.library() == built and compiler() == 1


def test_another_compiler_builds_anew(compiler):
    first = native.library()
    with Path(os.environ["CXX"]).open("a") as script:
        script.write("# a newer version\n")
    assert native.library() != first and compiler() == 2


def _other_sources(tmp_path, monkeypatch):
    for source in native.SOURCES:
        (tmp_path / source.name).write_text(source.read_text() + "// changed\n")
    monkeypatch.setattr(native, "SOURCES", sorted(tmp_path.glob("native_*.*")))


def _other_processor(tmp_path, monkeypatch):
    known = "processor\t: 0\nmodel\t: 1\nflags\t: fpu sse\n\nprocessor\t: 1\n"
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(known)
    monkeypatch.setattr(processor, "ROOT", tmp_path)
    assert processor.identity().splitlines()[1:] == ["model\t: 1", "flags\t: fpu sse"]


def _other_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("KVCASCADE_CXXFLAGS", "-mno-avx -O1")


@pytest.mark.parametrize("change", [_other_sources, _other_processor, _other_flags])
def test_a_library_of_other_sources_another_processor_or_other_flags_is_never_used(
    compiler, change, tmp_path, monkeypatch
):
    """Not even where there is no compiler: it would be wrong, or end in an illegal instruction."""
    own = os.environ["CXX"]
    first = native.library()
    change(tmp_path, monkeypatch)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(OSError, match="false ended with 1"):
        native.library()
    monkeypatch.setenv("CXX", own)
    assert native.library() != first and compiler() == 2


def test_libraries_for_other_processors_are_taken_where_nothing_can_be_compiled(compiler, monkeypatch, tmp_path):
    """The best that the processor has the instructions for, of the same sources; none, and an error, for one that has not."""
    best, usual = native.build(tmp_path / "built")
    assert compiler() == 2 and "-march=x86-64-v4" in best.read_text() and "-march=native" not in best.read_text()
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("KVCASCADE_NATIVE", str(tmp_path / "built"))
    flags = lambda *levels: " ".join(["flags :", *(flag for level in levels for flag in native.LEVELS[level])])
    for has, want in ((flags(*native.LEVELS), best), (flags("x86-64-v3"), usual), ("flags : avx2", None)):
        monkeypatch.setattr(processor, "identity", lambda has=has: has)
        if want:
            assert native.library() == want
        else:
            with pytest.raises(OSError):
                native.library()
    monkeypatch.setattr(processor, "identity", lambda: flags(*native.LEVELS))
    _other_sources(tmp_path, monkeypatch)
    with pytest.raises(OSError):
        native.library()


def test_flags_of_the_environment_come_after_the_own(compiler, monkeypatch):
    monkeypatch.setenv("KVCASCADE_CXXFLAGS", "-mno-avx '-DNAME=two words'")
    assert "-march=native" in native.library().read_text().partition("-mno-avx -DNAME=two words")[0]


@needs_compiler
def test_kernels_run_where_the_compiler_has_gone():
    program = (
        "import jax.numpy as jnp; from kvcascade.kernels.linear import products;"
        "print(products(jnp.ones((1, 3)), [{'weight': jnp.ones((2, 3))}], 'native')[0])"
    )
    found = _python(program, CXX="/bin/false")
    assert found == "[[3. 3.]]\n"


def _python(program, **environment):
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize(
    ("groups", "files", "count"),
    [
        ("", {}, 64),
        ("0::/", {}, 64),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "max 100000"}, 64),
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "300000 100000"}, 1),
        ("0::/outside/of/the/container", {"cpu.max": "400000 100000"}, 4),
        ("0::/../../a", {"cpu.max": "400000 100000"}, 4),
        ("4:memory:/a\n1:cpu:/a\n0::/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 64),
        (
            "1:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "100000", "cpu,cpuacct/a/cpu.cfs_period_us": "50000"},
            2,
        ),
        ("1:cpuset:/a", {"cpuset/a/cpu.max": "100000 100000"}, 64),
        ("1:cpu:/outside", {"cpu/cpu.cfs_quota_us": "100", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("0::/a", {"unified/a/cpu.max": "700000 100000"}, 7),
        ("0::/", {"cpu.max": "9900000 100000"}, 64),
    ],
)
def test_threads_are_as_many_as_the_quota_pays_for(groups, files, count, tmp_path, monkeypatch):
    for name, text in (
        {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    ).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(processor, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert processor.count() == count


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_threads_are_no_more_than_the_affinity_allows():
    program = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from kvcascade.kernels import processor; print(processor.count())"
    )
    assert _python(program) == "1\n"


@needs_compiler
@pytest.mark.skipif(processor.count() < 2 or not Path("/proc/self/task").exists(), reason="one processor, or no /proc")
@pytest.mark.parametrize(("quota", "more"), [("max", 1), ("100000", 0)])
def test_a_quota_of_one_processor_starts_no_threads(quota, more, tmp_path):
    """The threads of the process before and after the first product that is worth two; without a quota there is one more."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text(f"{quota} 100000\n")
    shutil.copy("/proc/cpuinfo", tmp_path / "proc/cpuinfo")
    program = f"""
import os
from pathlib import Path
import jax, jax.numpy as jnp
from kvcascade.kernels import linear, processor
processor.ROOT = Path({str(tmp_path)!r})
cpus = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, cpus)
threads = lambda: len(os.listdir("/proc/self/task"))
def call(x, *matrices):
    return jax.block_until_ready(jax.jit(lambda x, w: linear.products(x, [{{"weight": w}}], "native"))(x, *matrices))
call(jnp.ones((1, 16)), jnp.ones((16, 16)))
x, w = jnp.ones((1, 1024)), jnp.ones((4096, 1024))
before = threads()
assert (call(x, w)[0] == 1024).all()
print(threads() - before)
"""
    assert _python(program) == f"{more}\n"


@needs_compiler
def test_kernels_called_from_several_threads_at_once_are_right():
    """Attention and products of one process from four threads: each result is, bit for bit, that of a call alone."""
    rng = np.random.default_rng(0)
    slots = [held(rng, "bf16", 2, 3, 700, 64)]
    matrix = linear.store(jnp.asarray(rng.normal(size=(1500, 512)), jnp.float32), "int8")
    attend = jax.jit(lambda q: attended(q, jnp.full(2, 600, jnp.int32), slots, True, "native"))
    multiply = jax.jit(lambda x: linear.products(x, [matrix], "native"))
    calls = [
        (attend if i % 2 else multiply, jnp.asarray(rng.normal(size=(2, 12, 64) if i % 2 else (4, 512)), jnp.float32))
        for i in range(8)
    ]
    want = [jax.device_get(call(x)) for call, x in calls]

    def often(first):
        return [(i % 8, jax.device_get(calls[i % 8][0](calls[i % 8][1]))) for i in range(first, first + 200)]

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for found in threads.map(often, range(4)):
            for i, got in found:
                jax.tree.map(np.testing.assert_array_equal, got, want[i])


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_a_kernel_without_memory_raises():
    """The kernel's own memory, some 64 MB, does not fit any more when it is called: Python hears of it, and the process lives on."""
    program = """
import resource
import jax, jax.numpy as jnp
from kvcascade.cache.codec import CODECS
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.slots import Codecs, Slots
from kvcascade.kernels.decode import decode
stored = {"values": jnp.zeros((1, 1, 4, 64))}
held = [(Slots(stored, stored, jnp.full((1, 1, 4), -1)), Codecs(CODECS["f32"], CODECS["f32"]))]
heads = Heads(1 << 16, 1, 64)
q, now = jnp.ones((1, 1 << 16, 64)), jnp.zeros(1, jnp.int32)
call = jax.jit(lambda q: decode(q, now, held, heads, False, "native")[0].out_BTNW.sum()).lower(q).compile()
size = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (size + (40 << 20), resource.RLIM_INFINITY))
try:
    print(call(q))
except jax.errors.JaxRuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(call(q))
"""
    failed, then = _python(program).splitlines()
    assert "RESOURCE_EXHAUSTED" in failed and "bad_alloc" in failed
    assert then == "0.0"


PLANTED = {
    "the caller does not wait": (r"for \(int spins = 0; inside_.*\n", "\n"),
    "the child keeps the parent's pool": (r"\(pthread_atfork.*\), (new Workers)\)", r"\1"),
    "what a task throws is lost": (r"failed_\.store\(true\)", ""),
    "no thread refused": (r"refused_ = true", "throw"),
    "more threads than allowed": (r"threads = std::min\(threads.*\n", "\n"),
}


@pytest.fixture(scope="module")
def stress(tmp_path_factory):
    """Build and run the program that hammers the pool, on the pool as it is or with a fault planted in it."""
    compiler = os.environ.get("CXX") or "c++"
    if not shutil.which(compiler):
        pytest.skip("no C++ compiler")

    def run(what, fault="", flags=(), seconds=60):
        folder = tmp_path_factory.mktemp("stress")
        text = (KERNELS / "native_workers.h").read_text()
        if fault:
            text, count = re.subn(*PLANTED[fault], text)
            assert count == 1, "the fault could not be planted"
        (folder / "native_workers.h").write_text(text)
        program = Path(__file__).with_name("native_stress.cc")
        command = [
            compiler,
            "-std=c++17",
            "-O1",
            "-g",
            *flags,
            f"-I{folder}",
            str(program),
            "-o",
            str(folder / "run"),
            "-pthread",
        ]
        subprocess.run([*command, "-ldl"], check=True)
        return subprocess.run([folder / "run", what, str(seconds)], capture_output=True, text=True, timeout=100)

    return run


@pytest.mark.parametrize("what", ["callers", "throws"])
def test_threads_do_not_race(stress, what):
    """Two callers of the pool, and tasks that throw, under ThreadSanitizer."""
    found = stress(what, flags=["-fsanitize=thread"])
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{what}: 0 wrong\n", "")


def test_a_caller_that_does_not_wait_is_a_race(stress):
    found = stress("callers", "the caller does not wait", ["-fsanitize=thread"])
    assert found.returncode and "ThreadSanitizer: data race" in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "fault", "flags"),
    [
        ("forks", "the child keeps the parent's pool", []),
        ("throws", "what a task throws is lost", []),
        ("alone", "no thread refused", ["-DREFUSE_THREADS"]),
        ("few", "more threads than allowed", []),
    ],
)
def test_the_pool_survives(stress, what, fault, flags):
    """Forks, tasks that throw, a system that starts no threads, fewer threads than asked for; without what is there for it, it does not."""
    assert stress(what, flags=flags).returncode == 0
    assert stress(what, fault, flags, seconds=2).returncode != 0
