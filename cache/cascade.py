"""Tiers in a row: what one tier evicts, the next takes in; the last one forgets."""

import dataclasses

from kvcascade.cache.errors import BadInput
from kvcascade.cache.policies import Full, Pending
from kvcascade.cache.statistic import Memory, Statistic
from kvcascade.cache.tier import Tier
from kvcascade.kernels.heads import Heads


@dataclasses.dataclass(frozen=True, init=False)
class Cascade:
    """The cache of one layer as a value: `Cascade(sink(4), recent(60), heavy(64, codec=int8))`."""

    tiers: tuple[Tier, ...]
    front: int
    """A prompt goes past the first so many tiers: they take the tokens that come one by one after it."""

    def __init__(self, *tiers: Tier, front: int = 0):
        if not tiers:
            raise BadInput("a cascade needs at least one tier")
        if any(isinstance(tier.policy, Full) for tier in tiers[:-1]):
            raise BadInput("nothing passes a full tier, so it must be the last")
        for index, tier in enumerate(tiers):
            ranks = any(isinstance(each, Statistic) for each in tier.policy.reads())
            if ranks and tier.policy.alike() and not all(each.policy.alike() for each in tiers[:index]):
                raise BadInput(f"{tier} ranks for all heads together, so the tiers before it must too")
        shared = [index for index, tier in enumerate(tiers) if tier.place == "blocks"]
        if shared and (shared != [0] or front):
            raise BadInput(
                f"{tiers[shared[-1]]} must be the first tier, and the only one on blocks: what it held would else depend on the tiers before it"
            )
        waiting = [index for index, tier in enumerate(tiers) if isinstance(tier.policy, Pending)]
        if waiting and (waiting != [len(shared)] or waiting == [len(tiers) - 1]):
            raise BadInput(
                f"{tiers[waiting[-1]]} must be the first tier of those that rows have of their own, with others behind it: "
                "tokens come to it one by one, and go on together"
            )
        if not 0 <= front < len(tiers):
            raise BadInput(f"of {len(tiers)} tiers {front} cannot stand before those of a prompt")
        object.__setattr__(self, "tiers", tiers)
        object.__setattr__(self, "front", front)

    def __str__(self) -> str:
        written = lambda tiers: " | ".join(map(str, tiers))
        front = f" then {written(self.tiers[: self.front])}" if self.front else ""
        return written(self.tiers[self.front :]) + front

    @property
    def shared(self) -> Tier | None:
        """The tier on blocks."""
        return self.tiers[0] if self.tiers[0].place == "blocks" else None

    @property
    def own(self) -> "Cascade | None":
        """What rows have in slots of their own; None where all is on blocks."""
        if self.shared is None:
            return self
        return Cascade(*self.tiers[1:]) if len(self.tiers) > 1 else None

    @property
    def pending(self) -> int:
        """Tokens that wait at most before they are handed over; 0: none do."""
        first = (self.own or self).tiers[0]
        return first.slots(0) if isinstance(first.policy, Pending) else 0

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The numbers that some policy reads, each once: what a token carries that comes in."""
        return tuple(dict.fromkeys(each for each in self._read() if isinstance(each, Statistic)))

    @property
    def rereads(self) -> tuple[Statistic, ...]:
        """The numbers for which a prompt is read a second time."""
        return tuple(each for each in self.statistics if each.rereads)

    @property
    def memories(self) -> tuple[Memory, ...]:
        """What the layer remembers beside its tokens, each once."""
        reviewed = [each for statistic in self.statistics for each in statistic.reads()]
        return tuple(dict.fromkeys(each for each in [*self._read(), *reviewed] if isinstance(each, Memory)))

    def numbers(self, index: int) -> tuple[Statistic, ...]:
        """The numbers that a tier keeps: those that it or a tier below reads, since tokens carry them down.

        The first tiers, as long as nothing leaves them, keep only what they read themselves.
        """
        stay = not self.front and all(tier.policy.append_only for tier in self.tiers[: index + 1])
        wanted = {*self._read(index, index + 1 if stay else None)}
        return tuple(each for each in self.statistics if each in wanted)

    def _read(self, start: int = 0, stop: int | None = None) -> list[Statistic | Memory]:
        return [each for tier in self.tiers[start:stop] for each in tier.policy.reads()]

    @property
    def observed(self) -> bool:
        """Whether attention mass is collected, since some number depends on it."""
        return any(each.watches for each in self.statistics)

    def slots(self, context: int, window: int = 0) -> int:
        """Tokens kept per KV head, at most the context, and of a layer that sees a `window` at most that."""
        return min(context, window or context, sum(tier.slots(context, window) for tier in self.tiers))

    def nbytes(self, context: int, heads: Heads) -> int:
        """Predicted bytes of one row in one layer; BadInput if a codec cannot store these heads."""
        tiers = sum(tier.nbytes(context, heads, len(self.numbers(i))) for i, tier in enumerate(self.tiers))
        return heads.kv * tiers + sum(each.nbytes(heads) for each in self.memories)
