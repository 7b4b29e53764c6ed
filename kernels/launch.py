"""Launch of a Triton kernel from JAX: compiled for a GPU by jax-triton, or interpreted in numpy on a CPU."""

import functools
import importlib.util
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import jax

from kvcascade.kernels import backend


def refuses() -> str | None:
    """Why no Triton kernel runs here, or None. A module that imports triton at its top is imported after this was asked."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    capability = backend.capability()
    if capability and not importlib.util.find_spec("jax_triton"):
        return "jax-triton is not installed"
    if capability and capability < (8, 0):
        return "Triton needs a GPU of compute capability 8.0"
    return None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arrays: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct] = (),
    *,
    interpret: bool,
    in_place: Sequence[int] = (),
    warps: int = 4,
    stages: int = 3,
    registers: int | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Run a Triton kernel whose parameters are a pointer for every array, one for every result, then constants by name.

    It and the functions that it calls are declared `@triton.jit` over `@no_type_check`: Triton reads their source, and the wrapper that a
    type checker puts around them in tests has another one.
    `in_place` counts the arrays that the kernel writes into; they are returned, in that order, before the results. All arrays are contiguous.
    A thread may use so many `registers`; unless it is told, ptxas spills a few to fit one more block.
    Interpreted, the arrays are copies, and `traffic.counting` sees every load and store.
    """
    written = [jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in in_place]
    out_types = [*written, *results]
    if interpret:
        from kvcascade.kernels import interpreter

        run = functools.partial(interpreter.interpret, kernel, grid, constants, tuple(in_place), tuple(results))
        return jax.pure_callback(run, out_types, *arrays)
    capability = backend.capability()
    assert capability, "compiled only where there is a GPU or a target"
    with warnings.catch_warnings():
        # jax-triton would rather have Refs, which the branches of `lax.platform_dependent` do not take.
        warnings.filterwarnings("ignore", "input_output_aliases is deprecated", DeprecationWarning)
        return _jax_triton().triton_call(
            *arrays,
            kernel=kernel,
            out_type=out_types,
            grid=grid,
            input_output_aliases={i: n for n, i in enumerate(in_place)},
            num_warps=warps,
            num_stages=stages,
            compute_capability=capability[0] * 10 + capability[1],
            # Triton 3.9 writes PTX 9.4 for Hopper and newer, which the ptxas of CUDA 12 does not read.
            backend_options={"ptx_version": 88, "enable_fp_fusion": True, "maxnreg": registers},
            **constants,
        )


@functools.cache
def _jax_triton() -> Any:
    import jax_triton  # pyright: ignore
    from jax._src.interpreters import partial_eval
    from jax_triton import triton_lib  # pyright: ignore

    # jax-triton 0.4.1 knows the rule for dead code as it was before JAX 0.12, and fails in every jit.
    if len(inspect.signature(triton_lib._triton_kernel_call_dce_rule).parameters) == 2:
        partial_eval.dce_rules[triton_lib.triton_kernel_call_p] = lambda ctx, used, eqn: ([True] * len(eqn.invars), eqn)
    return jax_triton
