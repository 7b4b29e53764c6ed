"""The C++ kernels for a CPU: compiled on first use with the system's compiler, kept in the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from kvcascade.kernels import processor
from kvcascade.kernels.backend import Kernel
from kvcascade.kernels.files import cache_dir, write_whole
from kvcascade.kernels.slots import Codec, Pair, Stored, unknown

SOURCES = sorted(Path(__file__).parent.glob("native_*.*"))
HERE = "-march=native"
FLAGS = ["-std=c++17", "-O3", HERE, "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
LEVELS = {
    "x86-64-v4": {
        "avx512f",
        "avx512bw",
        "avx512cd",
        "avx512dq",
        "avx512vl",
        "avx2",
        "bmi1",
        "bmi2",
        "f16c",
        "fma",
        "movbe",
    },
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
}
"""What a compiler calls sets of instructions, the best first, and what the system says of a processor that has them."""


@functools.cache
def ready() -> bool:
    """Whether the kernels could be compiled and loaded; the first call does it (about 5 s once), and says in one line if it cannot.

    The compiler is `CXX`, else `c++`, and `KVCASCADE_CXXFLAGS` are given to it last. Where it does not work, a library is taken
    that was made before, of the same sources on such a processor, or else by `build` in the folder `KVCASCADE_NATIVE`.
    """
    try:
        loaded = ctypes.CDLL(str(library()))
    except OSError as error:
        logging.getLogger(__name__).warning("no C++ kernels, decoding goes through XLA and is slower: %s", error)
        return False
    for name in ("kvcascade_decode", "kvcascade_exchange", "kvcascade_write", "kvcascade_product"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    loaded.kvcascade_threads(ctypes.c_int64(processor.count()))
    return True


def kernel(call: Callable, refuses: Callable[..., str | None] = lambda *arguments: None) -> Kernel:
    """A C++ kernel for `backend.run`, which says of its arguments why it cannot take them, and refuses all where it was not compiled."""
    missing = lambda: None if ready() else "the C++ kernels could not be compiled on this machine"
    return Kernel(call, lambda *arguments: refuses(*arguments) or missing())


ORDER = ("values", "codes", "codes2", "high", "fine", "scale", "low")


def unread(*slots: Pair) -> str | None:
    """Why the kernels cannot read these, or None."""
    for stored in (stored for tier in slots for stored in (tier.k, tier.v)):
        types = {x.dtype.name for x in stored.values()}
        if not set(stored) <= set(ORDER) or not types <= {"float32", "bfloat16", "int8", "uint8"}:
            return unknown(stored)
    return None


def arrays(stored: Stored) -> list[Array]:
    """The arrays of stored vectors in the order in which the kernels expect them."""
    return [stored[name] for name in ORDER if name in stored]


def formats(stored: Sequence[Stored], codecs: Sequence[Codec]) -> dict[str, np.ndarray]:
    """The attributes by which the kernels know how vectors are stored, in the order of their arrays."""
    pairs = zip(stored, codecs, strict=True)
    about = [
        number
        for each, codec in pairs
        for number in (len(each), codec.turned, codec.bits - codec.fine, codec.fine, codec.skipped)
    ]
    levels = [level for codec in codecs for level in codec.levels]
    return {"formats": np.array(about, np.int64), "levels": np.array(levels, np.float32)}


def named(like: Stored, results: Sequence[Array]) -> Stored:
    """The inverse of `arrays`, named as in `like`."""
    return dict(zip([name for name in ORDER if name in like], results, strict=True))


def library() -> Path:
    """The library for these sources on this processor, made by the compiler that is here; where none works, one that was made before."""
    extra = shlex.split(os.environ.get("KVCASCADE_CXXFLAGS", ""))
    made_of = f"native-{_digest(*_sources(), processor.identity(), *FLAGS, *extra)}"
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    # To ask the compiler for its version would take longer than all the rest of this.
    found = _age(shutil.which(compiler[0]) or "")
    path = cache_dir() / f"{made_of}-{_digest(*compiler, *map(str, found))}.so"
    if not path.exists():
        try:
            _compile([*compiler, *FLAGS, *extra], path)
        except OSError:
            made = [*sorted(cache_dir().glob(f"{made_of}-*.so"), key=_age, reverse=True), *_built()]
            if not made:
                raise
            return made[0]
    return path


def build(folder: str | Path) -> list[Path]:
    """Compile a library for each of LEVELS into a folder, for processors that are not this one; OSError where the compiler does not know it."""
    paths = [Path(folder, _named(level)) for level in LEVELS]
    for level, path in zip(LEVELS, paths, strict=True):
        flags = [f"-march={level}" if flag == HERE else flag for flag in FLAGS]
        _compile([*shlex.split(os.environ.get("CXX") or "c++"), *flags], path)
    return paths


def _built() -> list[Path]:
    """The libraries of `build` that this processor can run, the best first."""
    has = {*processor.identity().split()}
    folder = os.environ.get("KVCASCADE_NATIVE")
    paths = [Path(folder, _named(level)) for level, needed in LEVELS.items() if folder and needed <= has]
    return [path for path in paths if path.exists()]


def _named(level: str) -> str:
    return f"native-{level}-{_digest(*_sources(), *FLAGS)}.so"


def _sources() -> list[str]:
    return [*(path.read_text("utf-8") for path in SOURCES), jax.__version__]


def _age(path: str | Path) -> tuple[int, int]:
    """When the file was last written, and its size; zeros where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, path.name)
        units = [str(source) for source in SOURCES if source.suffix == ".cc"]
        command = [*compiler, "-fPIC", "-shared", "-isystem", jax.ffi.include_dir(), *units, "-o", str(built)]
        found = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if found.returncode:
            lines = found.stderr.strip().splitlines() or [f"{compiler[0]} ended with {found.returncode}"]
            raise OSError(next((line for line in lines if "error" in line), lines[-1]))
        write_whole(path, built.read_bytes())
