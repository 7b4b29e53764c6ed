"""Which implementation of an operation runs: the reference in jnp, C++ on a CPU, or a GPU kernel."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax

from kvcascade.kernels import operation

type Implementation = Literal["xla", "native", "mosaic", "triton"]

using = jax.make_user_context()
"""`with using("mosaic"):` gives every operation that implementation where it has it and it does not refuse; programs are traced anew."""

target = jax.make_user_context()
"""The compute capability (major, minor) of the GPU that programs are compiled for ahead of time; None: that of the GPU at hand."""

_asking = jax.make_user_context()


class Kernel(NamedTuple):
    """A kernel that stands in for a reference: `call` takes the same arguments; a GPU's takes also `interpret`, to run on a CPU."""

    call: Callable
    refuses: Callable[..., str | None]
    """Says of the same arguments why the kernel cannot take them, or None."""


class Choice(NamedTuple):
    """The implementation that runs an operation, by platform (`cpu`, `cuda`, `default` for the others), and why its other kernels do not."""

    operation: str
    runs: dict[str, str]
    refused: dict[str, str]


class _Choices(list[Choice]):
    __hash__ = object.__hash__  # pyright: ignore  # contexts are part of the key of a trace


def choices(program: Callable, *arguments) -> list[Choice]:
    """What runs the operations of a program, and why nothing better does, equal ones once; the program is only traced.

    `with target((9, 0)):` answers for a GPU that is not there.
    """
    found = _Choices()
    with _asking(found):
        jax.make_jaxpr(program)(*arguments)
    return found


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
    implementation: Implementation | None,
    reference: Callable[..., R],
    kernels: Mapping[str, Kernel],
    *arguments,
    axes: str = "BK -> BK",
    gradient: Callable | None = None,
) -> R:
    """Call the reference (`xla`) or one of the kernels.

    None takes what is best where the program is compiled for: `native` on a CPU, on a GPU the first of the others that does not refuse.
    A GPU's kernel that is asked for where there is no GPU is interpreted. Raises NotImplementedError, with the reason, for a kernel that
    is asked for and refuses.

    `axes` names the leading axes of the arrays in each argument and in each result, or in all of them; `_` is one without a name.
    Along a name all parts are done alike and each by itself: devices may divide it among them, and `jax.vmap` puts its axis into the first.
    Derivatives are the reference's, but in reverse mode those of `gradient`, called with the arguments and the results' cotangents.
    """
    chosen, refused = _choose(implementation, kernels, arguments)
    if _asking.value is not None:
        name = getattr(reference, "func", reference).__module__.rpartition(".")[2]
        runs = {"default": "xla"} | {platform: kernel for platform, (kernel, _) in chosen.items()}
        choice = Choice(name, runs, refused)
        _asking.value.extend([choice] if choice not in _asking.value else [])
    calls = {platform: call for platform, (_, call) in chosen.items()}
    return operation.apply(reference, calls, arguments, axes, gradient)


def _choose(
    implementation: str | None, kernels: Mapping[str, Kernel], arguments: Sequence
) -> tuple[dict[str, tuple[str, Callable]], dict[str, str]]:
    """The kernels that take the reference's place, by platform, and why the others do not."""

    def why_not(name: str) -> str | None:
        # Where there is no GPU its kernels are asked only by name: answering may import a compiler.
        if name in ("native", asked) or capability():
            return kernels[name].refuses(*arguments)
        return "there is no GPU"

    asked = implementation or using.value
    if asked == "xla":
        return {}, {}
    if implementation and implementation not in kernels:
        raise NotImplementedError(f"no {implementation} kernel for this operation")
    refused = {name: reason for name in ([implementation] if implementation else kernels) if (reason := why_not(name))}
    if implementation in refused:
        raise NotImplementedError(f"{implementation}: {refused[implementation]}")
    willing = [name for name in kernels if name not in refused]
    if asked in willing:
        willing = [asked]
    chosen = {}
    for name in willing:
        call = kernels[name].call
        if name == "native":
            chosen["cpu"] = name, call
        elif capability():
            chosen.setdefault("cuda", (name, functools.partial(call, interpret=False)))
        else:
            chosen["default"] = name, functools.partial(call, interpret=True)
    return chosen, refused
