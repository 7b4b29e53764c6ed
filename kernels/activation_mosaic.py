"""The activation's two passes as kernels for Hopper and Ampere, in Pallas on Mosaic GPU."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kvcascade.kernels import threefry
from kvcascade.kernels.nonlinear import Inputs, slopes, value

ROWS, COLUMNS = 32, 64
"""What a block of 128 threads takes of each quarter of the columns."""


def refuses(kind: str, rate: float, inputs: Inputs, *_) -> str | None:
    """Blocks are whole, and elements float32 or bfloat16."""
    rows, columns = inputs.up.shape
    if rows % ROWS or columns % (threefry.DRAWS * COLUMNS):
        return f"{rows} rows of {columns} are no multiples of {ROWS} and {threefry.DRAWS * COLUMNS}"
    if inputs.up.dtype not in (jnp.float32, jnp.bfloat16):
        return f"no elements in {inputs.up.dtype}"
    return None


def forward(kind: str, rate: float, inputs: Inputs, interpret: bool) -> jax.Array:
    """`activation.forward` in one pass: each input read once, the output written once."""
    return _call(kind, rate, inputs, None, interpret)


def backward(kind: str, rate: float, inputs: Inputs, dout: jax.Array, interpret: bool) -> Inputs:
    """`activation.backward` in one pass, the gradients of biases summed per block of rows and the blocks' sums by XLA."""
    up, gate, bias, gate_bias = _call(kind, rate, inputs, dout, interpret)
    total = lambda blocks: None if blocks is None else blocks.sum(0)
    return Inputs(up, gate, total(bias), total(gate_bias), None)


def _sigmoid(x):
    # 1 / y as the square of 1 / sqrt(y), which the GPU has an instruction for: a division takes ten times as many.
    root = lax.rsqrt(1 + jnp.exp(-x))
    return root * root


def _call(kind, rate, inputs, dout, interpret):
    # Importing it takes a second, and few processes need it.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, columns = inputs.up.shape
    Q = threefry.quarter(rows, columns)
    block = ROWS, COLUMNS
    # Vectors of four elements: eight float32 of a bias are no one load, and sums over the rows do not cross warps eight at a time.
    layout = plgpu.Layout.SMEM_GMEM_COPY(block, jnp.float32, swizzle=128)
    like = lambda x: None if x is None else jax.ShapeDtypeStruct((rows, columns), x.dtype)
    sums = lambda x: None if x is None else jax.ShapeDtypeStruct((rows // ROWS, columns), jnp.float32)
    up, gate, bias, gate_bias, _ = inputs
    wanted = like(up) if dout is None else (like(up), like(gate), sums(bias), sums(gate_bias))
    sources, source_tree = jax.tree.flatten((inputs, dout))
    results, result_tree = jax.tree.flatten(wanted)

    def body(*refs):
        source, dout_ref = source_tree.unflatten(refs[: len(sources)])
        result = result_tree.unflatten(refs[len(sources) :])
        i, j = lax.axis_index("i"), lax.axis_index("j")

        def one_quarter(quarter, mask):
            at = pl.ds(i * ROWS, ROWS), pl.ds(quarter * Q + j * COLUMNS, COLUMNS)
            read = lambda ref: plgpu.load(ref.at[at], layout=layout).astype(jnp.float32)
            dropped = lambda x: x if mask is None else jnp.where(mask, x * (1 / (1 - rate)), 0.0)

            def biased(ref, bias_ref):
                if ref is None or bias_ref is None:
                    return ref if ref is None else read(ref)
                along = plgpu.load(bias_ref.at[at[1]], layout=layout.reduce(0))
                return read(ref) + lax.broadcast_in_dim(along, block, [1])

            operands = kind, biased(source.up, source.bias), biased(source.gate, source.gate_bias), _sigmoid
            if dout_ref is None:
                result[at] = dropped(value(*operands)).astype(up.dtype)
                return
            dout = dropped(read(dout_ref))
            for slope, ref, sum_ref in zip(slopes(*operands), result[:2], result[2:], strict=True):
                if slope is not None:
                    gradient = dout * slope
                    ref[at] = gradient.astype(up.dtype)
                    if sum_ref is not None:
                        sum_ref[i, at[1]] = gradient.sum(axis=0)

        kept = [None] * threefry.DRAWS
        if source.words is not None:
            row, column = (plgpu.broadcasted_iota(jnp.int32, block, axis, layout=layout) for axis in (0, 1))
            counter = (row + i * ROWS).astype(jnp.uint32) * jnp.uint32(Q) + (column + j * COLUMNS).astype(jnp.uint32)
            kept = threefry.keep(source.words[0], source.words[1], counter, rate)
        for quarter, mask in enumerate(kept):
            one_quarter(quarter, mask)

    call = plgpu.kernel(
        body,
        out_type=results,
        grid=(rows // ROWS, Q // COLUMNS),
        grid_names=("i", "j"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=8192),
        kernel_name=f"activation_{'forward' if dout is None else 'backward'}",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    return result_tree.unflatten(call(*sources))
