"""How much each slot deserves to stay.

A new policy is a frozen dataclass with a `priority`, and a line in `POLICIES`; its fields are its arguments in a spec's text.
The laws (tests/test_laws.py) draw from `POLICIES`, so they test it with no test written.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvcascade.cache.errors import BadInput
from kvcascade.cache.statistic import HeadIds, Mass, Memory, Statistic

PINNED = 1e30  # above every priority, below that of the token being decoded


@dataclasses.dataclass(frozen=True)
class Policy:
    """Ranks the slots of a tier: the one with the lowest priority goes first, of equals the one of the oldest position."""

    append_only: ClassVar[bool] = False
    """Whether tokens that come in the order of their positions never leave: a slot's content then follows from the tokens before it alone."""

    def reads(self) -> tuple[Statistic | Memory, ...]:
        """The numbers of tokens and the memories of the layer that `priority` is given; only what some policy reads is kept."""
        return ()

    def priority(
        self, pos_BKS: Int[Array, "B K S"], read: tuple[Any, ...], now_B11: Int[Array, "B 1 1"]
    ) -> Float[Array, "B K S"]:
        """Higher stays. `pos` is the position held (-1: empty, ignored), `read` what the policy `reads`, in that order: [B, K, S] of a
        statistic; `now` is the newest position of each row. Slots and newcomers are ranked in one call."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Full(Policy):
    """Keep everything: a full tier has a slot for every position of the context."""

    append_only: ClassVar[bool] = True

    def priority(self, pos_BKS, read, now_B11):
        return jnp.full(pos_BKS.shape, PINNED, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Recent(Policy):
    """Keep the newest positions: a sliding window (Longformer, Beltagy et al. 2020, §3.1)."""

    def priority(self, pos_BKS, read, now_B11):
        return age(pos_BKS, now_B11)


@dataclasses.dataclass(frozen=True)
class Sink(Policy):
    """Keep the first positions: attention sinks (StreamingLLM, Xiao et al. 2023, §3.2)."""

    append_only: ClassVar[bool] = True

    def priority(self, pos_BKS, read, now_B11):
        return -pos_BKS.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Heavy(Policy):
    """Keep the positions with most accumulated attention: heavy hitters (H2O, Zhang et al. 2023, §4.2)."""

    def reads(self):
        return (Mass(),)

    def priority(self, pos_BKS, read, now_B11):
        return read[0]


@dataclasses.dataclass(frozen=True)
class Random(Policy):
    """Keep positions by lot: the baseline that every other policy must beat.

    Each (layer, head, position) draws once, so the kept set is a uniform sample of all positions seen and a row does not depend on others.
    """

    seed: int = 0

    def reads(self):
        return (HeadIds(),)

    def priority(self, pos_BKS, read, now_B11):
        # A 32-bit integer hash (Wellons' lowbias32): a counter-based draw that costs six operations a slot.
        u32 = jnp.uint32
        heads_BK1 = read[0].astype(u32)[..., None]
        # The digits of pi keep x from 0, whose hash is 0: the first position of the first head would always go first.
        x = pos_BKS.astype(u32) ^ (heads_BK1 * u32(0x9E3779B9) + u32(self.seed * 0x85EBCA6B + 0x243F6A88 & 0xFFFFFFFF))
        x = (x ^ (x >> 16)) * u32(0x7FEB352D)
        x = (x ^ (x >> 15)) * u32(0x846CA68B)
        return (x ^ (x >> 16)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class PositionAware(Policy):
    """Weigh attention mass, recency and being a sink: mass·m/max(m) + recency·pos/now + sink·[pos < sinks] (NeuroKV's position-aware score)."""

    mass: float = 0.6
    recency: float = 0.3
    sink: float = 0.1
    sinks: int = 1

    def reads(self):
        return (Mass(),)

    def priority(self, pos_BKS, read, now_B11):
        held_BKS = jnp.where(pos_BKS >= 0, read[0], 0)
        mass = held_BKS / jnp.maximum(held_BKS.max(-1, keepdims=True), 1e-30)
        recency = pos_BKS / jnp.maximum(now_B11, 1)
        return self.mass * mass + self.recency * recency + self.sink * (pos_BKS < self.sinks)


def age(pos_BKS: Int[Array, "B K S"], now_B11: Int[Array, "B 1 1"]) -> Float[Array, "B K S"]:
    """Minus how long ago each position was: exact for ages below 2^24, wherever the row stands, which positions in float32 are not."""
    return (pos_BKS - now_B11).astype(jnp.float32)


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


ARGUMENTS = {
    int: Argument("a whole number", int, repr),
    float: Argument("a finite number", _finite, repr),
    bool: Argument(
        "true or false", lambda value: _matching("true|false", value) == "true", lambda value: str(value).lower()
    ),
    str: Argument("a word", lambda value: _matching(r"[\w.+-]+", value), str),
}


def argument(kind: Any) -> Argument:
    """How an argument of that type is read and written; BadInput for a type that a spec cannot write."""
    if kind not in ARGUMENTS:
        raise BadInput(f"a policy's argument must be of the type int, float, bool or str, not {kind}")
    return ARGUMENTS[kind]


def text(policy: Policy) -> str:
    """A policy as it is written in a spec: its name, and its arguments where they differ from the defaults."""
    name = next(name for name, cls in POLICIES.items() if cls is type(policy))
    fields = [f for f in dataclasses.fields(policy) if getattr(policy, f.name) != f.default]
    arguments = ",".join(f"{f.name}={argument(f.type).write(getattr(policy, f.name))}" for f in fields)
    return f"{name}[{arguments}]" if arguments else name


POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "sink": Sink,
    "recent": Recent,
    "heavy": Heavy,
    "random": Random,
    "position-aware": PositionAware,
}
