"""How much each slot deserves to stay: what a policy is, and how its arguments are written. The policies are in `policies.py`."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvcascade.cache.errors import BadInput
from kvcascade.cache.statistic import Memory, Statistic
from kvcascade.kernels.heads import Heads

PINNED = 1e30  # above every priority, below that of the token being decoded

Positive = Annotated[int, "from 1 on"]
"""An argument that is a whole number from 1 on."""
Whole = Annotated[int, "from 0 on"]
"""An argument that is a whole number from 0 on."""
Place = Annotated[str, "of a folder"]
"""An argument that is a folder's path, empty where none is named."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """Ranks the slots of a tier: the one with the lowest priority goes first, of equals the one of the oldest position."""

    append_only: ClassVar[bool] = False
    """Whether tokens that come in the order of their positions never leave: a slot's content then follows from the tokens before it alone."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = argument(field.type)
            try:
                kind.read(kind.write(value))
            except ValueError:
                raise BadInput(f"{field.name} must be {kind.what}, not {value!r}") from None

    def alike(self) -> bool:
        """Whether all heads of a layer keep the same tokens, where they are offered the same."""
        return False

    def check(self, heads: Sequence[Heads]) -> None:
        """BadInput if it cannot rank the tokens of a model whose layers have these heads."""

    def content(self) -> str:
        """What tells it from others of the same arguments: the fingerprint of a file that it ranks by."""
        return ""

    def reads(self) -> tuple[Statistic | Memory, ...]:
        """The numbers of tokens and the memories of the layer that `priority` is given; only what some policy reads is kept."""
        return ()

    def priority(
        self, pos_BKS: Int[Array, "B K S"], read: tuple[Any, ...], now_B11: Int[Array, "B 1 1"]
    ) -> Float[Array, "B K S"]:
        """Higher stays. `pos` is the position held (-1: empty, ignored), `read` what the policy `reads`, in that order: [B, K, S] of a
        statistic; `now` is the newest position of each row. Slots and newcomers are ranked in one call. By default it is the one number
        that the policy reads."""
        (number_BKS,) = read
        return number_BKS


def age(pos_BKS: Int[Array, "B K S"], now_B11: Int[Array, "B 1 1"]) -> Float[Array, "B K S"]:
    """Minus how long ago each position was: exact for ages below 2^24, wherever the row stands, which positions in float32 are not."""
    return (pos_BKS - now_B11).astype(jnp.float32)


def standardised(x: Float[Array, "*some B K S"], among_BKS: Bool[Array, "B K S"]) -> Float[Array, "*some B K S"]:
    """How many standard deviations a number is above the mean of those that count; 0 where they are all alike."""
    ones_S1 = jnp.ones((among_BKS.shape[-1], 1), x.dtype)  # a product with ones is a sum, in half the time
    x = jnp.where(among_BKS, x, 0)
    there = jnp.broadcast_to(among_BKS, x.shape).astype(x.dtype)
    count, total, squares = jnp.stack([there, x, x**2]) @ ones_S1
    mean, square = total / jnp.maximum(count, 1), squares / jnp.maximum(count, 1)
    return there * (x - mean) / jnp.sqrt(jnp.maximum(square - mean**2, 1e-12))


class Argument(NamedTuple):
    """How a policy's argument of one type stands in a spec's text."""

    what: str
    read: Callable[[str], Any]
    """Raises ValueError for a text that is none."""
    write: Callable[[Any], str]


def _matching(pattern: str, value: str) -> str:
    if not re.fullmatch(pattern, value):
        raise ValueError
    return value


def _finite(value: str) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _from(least: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if (number := int(value)) < least:
            raise ValueError
        return number

    return read


ARGUMENTS = {
    Positive: Argument("a whole number from 1 on", _from(1), repr),
    Whole: Argument("a whole number from 0 on", _from(0), repr),
    int: Argument("a whole number", int, repr),
    float: Argument("a finite number", _finite, repr),
    bool: Argument(
        "true or false", lambda value: _matching("true|false", value) == "true", lambda value: str(value).lower()
    ),
    str: Argument("a word", lambda value: _matching(r"[\w.+-]+", value), str),
    Place: Argument("a path without spaces and | , ; @ [ ]", lambda value: _matching(r"[^\s|,;@\[\]]*", value), str),
}


def argument(kind: Any) -> Argument:
    """How an argument of that type is read and written; BadInput for a type that a spec cannot write."""
    if kind not in ARGUMENTS:
        raise BadInput(f"a policy's argument must be of the type int, float, bool or str, not {kind}")
    return ARGUMENTS[kind]
