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
from typing import Literal

import jax
from jax import lax
from jaxtyping import Array

from kvcascade.kernels.files import cache_dir, write_whole
from kvcascade.kernels.slots import Stored

SOURCE = Path(__file__).with_name("native.cc")
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


def run[R](
    implementation: Literal["xla", "native"] | None,
    kernel: Callable[..., R],
    reference: Callable[..., R],
    *arguments,
    suits: bool = True,
) -> R:
    """Call `kernel` (`native`) where the program is compiled for a CPU, and `reference` (`xla`) elsewhere and for the gradient.

    None takes the kernel if it suits the arguments and could be compiled. Raises NotImplementedError if it is asked for and could not.
    """
    if implementation is None:
        implementation = "native" if suits and ready() else "xla"
    if implementation == "xla":
        return reference(*arguments)
    if not ready():
        raise NotImplementedError("the C++ kernels could not be compiled on this machine")
    # Flat, because the cotangent of an integer array has a type that is allowed nowhere else.
    leaves, tree = jax.tree.flatten(arguments)
    result_trees = []

    def flat(function, *leaves):
        results, result_tree = jax.tree.flatten(function(*tree.unflatten(leaves)))
        result_trees.append(result_tree)
        return results

    on_cpu, elsewhere = functools.partial(flat, kernel), functools.partial(flat, reference)

    @jax.custom_vjp
    def call(*leaves):
        return lax.platform_dependent(*leaves, cpu=on_cpu, default=elsewhere)

    call.defvjp(lambda *leaves: (call(*leaves), leaves), lambda leaves, ct: jax.vjp(elsewhere, *leaves)[1](ct))
    results = call(*leaves)
    return result_trees[0].unflatten(results)


ORDER = ("values", "codes", "scale", "low")


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
    key = hashlib.sha256("\0".join([machine, SOURCE.read_text(), jax.__version__, *compiler]).encode()).hexdigest()
    path = cache_dir() / f"native-{key[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder, path.name)
            _run([*compiler, "-fPIC", "-shared", "-isystem", include, str(SOURCE), "-o", str(built)])
            write_whole(path, built.read_bytes())
    return path


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
