"""Which implementation of an operation runs: the reference in jnp, C++ on a CPU, or a GPU kernel."""

import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
from jax import lax

type Implementation = Literal["xla", "native", "mosaic", "triton"]

using = jax.make_user_context()
"""`with using("mosaic"):` gives every operation that implementation where it has it and it does not refuse; programs are traced anew."""

target = jax.make_user_context()
"""The compute capability (major, minor) of the GPU that programs are compiled for ahead of time; None: that of the GPU at hand."""


class Kernel(NamedTuple):
    """A kernel that stands in for a reference: `call` takes the same arguments; a GPU's takes also `interpret`, to run on a CPU."""

    call: Callable
    refuses: Callable[..., str | None]
    """Says of the same arguments why the kernel cannot take them, or None."""


def capability() -> tuple[int, int] | None:
    """The compute capability of the GPU that programs are compiled for, None without one."""
    return target.value or _at_hand()


@functools.cache
def _at_hand() -> tuple[int, int] | None:
    try:
        major, minor = jax.devices("cuda")[0].compute_capability.split(".")
    except RuntimeError:
        return None
    return int(major), int(minor)


def run[R](
    implementation: Implementation | None, reference: Callable[..., R], kernels: Mapping[str, Kernel], *arguments
) -> R:
    """Call the reference (`xla`) or one of the kernels; the gradient is always the reference's.

    None takes what is best where the program is compiled for: `native` on a CPU, on a GPU the first of the others that does not refuse.
    A GPU's kernel that is asked for where there is no GPU is interpreted. Raises NotImplementedError, with the reason, for a kernel that
    is asked for and refuses.
    """
    preferred = using.value
    if implementation is None and (
        preferred == "xla" or preferred in kernels and not kernels[preferred].refuses(*arguments)
    ):
        implementation = preferred
    if implementation == "xla":
        return reference(*arguments)
    if implementation:
        if implementation not in kernels:
            raise NotImplementedError(f"no {implementation} kernel for this operation")
        if reason := kernels[implementation].refuses(*arguments):
            raise NotImplementedError(f"{implementation}: {reason}")
        willing = [implementation]
    else:
        # Where there is no GPU its kernels are not asked: answering may import a compiler.
        possible = [name for name in kernels if name == "native" or capability()]
        willing = [name for name in possible if not kernels[name].refuses(*arguments)]
    branches = {}
    if "native" in willing:
        branches["cpu"] = kernels["native"].call
    on_gpu = [name for name in willing if name != "native"]
    if on_gpu and capability():
        branches["cuda"] = functools.partial(kernels[on_gpu[0]].call, interpret=False)
    elif on_gpu and implementation:
        branches["default"] = functools.partial(kernels[implementation].call, interpret=True)
    if not branches:
        return reference(*arguments)
    # Flat, because the cotangent of an integer array has a type that is allowed nowhere else.
    leaves, tree = jax.tree.flatten(arguments)
    result_trees = []

    def flat(function, *leaves):
        results, result_tree = jax.tree.flatten(function(*tree.unflatten(leaves)))
        result_trees.append(result_tree)
        return results

    elsewhere = functools.partial(flat, reference)
    on = {platform: functools.partial(flat, kernel) for platform, kernel in branches.items()}

    @jax.custom_vjp
    def call(*leaves):
        if "default" in on:
            return on["default"](*leaves)
        return lax.platform_dependent(*leaves, **on, default=elsewhere)

    call.defvjp(lambda *leaves: (call(*leaves), leaves), lambda leaves, ct: jax.vjp(elsewhere, *leaves)[1](ct))
    results = call(*leaves)
    return result_trees[0].unflatten(results)
