"""What stands in for a model: steps take as long as was measured, and nothing is computed."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from kvcascade.cache.blocks import Blocks
from kvcascade.model.sampling import Sampling
from kvcascade.serve.plan import Limits, Plan, Row
from kvcascade.serve.request import Asked, Draw, Drawn


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of a step: of each program, by its tokens, and of each token that a token attends to."""

    programs: Mapping[int, float]
    attended: float

    @classmethod
    def of(cls, steps: Sequence[tuple[int, int, float]]) -> "Costs":
        """From steps that were run: tokens of the program, tokens attended to, seconds.

        What a token attended to costs is one for all: the median of the slopes between steps of one program (Theil and Sen), each with the
        weight of how far apart the two are, so that neither a few slow steps nor many alike ones move it. A program's time is the median
        of its steps' without that.
        """
        found = {
            size: np.array([each[1:] for each in steps if each[0] == size], float)
            for size in sorted({each[0] for each in steps})
        }
        slopes = np.concatenate([_slopes(each) for each in found.values()])
        slopes = slopes[np.argsort(slopes[:, 0])]
        middle = np.searchsorted(np.cumsum(slopes[:, 1]), slopes[:, 1].sum() / 2)
        attended = max(0.0, float(slopes[middle, 0])) if len(slopes) else 0.0
        return cls(
            {size: max(0.0, float(np.median(each[:, 1] - attended * each[:, 0]))) for size, each in found.items()},
            attended,
        )

    def seconds(self, size: int) -> float:
        """Of one program; one that was never run is as slow as a line through the two next to it, or the one next to it, says."""
        return float(np.interp(size, [*self.programs], [*self.programs.values()]))


def _slopes(steps: np.ndarray) -> np.ndarray:
    """Slopes between the first half of a program's steps by what they attend to and the second, pair by pair, and how far apart they are."""
    ordered = steps[np.argsort(steps[:, 0], kind="stable")]
    half = len(ordered) // 2
    apart = ordered[len(ordered) - half :] - ordered[:half]
    apart = apart[apart[:, 0] > 0]
    return np.stack([apart[:, 1] / apart[:, 0], apart[:, 0]], 1)


def attended(found: Plan) -> int:
    """How many tokens the tokens of a step attend to, all together."""
    return sum((run.start + run.stop + 1) * (run.stop - run.start) // 2 for run in found.runs)


class Replay:
    """What an engine's steps run on when nothing is computed: the next token is always 0, and its clock says what would have gone by."""

    about: dict[str, str | int] = {}
    snapshots = None

    def __init__(self, costs: Costs, blocks: int, size: int, vocab: int, context: int, limits: Limits):
        self.blocks, self.size, self.vocab, self.context, self.limits = blocks, size, vocab, context, limits
        self.costs, self.now = costs, 0.0
        self._seconds = {bucket: costs.seconds(bucket) for bucket in limits.buckets}

    def pool(self) -> Blocks:
        """Blocks that nobody has."""
        return Blocks(self.blocks, self.size)

    def clock(self) -> float:
        """Seconds of all steps so far."""
        return self.now

    def run(self, found: Plan, draws: Mapping[int, Sequence[Draw]], tell: bool) -> Drawn:
        """Let the time of a step go by."""
        count = sum(map(len, draws.values()))
        size = self.limits.bucket(sum(run.stop - run.start for run in found.runs), count)
        self.now += self._seconds[size] + self.costs.attended * attended(found)
        return Drawn([0] * count, [0.0] * count, [()] * count, size)

    def note(self, row: Row, by: Sampling) -> None:
        """Nothing is drawn."""

    def forget(self, row: Row) -> None:
        """Nothing is kept."""

    def fork(self, row: Row, more: Row) -> None:
        """Nothing is kept."""

    def places(self, row: Row) -> None:
        """Every token stays."""

    def foresee(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Nothing is computed, and so nothing foreseen."""
        return [[] for _ in asked]

    def room(self, position: int) -> int:
        """As `Device.room`."""
        return self.limits.ahead

    def quicker(self, blocks: int) -> bool:
        """Moving takes no time here, so that nothing is put aside is the safe answer."""
        return False
