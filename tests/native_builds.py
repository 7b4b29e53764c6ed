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
BUILDS = {
    "the default": ("c++", "", 16),
    "16 lanes, pairs for int8": ("c++", "-mno-avx512fp16", 16),
    "16 lanes without pairs": ("c++", "-mno-avx512bf16 -mno-avx512fp16", 16),
    "8 lanes": ("c++", "-mno-avx512f", 8),
    "8 lanes without AVX2": ("c++", "-mno-avx2 -mno-avx512f", 8),
    "4 lanes": ("c++", "-mno-avx", 4),
    "GCC 11": ("g++-11", "", 16),
    "clang 14": ("clang++-14", "", 16),
}
CHOSEN = "equal or divided or no_power or many_threads or together"


def _run(command, **environment):
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600, cwd=TESTS.parent
    )


@pytest.mark.parametrize("name", BUILDS)
def test_kernels_pass_their_tests(name, tmp_path):
    """Built without a warning, with as many lanes as meant."""
    compiler, flags, lanes = BUILDS[name]
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    environment = {
        "CXX": compiler,
        "KVCASCADE_CXXFLAGS": f"{flags} -Wall -Wextra -Werror",
        "KVCASCADE_CACHE": str(tmp_path),
        "HYPOTHESIS_PROFILE": "few",
    }
    files = [str(TESTS / name) for name in ("test_native.py", "test_pages.py", "test_linear.py")]
    found = _run([sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *files, "-k", CHOSEN], **environment)
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
from slots_reference import attended, held, offered
from kvcascade.kernels import linear, native
from kvcascade.kernels.write import exchange
assert native.ready()
rng, results = np.random.default_rng(0), []
for name in ("int8", "int4h"):
    slots, by = held(rng, name, 2, 3, 300, 64)
    q = jnp.asarray(rng.normal(size=(2, 12, 64)), jnp.float32)
    results += jax.tree.leaves(attended(q, jnp.asarray([250, 3]), [(slots, by)], True, "native"))
    entry, priority = offered(rng, 2, 3, 300, 64, 5)
    results += jax.tree.leaves(exchange(slots, entry, priority, by, False, "native"))
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


# All formats, widths and numbers of slots that leave registers, rows and blocks half full; arrays as small as they can be.
SHAPES = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, ml_dtypes, numpy as np
from kvcascade.cache.codec import CODECS
from kvcascade.cache.errors import BadInput
from kvcascade.kernels import linear, native, pages
from kvcascade.kernels.decode import decode
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.slots import Codecs, Entry, Slots
from kvcascade.kernels.write import exchange
native.SOURCES = sorted(Path(sys.argv[1]).glob("native_*.*"))
assert native.ready()
rng = np.random.default_rng(0)
def stored(name, *shape):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(ml_dtypes.bfloat16))
    *most, H = shape
    if name == "f32": return {"values": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    if name == "bf16": return {"values": draw(*shape)}
    scale = {"scale": draw(*most, 1)}
    if name == "int8": return {"codes": jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)} | scale
    arrays = jax.eval_shape(CODECS[name].encode, jax.ShapeDtypeStruct(shape, jnp.float32))
    bits = lambda x: jnp.asarray(rng.integers(0, 256, x.shape), jnp.uint8)
    return {name: bits(x) if x.dtype == jnp.uint8 else draw(*x.shape) for name, x in arrays.items()}
def fits(name, H):
    try: return CODECS[name].nbytes(H) > 0
    except BadInput: return False
shapes = [(2, 1), (8, 7), (64, 33), (72, 5), (72, 700), (80, 17), (256, 16)]
names = ("f32", "bf16", "int8", "int4", "int3", "int2", "planes", "lloyd4h", "lloyd3h", "lloyd2h")
for (H, S), name in [((H, S), name) for H, S in shapes for name in names if fits(name, H)]:
    slots = Slots(stored(name, 1, 2, S, H), stored(name, 1, 2, S, H), jnp.arange(2 * S, dtype=jnp.int32).reshape(1, 2, S), (jnp.ones((1, 2, S)),))
    by, heads = Codecs(CODECS[name], CODECS[name]), Heads(4, 2, H, window=3 if S == 33 else 0)
    q, now = jnp.ones((1, 4, H)), jnp.asarray([S // 2], jnp.int32)
    jax.block_until_ready(decode(q, now, [(slots, by)], heads, True, "native"))
    entry = Entry(jnp.ones((1, 2, 1, H)), jnp.ones((1, 2, 1, H)), jnp.zeros((1, 2, 1), jnp.int32), (jnp.ones((1, 2, 1)),))
    jax.block_until_ready(exchange(slots, entry, jnp.arange(2 * S + 2.0).reshape(1, 2, S + 1), by, S % 2 == 0, "native"))
    # As many tokens in blocks of 16, the last slot of the pool among them, in lines of one and of several; no block, padding.
    blocks = -(-S // 16)
    pool = pages.Pool(stored(name, blocks, 2, 2, 16, H), stored(name, blocks, 2, 2, 16, H))
    table = jnp.asarray([[*range(blocks)], [-1] * blocks], jnp.int32)
    where, rows = jnp.asarray([S - 1, S - 1, S // 2, 0, -1], jnp.int32), jnp.asarray([0, 0, 0, 1, -1], jnp.int32)
    more = jax.tree.map(lambda x: jnp.concatenate([x, x]), slots)
    jax.block_until_ready(pages.attend(jnp.ones((5, 1, 4, H)), where[:, None], rows, table, pool, 1, by, heads, S, [(more, by)], True, "native"))
    jax.block_until_ready(pages.write(pool, jnp.ones((3, 2, H)), jnp.ones((3, 2, H)), jnp.asarray([0, -1, 16 * blocks - 1], jnp.int32), 1, by, "native"))
for (I, O, R), kind in [(shape, kind) for shape in [(1, 1, 1), (7, 5, 3), (64, 33, 16), (130, 1000, 2)] for kind in linear.WEIGHTS]:
    matrix = linear.store(jnp.asarray(rng.integers(-9, 9, (O, I)), jnp.float32), kind)
    if kind == "int4" and R == 2:
        matrix |= {"low": matrix["scale"]}
    jax.block_until_ready(linear.products(jnp.ones((R, I)), [matrix, matrix], "native"))
print("all shapes")
"""
# No optimisation, because compiling with it takes a minute; in front of Python, which is not built for it, and with the C++ library,
# so that exceptions are passed on.
SANITIZED = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all"


def sanitized(cache, sources=KERNELS):
    """Run the kernels, made of a folder's sources with sanitizers, in all shapes."""
    where = lambda name: subprocess.run(
        ["c++", f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    environment = {
        "LD_PRELOAD": f"{where('libasan.so')} {where('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "CXX": "c++",
        "KVCASCADE_CXXFLAGS": SANITIZED,
        "KVCASCADE_CACHE": str(cache),
    }
    return _run([sys.executable, "-c", SHAPES, str(sources)], **environment)


def test_sanitizers_find_nothing(tmp_path):
    """No byte outside of an array is touched, and nothing is done that C++ does not define."""
    found = sanitized(tmp_path)
    assert (found.returncode, found.stdout) == (0, "all shapes\n"), found.stderr[-6000:]


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
    found = sanitized(tmp_path / "cache", sources)
    assert found.returncode and said in found.stderr, found.stdout + found.stderr[-3000:]
