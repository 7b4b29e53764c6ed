"""What goes into an engine and what comes out of it, and what its steps run on."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from kvcascade.cache.blocks import Blocks
from kvcascade.cache.errors import BadInput
from kvcascade.cache.retention import Retention
from kvcascade.cache.snapshots import Snapshots
from kvcascade.model.sampling import FREE, GREEDY, Restriction, Sampling, restrictions
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


class Draw(NamedTuple):
    """How a row's next token is drawn."""

    sampling: Sampling
    restriction: Restriction = FREE


@runtime_checkable
class Grammar(Protocol):
    """What a row's text must be like: it is told each token, and says which may come next."""

    def allowed(self) -> np.ndarray:
        """A bit for each token, as `sampling.Restriction` has it."""
        ...

    def take(self, token: int) -> None:
        """Hear of the next token."""
        ...


class Asked(NamedTuple):
    """A row that generates, of which tokens are to be foreseen."""

    row: Row
    room: int
    """So many at most."""
    draw: Draw
    """How its tokens are drawn."""


@runtime_checkable
class Runs(Protocol):
    """What steps run on: a model with a pool (`device.Device`), or what stands in for one."""

    vocab: int
    context: int
    limits: Limits
    about: dict[str, str | int]

    @property
    def snapshots(self) -> Snapshots | None:
        """What rows' own slots had after chunks of their prompts, where there are such slots."""
        ...

    def pool(self) -> Blocks:
        """See `device.Device.pool`."""
        ...

    def run(self, found: Plan, draws: Mapping[int, Sequence[Draw]], tell: bool) -> Drawn:
        """See `device.Device.run`."""
        ...

    def note(self, row: Row, by: Sampling) -> None:
        """See `device.Device.note`."""
        ...

    def forget(self, row: Row) -> None:
        """See `device.Device.forget`."""
        ...

    def fork(self, row: Row, more: Row) -> None:
        """See `device.Device.fork`."""
        ...

    def places(self, row: Row) -> np.ndarray | None:
        """See `device.Device.places`."""
        ...

    def foresee(self, asked: Sequence[Asked]) -> list[list[int]]:
        """See `device.Device.foresee`."""
        ...

    def room(self, position: int) -> int:
        """See `device.Device.room`."""
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
    bias: tuple[tuple[int, float], ...] = ()
    """What is added to the logits of some tokens."""
    grammar: Callable[[], Grammar] | None = None
    """What makes the grammar of each of its rows."""
    ahead: bool = True
    """Whether tokens may be computed that are only foreseen, where the engine foresees any."""
    watched: bool = False
    """Whether events tell where the tokens are."""


def check(request: Request, context: int, vocab: int) -> None:
    """BadInput for what no engine of such a context and vocabulary could answer."""
    if not request.prompt:
        raise BadInput("the prompt is empty")
    if request.count < 1 or request.continuations < 1:
        raise BadInput("a request is for a token and a continuation at least")
    if (limit := len(request.prompt) + request.count) > context:
        raise BadInput(f"{limit} tokens are more than the engine's context of {context}")
    if not all(0 <= token < vocab for token in request.prompt):
        raise BadInput(f"a prompt's tokens are numbers from 0 to {vocab - 1}")
    if not 0 <= request.likely <= TOP:
        raise BadInput(f"how likely other tokens were is told of {TOP} at most, not of {request.likely}")
    restrictions([Restriction(bias=request.bias)], vocab)


def seeded(sampling: Sampling, row: int) -> Sampling:
    """How the row of that number among a request's continuations draws."""
    return dataclasses.replace(sampling, seed=(sampling.seed + row) % 2**32)


class Event(NamedTuple):
    """A token of a row, or its end."""

    id: int
    token: int | None
    logprob: float | None
    finished: str = ""
    """Why it is over: stop, length, error or cancelled."""
    likely: Likely = ()
    began: float = 0.0
    """When its turn came, by the engine's clock."""
    found: int = 0
    """Tokens of the prompt that had been computed for others."""
    places: np.ndarray | None = None
    """Of a request that is watched, where it has tiers of its own: which holds each position [layers, KV heads, positions], -1: none."""
