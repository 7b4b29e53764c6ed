"""What a caller asks to keep: ranges of positions, each with a priority from 0 to 100 and how long it holds. No JAX here."""

import dataclasses
import math
import re

from kvcascade.cache.errors import BadInput

USUAL = 35
"""The priority of what nobody has said anything about, or not any more (TensorRT-LLM's default)."""
LAST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """The priority of the positions from `start` up to `stop`."""

    start: int
    stop: int
    priority: int

    def __post_init__(self):
        if not 0 <= self.start < self.stop <= LAST:
            raise BadInput(f"a range of positions goes from 0 or more to more than that, not {self.start}:{self.stop}")
        if not 0 <= self.priority <= 100:
            raise BadInput(f"a priority is from 0 to 100, not {self.priority}")


@dataclasses.dataclass(frozen=True)
class Hint(Range):
    """A priority among a cache's tokens, until so many positions after them have come; None: for good."""

    duration: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.duration is not None and not 0 <= self.duration <= LAST:
            raise BadInput(f"a priority holds for 0 positions or more, not {self.duration}")

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}={self.priority}" + ("" if self.duration is None else f"@{self.duration}")

    @property
    def until(self) -> int:
        """The newest position at which it still holds."""
        return LAST if self.duration is None else min(self.stop - 1 + self.duration, LAST)


def hint(text: str) -> Hint:
    """The hint that a text such as `0:200=90@500` or `0:200=90` says; BadInput for another."""
    found = re.fullmatch(r"(\d+):(\d+)=(\d+)(?:@(\d+))?", text)
    if not found:
        raise BadInput(f"{text!r} is no hint: a range of positions and a priority, such as 0:200=90 or 0:200=90@500")
    start, stop, priority, duration = found.groups()
    return Hint(int(start), int(stop), int(priority), None if duration is None else int(duration))


@dataclasses.dataclass(frozen=True)
class Retention(Range):
    """A priority among blocks that nobody uses any more, until a time in seconds; it begins anew when the blocks are used."""

    seconds: float = math.inf

    def __post_init__(self):
        super().__post_init__()
        if not self.seconds >= 0:
            raise BadInput(f"a priority holds for 0 seconds or more, not {self.seconds}")
