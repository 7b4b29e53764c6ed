"""Compiled programs kept in the user's cache: the next start neither traces nor compiles what an earlier one did."""

import contextlib
import functools
import hashlib
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from kvcascade.kernels import native, processor
from kvcascade.kernels.files import cache_dir, make_room, source_key, write_whole
from kvcascade.model.config import ModelConfig

ROOM = 2**28
"""Bytes that all kept programs take at most: the ones not used for longest go."""

type Compiled = Callable[..., Callable]
"""`(step, config, *arguments, **static)`: what is called with the arguments, which may be donated, as the jitted step would be."""


def traced(step: Any, config: ModelConfig, *arguments: Any, **static: Any) -> Callable:
    """The step as `jit` has it."""
    return functools.partial(step, config, **static)


def kept(step: Any, config: ModelConfig, *arguments: Any, **static: Any) -> Callable:
    """The step's executable for arguments of these shapes, from the user's cache or put there.

    It is of the same source, libraries, processor and settings; where there are several devices, it is what `traced` gives. The folder is
    the user's own.
    """
    if len(jax.devices()) > 1:
        return traced(step, config, *arguments, **static)
    native.ready()  # what the executable calls
    shapes = [jax.typeof(leaf) for leaf in jax.tree.leaves(arguments)]
    key = (step.__name__, config, static, jax.tree.structure(arguments), shapes, *_circumstances())
    file = cache_dir() / "executables" / f"{step.__name__}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
    from jax.experimental import serialize_executable

    with contextlib.suppress(Exception):  # whatever is wrong with a file, it can be made again
        found = serialize_executable.deserialize_and_load(*pickle.loads(file.read_bytes()))
        file.touch()
        return found
    with _compiling():
        compiled = step.lower(config, *arguments, **static).compile()
    try:
        content = pickle.dumps(serialize_executable.serialize(compiled))
        make_room(file.parent, ROOM - len(content))
        write_whole(file, content)
    except (OSError, ValueError, TypeError, pickle.PickleError, jax.errors.JaxRuntimeError) as error:
        # XLA does not write down everything: on a CPU, no sort that has run already in this process.
        level = logging.WARNING if isinstance(error, OSError) else logging.DEBUG
        logging.getLogger("kvcascade").log(level, "no program is kept in %s: %s", file.parent, error)
    return compiled


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Without JAX's own cache: an executable of XLA that comes from there cannot be kept again, it would lack its functions."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it looks at the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@functools.cache
def _circumstances() -> tuple[str, ...]:
    """What a program depends on besides its step and its arguments."""
    told = {
        name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_", "KVCASCADE_CXX", "CXX"))
    }
    device = jax.devices()[0]
    return (
        source_key("cache", "kernels", "model", "serve"),
        jax.__version__,
        f"{device.platform} {device.device_kind} {device.client.platform_version}",
        processor.identity(),
        f"{processor.count()} {native.ready()} {sorted(told.items())}",
    )
