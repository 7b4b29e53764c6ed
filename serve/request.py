"""What goes into an engine and what comes out of it, and what its steps run on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from kvcascade.cache.retention import Retention
from kvcascade.model.sampling import GREEDY, Sampling
from kvcascade.serve.plan import Limits, Plan, Row

TOP = 20
"""The most tokens of which a step says how likely they were."""

type Likely = tuple[tuple[int, float], ...]
"""The likeliest tokens and their log-probabilities, the likeliest first."""


class Drawn(NamedTuple):
    """What a step brought: for each row that draws, in the order of the runs, its token; and how many tokens its program was for."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    likely: Sequence[Likely]
    """TOP of each, or () where nobody has asked."""
    size: int


@runtime_checkable
class Runs(Protocol):
    """What steps run on: a model with a pool (`device.Device`), or what stands in for one."""

    blocks: int
    size: int
    vocab: int
    context: int
    limits: Limits
    about: dict[str, str | int]

    def run(self, found: Plan, draws: Mapping[int, Sequence[Sampling]], likely: bool) -> Drawn:
        """See `device.Device.run`."""
        ...

    def note(self, row: Row, sampling: Sampling) -> None:
        """See `device.Device.note`."""
        ...

    def forget(self, row: Row) -> None:
        """See `device.Device.forget`."""
        ...

    def quicker(self, blocks: int) -> bool:
        """See `device.Device.quicker`."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt that is continued."""

    prompt: Sequence[int]
    count: int
    """Tokens that are generated at most."""
    sampling: Sampling = GREEDY
    continuations: int = 1
    """Rows that go on from the one prompt; they draw by seeds one after the other."""
    stops: frozenset[int] = frozenset()
    """Tokens after which a row is over."""
    priority: int = 0
    """The lowest goes first."""
    retention: tuple[Retention, ...] = ()
    """How long blocks of its prompt are kept when it is over."""
    salt: str = ""
    """Only requests of the same salt share prefixes."""
    likely: int = 0
    """Of how many of the likeliest tokens each event tells, TOP at most."""


class Event(NamedTuple):
    """A token of a row, or its end."""

    id: int
    token: int | None
    logprob: float | None
    finished: str = ""
    """Why it is over: stop, length, error or cancelled."""
    likely: Likely = ()
