"""The C++ kernels for a CPU: compiled on first use with the system's compiler, kept in the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jaxtyping import Array

from kvcascade.kernels.backend import Kernel
from kvcascade.kernels.files import cache_dir, write_whole
from kvcascade.kernels.slots import Slots, Stored, unknown

SOURCES = sorted(Path(__file__).parent.glob("native_*.*"))
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]


@functools.cache
def ready() -> bool:
    """Whether the kernels could be compiled and loaded; the first call does it (about 5 s once), and says in one line if it cannot.

    The compiler is `CXX`, else `c++`.
    """
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        why = next((line for line in lines if "error" in line), lines[-1])
        logging.getLogger(__name__).warning("no C++ kernels, decoding goes through XLA and is slower: %s", why)
        return False
    for name in ("kvcascade_decode", "kvcascade_exchange", "kvcascade_product"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def kernel(call: Callable, refuses: Callable[..., str | None] = lambda *arguments: None) -> Kernel:
    """A C++ kernel for `backend.run`, which says of its arguments why it cannot take them, and refuses all where it was not compiled."""
    missing = lambda: None if ready() else "the C++ kernels could not be compiled on this machine"
    return Kernel(call, lambda *arguments: refuses(*arguments) or missing())


ORDER = ("values", "codes", "scale", "low")


def unread(*slots: Slots) -> str | None:
    """Why the kernels cannot read slots, or None."""
    for stored in (stored for tier in slots for stored in (tier.k, tier.v)):
        types = {x.dtype.name for x in stored.values()}
        if not set(stored) <= set(ORDER) or not types <= {"float32", "bfloat16", "int8", "uint8"}:
            return unknown(stored)
    return None


def arrays(stored: Stored) -> list[Array]:
    """The arrays of stored vectors in the order in which the kernels expect them."""
    return [stored[name] for name in ORDER if name in stored]


def named(like: Stored, results: Sequence[Array]) -> Stored:
    """The inverse of `arrays`, named as in `like`."""
    return dict(zip([name for name in ORDER if name in like], results, strict=True))


def _build() -> Path:
    compiler = [*shlex.split(os.environ.get("CXX") or "c++"), *FLAGS]
    # What the compiler defines by itself names its version and this processor's instructions, so a cache shared by machines is safe.
    machine = _run([*compiler, "-dM", "-E", "-x", "c++", os.devnull])
    include = jax.ffi.include_dir()
    sources = [path.read_text() for path in SOURCES]
    key = hashlib.sha256("\0".join([machine, *sources, jax.__version__, *compiler]).encode()).hexdigest()
    path = cache_dir() / f"native-{key[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder, path.name)
            units = [str(path) for path in SOURCES if path.suffix == ".cc"]
            _run([*compiler, "-fPIC", "-shared", "-isystem", include, *units, "-o", str(built)])
            write_whole(path, built.read_bytes())
    return path


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
