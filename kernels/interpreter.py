"""Triton kernels run in numpy by Triton's own interpreter, without torch and without its switch TRITON_INTERPRET."""

import contextlib
import threading
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from kvcascade.kernels import traffic

TYPES = {
    "bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32, "float64": tl.float64, "float8_e4m3fn": tl.float8e4nv,
    "float8_e5m2": tl.float8e5, "int8": tl.int8, "int16": tl.int16, "int32": tl.int32, "int64": tl.int64,
    "uint8": tl.uint8, "uint16": tl.uint16, "uint32": tl.uint32, "uint64": tl.uint64, "bool": tl.int1,
}  # fmt: skip


_lock = threading.RLock()


class Builder(interpreter.InterpreterBuilder):
    """Triton's interpreter with its faults in bf16 mended, and every access checked and counted."""

    kernel = ""
    arguments: Mapping[str, np.ndarray] = {}

    def _access(self, pointers, mask, loads: bool) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        if not addresses.size:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for name, array in self.arguments.items():
            start = array.ctypes.data
            if start <= addresses.min() and addresses.max() + size <= start + array.nbytes:
                # Lanes of one instruction that ask for the same element share it.
                traffic.note((self.kernel, name), loads, np.unique(addresses).size * size)
                return
        raise IndexError(f"{self.kernel} reads or writes outside of its arrays")

    def create_masked_load(self, ptrs, mask, other, cache_policy, is_volatile):
        self._access(ptrs, mask, loads=True)
        return super().create_masked_load(ptrs, mask, other, cache_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache_policy):
        self._access(ptrs, mask, loads=False)
        return super().create_masked_store(ptrs, value, mask, cache_policy)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:  # cut off there, rounded to even on a GPU
            return interpreter.TensorHandle(src.data.astype(jnp.bfloat16).view(np.uint16), tl.bfloat16)
        return super().cast_impl(src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        # Without this the bit patterns of bf16 are multiplied.
        wide = lambda x: self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        return super().create_dot(wide(a), wide(b), d, input_precision, max_num_imprecise_acc)

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar == tl.bfloat16:
            raise TypeError("Triton's interpreter computes with the bit patterns of bf16: convert to float32 first")
        result = super().binary_op(lhs, rhs, op)
        if result.data.dtype == bool:  # of which it says that it has the type of what was compared
            return interpreter.TensorHandle(result.data, tl.int1)
        return result


_builder = interpreter.interpreter_builder = interpreter.interpreter_semantic.builder = Builder()


@contextlib.contextmanager
def _interpreted() -> Iterator[None]:
    """Triton's language means numpy, also in functions that a kernel calls; what was there before comes back."""
    compiled = JITFunction.__call__
    # The functions that Triton writes in its own language see `core`, ours see `tl`.
    scope = interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    JITFunction.__call__ = lambda self, *args, **kwargs: _function(self)(*args, **kwargs)
    try:
        yield
    finally:
        JITFunction.__call__ = compiled
        scope.restore()


def _function(kernel: Any) -> Any:
    return interpreter.InterpretedFunction(kernel.fn).rewrite()


def interpret(
    kernel: Any,
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
    in_place: tuple[int, ...],
    results: tuple[jax.ShapeDtypeStruct, ...],
    *inputs: Any,
) -> list[np.ndarray]:
    """`launch.launch` in numpy; raises IndexError for an access outside of the arrays. What a kernel does not write is NaN or -1."""
    arrays = [np.array(x, order="C") for x in inputs]
    fresh = [np.full((*x.shape, x.dtype.itemsize), 255, np.uint8).view(x.dtype)[..., 0] for x in results]
    names = [name for name in kernel.arg_names if name not in constants]
    arguments = dict(zip(names, [*arrays, *fresh], strict=True))
    with _lock, _interpreted():
        _builder.kernel, _builder.arguments = kernel.__name__, arguments
        sizes = (*grid, 1, 1)[:3]
        _builder.set_grid_dim(*sizes)
        for index in np.ndindex(*sizes):
            _builder.set_grid_idx(*index)
            _function(kernel)(**{name: _pointer(array) for name, array in arguments.items()}, **constants)
    return [*(arrays[i] for i in in_place), *fresh]


def _pointer(array: np.ndarray) -> tl.tensor:
    kind = tl.pointer_type(TYPES[array.dtype.name])
    return tl.tensor(interpreter.TensorHandle(np.array([array.ctypes.data], np.uint64), kind), kind)
