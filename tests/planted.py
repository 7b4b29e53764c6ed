"""Kernels with a fault planted in each, and the same without it; as a program the child process of their check."""

import os
import sys

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvcascade.eval import kernel_check
from kvcascade.eval.kernel_cases import Case, Program
from kvcascade.kernels import backend
from kvcascade.kernels.launch import launch

ROWS, COLUMNS = 16, 128


def of_mosaic(fenced: bool, aborts: bool = False):
    """Double rows that the TMA brings one after another into one slot; a fence keeps a row from overtaking the reads of the last one."""

    def body(x, out, slot, barrier):
        def step(i, _):
            @pl.when(i > 0)
            def _():
                if fenced:
                    plgpu.commit_smem()

            plgpu.copy_gmem_to_smem(x.at[i], slot, barrier)
            plgpu.barrier_wait(barrier)
            out[i] = 2 * slot[...]

        lax.fori_loop(0, ROWS, step, None)

    def call(x):
        if aborts:
            os.abort()
        interpret = plgpu.InterpretGPUParams(detect_races=True) if backend.capability() is None else False
        scratch = [plgpu.SMEM((COLUMNS,), jnp.float32), plgpu.Barrier()]
        return plgpu.kernel(body, out_type=x, grid=(1,), grid_names=("i",), scratch_types=scratch, interpret=interpret)(
            x
        )

    return case("double", "mosaic", call)


def case(name, implementation, call, shape=(ROWS, COLUMNS)):
    arguments = lambda: (jnp.ones(shape),)
    return Case(name, "", implementation, lambda in_use: Program(call, arguments, ROWS * COLUMNS), "element", 1.1)


def of_triton(name, repeats: int = 1, width: int = 32, **options):
    """A product of a matrix with itself after so many reads; `width` tells how much of it is kept in shared memory."""
    import triton_samples

    def call(x):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        interpret = backend.capability() is None
        return launch(triton_samples.square, (1,), [x], [like], interpret=interpret, N=width, TIMES=repeats, **options)[
            0
        ]

    return case(name, "triton", call, (width, width))


CASES = {
    "race": of_mosaic(fenced=False),
    "no race": of_mosaic(fenced=True),
    "abort": of_mosaic(fenced=True, aborts=True),
    "extra read": of_triton("square", repeats=2),
    "one read": of_triton("square"),
    "spill": of_triton("square", width=64, registers=32),
    "no spill": of_triton("square", width=64),
    "overflow": of_triton("square", width=256, warps=16),
}

if __name__ == "__main__":
    kernel_check.cases = lambda: CASES
    kernel_check.main(sys.argv[1:])
