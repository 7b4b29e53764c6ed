"""Triton kernels that tests/test_launch.py launches."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _twice(x):
    return x + x


@triton.jit
@no_type_check
def row_sums(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(2):
        total += tl.load(x + row * COLUMNS + column, mask=column < COLUMNS, other=0).to(tl.float32)
    tl.store(out + row, _twice(tl.sum(total, 0)) / 4)


@triton.jit
@no_type_check
def product(x, y, rounded, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left = tl.load(x + m[:, None] * K + k[None, :]).to(tl.bfloat16)
    tl.store(rounded + m[:, None] * K + k[None, :], left)
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(left, tl.load(y + k[:, None] * N + n[None, :])))


@triton.jit
@no_type_check
def put(index, value, slots, S: tl.constexpr):
    row = tl.program_id(0)
    tl.store(slots + row * S + tl.load(index + row), tl.load(value + row))


@triton.jit
@no_type_check
def sum_of_bf16(x, out):
    tl.store(out, tl.load(x) + tl.load(x))


@triton.jit
@no_type_check
def gram(x, out, ROWS: tl.constexpr, N: tl.constexpr, TIMES: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.zeros((N, N), tl.float32)
    for row in range(0, ROWS, N):
        at = (row + i)[:, None] * N + i[None, :]
        tile = tl.load(x + at)
        for _ in tl.static_range(TIMES - 1):
            tile += tl.load(x + at)
        total = tl.dot(tl.trans(tile), tile, total, input_precision="tf32")
    tl.store(out + i[:, None] * N + i[None, :], total)
