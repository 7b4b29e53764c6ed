"""The activation's two passes as Triton kernels, for any number of columns."""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kvcascade.kernels import threefry
from kvcascade.kernels.launch import launch
from kvcascade.kernels.nonlinear import CUBIC, LINEAR, Inputs

ROWS, COLUMNS = 32, 64
"""What a block of 128 threads takes of each quarter of the columns."""


def refuses(kind: str, rate: float, inputs: Inputs, *_) -> str | None:
    """Few rows are no work for a kernel of their own: XLA makes them part of another."""
    rows, columns = inputs.up.shape
    if rows < ROWS:
        return f"{rows} rows are fewer than {ROWS}"
    if inputs.up.dtype not in (jnp.float32, jnp.bfloat16):
        return f"no elements in {inputs.up.dtype}"
    return None


def forward(kind: str, rate: float, inputs: Inputs, interpret: bool) -> jax.Array:
    """`activation.forward` in one pass: each input read once, the output written once."""
    shape = jax.ShapeDtypeStruct(inputs.up.shape, inputs.up.dtype)
    (out,) = _launch(_forward, kind, rate, inputs, [], [shape], interpret)
    return out


def backward(kind: str, rate: float, inputs: Inputs, dout: jax.Array, interpret: bool) -> Inputs:
    """`activation.backward` in one pass, the gradients of biases summed per block of rows and the blocks' sums by XLA."""
    rows, columns = inputs.up.shape
    # What there is no gradient of has one element that nobody writes.
    like = lambda x, shape, dtype: jax.ShapeDtypeStruct((1,) if x is None else shape, dtype)
    wide = lambda x: like(x, (rows, columns), inputs.up.dtype)
    sums = lambda x: like(x, (triton.cdiv(rows, ROWS), columns), jnp.float32)
    results = [wide(inputs.up), wide(inputs.gate), sums(inputs.bias), sums(inputs.gate_bias)]
    dup, dgate, dbias, dgate_bias = _launch(_backward, kind, rate, inputs, [dout], results, interpret)
    total = lambda x, blocks: None if x is None else blocks.sum(0)
    gates = None if inputs.gate is None else dgate
    return Inputs(dup, gates, total(inputs.bias, dbias), total(inputs.gate_bias, dgate_bias), None)


def _launch(kernel, kind, rate, inputs, more, results, interpret):
    rows, columns = inputs.up.shape
    Q = threefry.quarter(rows, columns)
    return launch(
        kernel,
        (triton.cdiv(rows, ROWS), triton.cdiv(Q, COLUMNS)),
        [*(inputs.up if x is None else x for x in inputs), *more],
        results,
        interpret=interpret,
        R=rows, F=columns, Q=Q, KIND=kind, BIASED=inputs.bias is not None, GATE_BIASED=inputs.gate_bias is not None,
        DROPS=inputs.words is not None, LIMIT=threefry.threshold(rate) << 16, SCALE=1 / (1 - rate),
        WHOLE=rows % ROWS == 0 and columns % (threefry.DRAWS * COLUMNS) == 0, ROWS=ROWS, COLUMNS=COLUMNS,
        LINEAR=LINEAR, CUBIC=CUBIC,
    )  # fmt: skip


@triton.jit
@no_type_check
def _forward(
    up, gate, bias, gate_bias, words, out,
    R: tl.constexpr, F: tl.constexpr, Q: tl.constexpr, KIND: tl.constexpr, BIASED: tl.constexpr, GATE_BIASED: tl.constexpr,
    DROPS: tl.constexpr, LIMIT: tl.constexpr, SCALE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * ROWS * F
    column, at, there, real = _place(0, R, F, Q, ROWS, COLUMNS)
    first = _read(up + start + at, bias + column, there, real, BIASED, WHOLE)
    high, low = _words(words, first, Q, DROPS, ROWS, COLUMNS)
    for d in tl.static_range(4):
        column, at, there, real = _place(d, R, F, Q, ROWS, COLUMNS)
        if d == 0:
            x = first
        else:
            x = _read(up + start + at, bias + column, there, real, BIASED, WHOLE)
        if KIND == "relu":
            x = tl.maximum(x, 0.0)
        elif KIND == "gelu":
            x = x * _sigmoid(x * (LINEAR + CUBIC * x * x))
        else:
            g = _read(gate + start + at, gate_bias + column, there, real, GATE_BIASED, WHOLE)
            if KIND == "geglu":
                x = g * _sigmoid(g * (LINEAR + CUBIC * g * g)) * x
            else:
                x = g * _sigmoid(g) * x
        x = _dropped(x, high, low, d, DROPS, LIMIT, SCALE)
        _write(out + start + at, x, there, WHOLE)


@triton.jit
@no_type_check
def _backward(
    up, gate, bias, gate_bias, words, dout, dup, dgate, dbias, dgate_bias,
    R: tl.constexpr, F: tl.constexpr, Q: tl.constexpr, KIND: tl.constexpr, BIASED: tl.constexpr, GATE_BIASED: tl.constexpr,
    DROPS: tl.constexpr, LIMIT: tl.constexpr, SCALE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * ROWS * F
    column, at, there, real = _place(0, R, F, Q, ROWS, COLUMNS)
    first = _read(up + start + at, bias + column, there, real, BIASED, WHOLE)
    high, low = _words(words, first, Q, DROPS, ROWS, COLUMNS)
    for d in tl.static_range(4):
        column, at, there, real = _place(d, R, F, Q, ROWS, COLUMNS)
        if d == 0:
            x = first
        else:
            x = _read(up + start + at, bias + column, there, real, BIASED, WHOLE)
        gradient = _read(dout + start + at, bias + column, there, real, False, WHOLE)
        gradient = _dropped(gradient, high, low, d, DROPS, LIMIT, SCALE)
        if KIND == "relu":
            by_up = tl.where(x > 0, gradient, 0.0)
        elif KIND == "gelu":
            square = x * x
            s = _sigmoid(x * (LINEAR + CUBIC * square))
            by_up = gradient * (s + s * (1 - s) * x * (LINEAR + 3 * CUBIC * square))
        else:
            g = _read(gate + start + at, gate_bias + column, there, real, GATE_BIASED, WHOLE)
            if KIND == "geglu":
                square = g * g
                s = _sigmoid(g * (LINEAR + CUBIC * square))
                by_gate = gradient * (x * (s + s * (1 - s) * g * (LINEAR + 3 * CUBIC * square)))
            else:
                s = _sigmoid(g)
                by_gate = gradient * (x * s * (1 + g * (1 - s)))
            by_up = gradient * (g * s)
            _write(dgate + start + at, by_gate, there, WHOLE)
            if GATE_BIASED:
                _sum(dgate_bias + column, by_gate, real, F)
        _write(dup + start + at, by_up, there, WHOLE)
        if BIASED:
            _sum(dbias + column, by_up, real, F)


@triton.jit
@no_type_check
def _place(
    d: tl.constexpr, R: tl.constexpr, F: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The block's columns in quarter d, offsets from its first row, which of those there are, and which of the columns."""
    row = tl.arange(0, ROWS)
    inside = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column = d * Q + inside
    real = (inside < Q) & (column < F)
    there = (tl.program_id(0) * ROWS + row < R)[:, None] & real[None, :]
    return column, row[:, None] * F + column[None, :], there, real


@triton.jit
@no_type_check
def _read(at, bias, there, real, BIASED: tl.constexpr, WHOLE: tl.constexpr):
    """Elements in float32, and their columns' biases added."""
    if WHOLE:
        x = tl.load(at).to(tl.float32)
        if BIASED:
            x += tl.load(bias)[None, :]
    else:
        x = tl.load(at, mask=there, other=0).to(tl.float32)
        if BIASED:
            x += tl.load(bias, mask=real, other=0)[None, :]
    return x


@triton.jit
@no_type_check
def _write(at, x, there, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(at, x.to(at.dtype.element_ty))
    else:
        tl.store(at, x.to(at.dtype.element_ty), mask=there)


@triton.jit
@no_type_check
def _sum(at, gradient, real, F: tl.constexpr):
    """A row of the blocks' sums; rows that there are not have gradients of zero."""
    tl.store(at + tl.program_id(0) * F, tl.sum(gradient, 0), mask=real)


@triton.jit
@no_type_check
def _sigmoid(x):
    # 1 / y as the square of 1 / sqrt(y), one instruction and exact to 2^-21; a division takes several.
    root = tl.rsqrt(1 + tl.exp(-x))
    return root * root


@triton.jit
@no_type_check
def _dropped(x, high, low, d: tl.constexpr, DROPS: tl.constexpr, LIMIT: tl.constexpr, SCALE: tl.constexpr):
    """`threefry.keep` for draw d, and the scale of what is kept."""
    if DROPS:
        if d < 2:
            word = low
        else:
            word = high
        if d % 2 == 0:
            word = word << 16
        x = tl.where(word < LIMIT, x * SCALE, 0.0)
    return x


@triton.jit
@no_type_check
def _words(words, first, Q: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`threefry.threefry2x32` of the block's counters."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    low = row.to(tl.uint32)[:, None] * Q + inside.to(tl.uint32)[None, :]
    # Adds zero, and the layout of what was loaded: with one of their own, the masks would go through shared memory to get to the elements.
    low += first.to(tl.uint32, bitcast=True) >> 31 >> 1
    high = tl.zeros_like(low)
    if DROPS:
        key0, key1 = tl.load(words), tl.load(words + 1)
        key2 = key0 ^ key1 ^ 0x1BD11BDA
        high, low = high + key0, low + key1
        high, low = _rounds(high, low, 13, 15, 26, 6, key1, key2 + 1)
        high, low = _rounds(high, low, 17, 29, 16, 24, key2, key0 + 2)
        high, low = _rounds(high, low, 13, 15, 26, 6, key0, key1 + 3)
        high, low = _rounds(high, low, 17, 29, 16, 24, key1, key2 + 4)
        high, low = _rounds(high, low, 13, 15, 26, 6, key2, key0 + 5)
    return high, low


@triton.jit
@no_type_check
def _rounds(high, low, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, key_high, key_low):
    """Four rounds with their distances, and the addition of the key after them."""
    high, low = _round(high, low, A)
    high, low = _round(high, low, B)
    high, low = _round(high, low, C)
    high, low = _round(high, low, D)
    return high + key_high, low + key_low


@triton.jit
@no_type_check
def _round(high, low, DISTANCE: tl.constexpr):
    high += low
    return high, ((low << DISTANCE) | (low >> (32 - DISTANCE))) ^ high
