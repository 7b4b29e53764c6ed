"""Promises that whoever calls a cache makes, and programs in which each of them is looked at."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import checkify
from jaxtyping import Array, Bool

from kvcascade.cache.errors import BadInput

_checking = jax.make_user_context(False)


def promise(holds: Callable[[], Bool[Array, ""]], broken: str) -> None:
    """Something that a cache relies on; in a `checked` program it is looked at, elsewhere it costs nothing."""
    if _checking.value:
        checkify.check(holds(), broken)


def checked[R](function: Callable[..., R], **options: Any) -> Callable[..., R]:
    """A function, compiled, in which every promise is looked at: it raises BadInput with the first that was broken.

    `options` are those of `jax.jit`. Its result is waited for.
    """
    program = jax.jit(functools.wraps(function)(checkify.checkify(function, errors=checkify.user_checks)), **options)

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> R:
        with _checking(True):
            error, result = program(*arguments, **keywords)
        if message := error.get():
            raise BadInput(message.removesuffix(" (`check` failed)"))
        return result

    return call
