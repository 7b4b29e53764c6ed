"""Kernels with a fault planted in each, and the same without it; as a program the child process of their check."""

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvcascade.eval.kernels import check
from kvcascade.eval.kernels.cases import Case, Program
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


def of_triton(repeats: int = 1, **options: Any):
    """A matrix's product with itself, tile by tile, of which so many are on their way at once; each is read so many times."""
    N, tiles = 64, 8

    def call(x):
        # Imported here: the other kernels need no Triton.
        import triton_samples

        like = jax.ShapeDtypeStruct((N, N), x.dtype)
        constants: dict[str, Any] = {"ROWS": N * tiles, "N": N, "TIMES": repeats}
        interpret = backend.capability() is None
        return launch(triton_samples.gram, (1,), [x], [like], interpret=interpret, **options, **constants)[0]

    return case("gram", "triton", call, (N * tiles, N))


CASES = {
    "race": of_mosaic(fenced=False),
    "no race": of_mosaic(fenced=True),
    "abort": of_mosaic(fenced=True, aborts=True),
    "extra read": of_triton(repeats=2),
    "one read": of_triton(stages=2),
    "spill": of_triton(warps=2, registers=64),
    "overflow": of_triton(stages=20),
}

if __name__ == "__main__":
    check.cases = lambda: CASES
    check.main(*sys.argv[1:])
