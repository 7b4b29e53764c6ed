"""The C++ kernels as other compilers build them, for narrower registers and under sanitizers: `make native` runs this, `make test` does not.

Each build has a cache and a process of its own, in which the tests of the kernels run; none of them may be skipped there.
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvcascade.kernels import native, processor

TESTS = Path(__file__).parent
KERNELS = Path(native.__file__).parent
NARROW = "-mno-avx2 -mno-avx512f"
BUILDS = {
    "the default": ("c++", "", 16),
    "8 lanes": ("c++", "-mno-avx512f", 8),
    "8 lanes without AVX2": ("c++", NARROW, 8),
    "4 lanes": ("c++", "-mno-avx", 4),
    "GCC 11": ("g++-11", "", 16),
    "GCC 11, 4 lanes": ("g++-11", "-mno-avx", 4),
    "clang 14": ("clang++-14", "", 16),
    "clang 14, 8 lanes": ("clang++-14", NARROW, 8),
}
SLOW = "not gradients and not keeps_its_matrices and not without_a_compiler"
PROGRAM = """
import sys
from pathlib import Path
import pytest
class Sources:
    def pytest_sessionstart(self):
        from kvcascade.kernels import native
        native.SOURCES = sorted(Path(sys.argv[1]).glob("native_*.*"))
sys.exit(pytest.main(sys.argv[2:], plugins=[Sources()]))
"""


def build(cache, compiler, flags, sources=KERNELS, chosen=SLOW, **environment):
    """Run the chosen tests of the kernels in a process of its own, with the kernels that a compiler makes of a folder's sources."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    files = [str(TESTS / name) for name in ("test_native.py", "test_linear.py")]
    # Uncaptured, because a sanitizer ends the process.
    pytest_words = ["-qsx", "-p", "no:cacheprovider", *files, "-k", chosen]
    command = [sys.executable, "-c", PROGRAM, str(sources), *pytest_words]
    return _run(command, CXX=compiler, KVCASCADE_CXXFLAGS=flags, KVCASCADE_CACHE=str(cache), **environment)


def _run(command, **environment):
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600, cwd=TESTS.parent
    )


@pytest.mark.parametrize("name", BUILDS)
def test_kernels_pass_their_tests(name, tmp_path):
    """Built without a warning, with as many lanes as meant."""
    compiler, flags, lanes = BUILDS[name]
    found = build(tmp_path, compiler, f"{flags} -Wall -Wextra -Werror")
    assert found.returncode == 0, found.stdout + found.stderr
    assert " passed" in found.stdout and "skipped" not in found.stdout, found.stdout
    widest = 16 if "avx512f" in processor.identity() else 8
    probe = f'#include "native_lanes.h"\nstatic_assert(kvcascade::kLanes == {min(lanes, widest)}, "lanes");'
    command = [compiler, *native.FLAGS, *shlex.split(flags), f"-I{KERNELS}", "-fsyntax-only", "-x", "c++", "-"]
    subprocess.run(command, input=probe, text=True, check=True)


RESULTS = """
import sys
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp, numpy as np
from slots_reference import held, offered
from kvcascade.cache.codec import CODECS
from kvcascade.kernels import linear, native
from kvcascade.kernels.decode import decode
from kvcascade.kernels.write import exchange
assert native.ready()
rng, results = np.random.default_rng(0), []
for name in ("int8", "int4h"):
    slots = held(rng, name, 2, 3, 300, 64)
    q = jnp.asarray(rng.normal(size=(2, 12, 64)), jnp.float32)
    results += jax.tree.leaves(decode(q, jnp.asarray([250, 3]), [(slots, CODECS[name])], True, implementation="native"))
    entry, priority = offered(rng, 2, 3, 300, 64, 5)
    results += jax.tree.leaves(exchange(slots, entry, priority, CODECS[name], False, "native"))
for weights in ("bfloat16", "int8"):
    matrix = linear.store(jnp.asarray(rng.normal(size=(200, 515)), jnp.float32), weights)
    for rows in (1, 9):
        results += linear.products(jnp.asarray(rng.normal(size=(rows, 515)), jnp.float32), [matrix], "native")
np.savez(sys.argv[1], *[np.asarray(x.astype("float32") if x.dtype == "bfloat16" else x) for x in results])
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the kernels compute, once for each compiler."""
    folder = tmp_path_factory.mktemp("results")

    @functools.cache
    def of(compiler):
        path = folder / f"{compiler}.npz"
        found = _run([sys.executable, "-c", RESULTS, str(path)], CXX=compiler, KVCASCADE_CACHE=str(folder))
        assert found.returncode == 0, found.stderr
        with np.load(path) as file:
            return [file[name] for name in file.files]

    return of


@pytest.mark.parametrize("compiler", ["g++-11", "clang++-14"])
def test_compilers_agree(compiler, results):
    """Codes and positions to the bit, numbers to some units in the last place: compilers fuse other products with other sums."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    assert len(results("c++")) > 20
    for ours, theirs in zip(results("c++"), results(compiler), strict=True):
        if ours.dtype == np.float32:
            np.testing.assert_allclose(theirs, ours, rtol=1e-6, atol=1e-6 * max(1, np.abs(ours).max()))
        else:
            np.testing.assert_array_equal(theirs, ours)


# In front of Python, which is not built with it; the C++ library too, so that exceptions are passed on.
SANITIZED = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


def sanitized(cache, **chosen):
    library = lambda name: subprocess.run(
        ["c++", f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    before = {"LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}", "ASAN_OPTIONS": "detect_leaks=0"}
    return build(cache, "c++", SANITIZED, **chosen, **before)


def test_sanitizers_find_nothing(tmp_path):
    """No byte outside of an array is touched, and nothing is done that C++ does not define."""
    found = sanitized(tmp_path)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-6000:]
    assert " passed" in found.stdout and "skipped" not in found.stdout


@pytest.mark.parametrize(
    ("file", "pattern", "fault", "said"),
    [
        ("native_stored.h", r"i \+ kLanes <= H; i \+= kLanes\) store\(i, Widened\(codes", "i < H; i += kLanes) store(i, Widened(codes", "heap-buffer-overflow"),
        ("native_lanes.h", r"static_cast<uint32_t>\(bits\) << 16", "static_cast<uint32_t>(bits) << 32", "shift exponent 32"),
    ],
    ids=["address", "undefined"],
)  # fmt: skip
def test_sanitizers_find_a_planted_fault(file, pattern, fault, said, tmp_path):
    """Int8 vectors are read in whole registers past their end; bits are shifted out of a number."""
    sources = Path(shutil.copytree(KERNELS, tmp_path / "kernels"))
    text, count = re.subn(pattern, lambda _: fault, (sources / file).read_text())
    assert count == 1, "the fault could not be planted"
    (sources / file).write_text(text)
    found = sanitized(tmp_path / "cache", sources=sources, chosen="divided and 72 and counts1")
    assert found.returncode and said in found.stderr, found.stdout[-2000:] + found.stderr[-3000:]
