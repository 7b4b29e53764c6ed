"""An engine: requests come and go, and each step serves them all from one pool of blocks."""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

from kvcascade.cache.errors import BadInput
from kvcascade.cache.prefix import namespace
from kvcascade.model.sampling import NOT_A_NUMBER, Restriction, Sampling
from kvcascade.serve.plan import Queue, Row, check, end, fork, plan
from kvcascade.serve.propose import Propose
from kvcascade.serve.request import Asked, Draw, Event, Grammar, Likely, Request, Runs, seeded
from kvcascade.serve.request import check as check_request


@dataclasses.dataclass
class Turn:
    """When a request's turn came, and how many of its tokens were found then: of all its rows."""

    at: float = 0.0
    found: int = 0


@dataclasses.dataclass
class Live:
    """What the engine knows of a row besides what is planned with."""

    row: Row
    request: Request
    turn: Turn
    sampling: Sampling
    grammar: Grammar | None
    reached: int = 0
    """Tokens that have been computed for it, or found, at the most."""

    @property
    def draw(self) -> Draw:
        """How its next token is drawn."""
        return Draw(self.sampling, Restriction(self.grammar.allowed() if self.grammar else None, self.request.bias))


class Engine:
    """Requests over one pool; whoever has it calls `run_step` until nothing is left.

    Every result is what the request alone would have got, whatever else runs: a row's tokens are attended to as they are stored, what it
    keeps in slots of its own enters as `plan` says, and it draws by its own seed and positions.
    """

    def __init__(
        self,
        device: Runs,
        reuse: bool = True,
        clock: Callable[[], float] = time.monotonic,
        propose: Propose | None = None,
    ):
        """Without `reuse` no prefix is looked for; the clock is in seconds. `propose` foresees as many tokens as the device's limits say."""
        self.device, self.limits, self.reuse, self.clock = device, device.limits, reuse, clock
        self.propose = propose
        self.blocks, self.queue = device.pool(), Queue.of(device.limits)
        if propose and not device.room(0):
            raise BadInput(
                "what is foreseen is tried where it can be taken back: in blocks, and in tiers of a row's own while tokens wait before them, "
                "as in `pending 16 | sink 4 | recent 108`"
            )
        self.stats: collections.Counter[str] = collections.Counter()
        self.accepted = [0] * self.limits.ahead
        """Foreseen tokens that were drawn, by their places in their drafts."""
        self.live: dict[int, Live] = {}
        self._ids = itertools.count()

    def submit(self, request: Request) -> list[int]:
        """Take a request in; return the numbers of its rows. BadInput for one that could never end."""
        check_request(request, self.device.context, self.device.vocab)
        prompt = list(request.prompt)
        space = namespace(**self.device.about, salt=request.salt)
        limit, forks = len(prompt) + request.count, request.continuations - 1
        about = request.priority, space, request.retention, forks
        row = Row(next(self._ids), prompt, limit, self.clock(), *about, prompt=len(prompt))
        check(row, self.blocks, self.limits)
        ids = [row.id, *(next(self._ids) for _ in range(forks))]
        turn = Turn()
        for index, each in enumerate(ids):
            self.live[each] = Live(
                row, request, turn, seeded(request.sampling, index), request.grammar and request.grammar()
            )
        self.queue.wait(row)
        return ids

    def cancel(self, number: int) -> Event | None:
        """Take a row out at once; None if it is over already. Of a request whose prompt is not through all rows end."""
        live = self.live.get(number)
        if live is None:
            return None
        end(self.queue, self.blocks, live.row, self.clock())
        self.device.forget(live.row)
        for each in self._rows_of(live.row):
            del self.live[each]
        self.stats["cancelled"] += 1
        return Event(number, None, None, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether somebody runs or waits."""
        return bool(self.live)

    def run_step(self) -> list[Event]:
        """Plan a step, run it, and say what it brought."""
        self._foresee()
        how = self.reuse, self.device.quicker, self.device.snapshots
        found = plan(self.queue, self.blocks, self.limits, self.clock(), *how)
        for row in found.begun:
            live = self.live[row.id]
            self.device.note(row, live.sampling)
            if not live.reached:  # else it has stopped, and finds its own
                live.reached = row.table.computed
                live.turn.at, live.turn.found = self.clock(), live.reached
                self.stats["found"] += live.reached
        self.stats.update(
            begun=len(found.begun), stopped=len(found.stopped), copied=len(found.copies), put_aside=len(found.out)
        )
        if not found.runs:
            assert not (found.out or found.back or found.copies), "who makes room runs, or somebody else does"
            return []
        rows = {run.row.id: self._rows_of(run.row) for run in found.runs if run.stop >= len(run.row.tokens)}
        ahead = {run.row.id: run.ahead for run in found.runs}
        lives = {number: [self.live[each] for each in mine] for number, mine in rows.items()}
        draws = {number: [live.draw for live in mine] * (1 + ahead[number]) for number, mine in lives.items()}
        drawn = self.device.run(found, draws, any(live.request.likely for mine in lives.values() for live in mine))
        now = self.clock()
        self.stats["drafted"] += sum(ahead.values())
        total = sum(run.stop - run.start for run in found.runs)
        self.stats.update(steps=1, tokens=total, padded=drawn.size - total, drawn=len(drawn.tokens))
        events, each_drawn = [], iter(zip(drawn.tokens, drawn.logprobs, drawn.likely, strict=True))
        for run in found.runs:
            row, start, stop = run.row, run.start, min(run.stop, len(run.row.tokens))
            row.table.computed = stop
            live = self.live[row.id]
            self.stats["again"] += max(0, min(stop, live.reached) - start)
            live.reached = max(stop, live.reached)
            if run.ahead:
                events += self._verified(row, now, list(itertools.islice(each_drawn, 1 + run.ahead)))
            elif row.id in rows:
                more = fork(self.queue, self.blocks, row, rows[row.id][1:])
                for each in more:
                    self.live[each.id].row, self.live[each.id].reached = each, stop
                    self.device.note(each, self.live[each.id].sampling)
                    self.device.fork(row, each)
                events += [self._drawn(each, now, *next(each_drawn)) for each in (row, *more)]
        return events

    def _foresee(self) -> None:
        """What rows that generate may have next; not where the next token depends on more than the tokens before it."""
        if self.propose is None:
            return
        asked = []
        for row in self.queue.running:
            live = self.live[row.id]
            room = min(self.device.room(len(row.tokens) - 1), row.limit - len(row.tokens) - 1)
            free = live.request.ahead and live.grammar is None and live.sampling.repetition_penalty == 1
            follows = row.behind == 1 and not row.forks  # of a prompt's end several rows may go on
            row.draft = []
            if free and room > 0 and follows:
                asked.append(Asked(row, room, live.draw))
        if asked:
            self.stats["asked"] += 1
            for each, draft in zip(asked, self.propose(self.device, asked), strict=True):
                each.row.draft = draft

    def _verified(self, row: Row, now: float, drawn: Sequence[tuple]) -> list[Event]:
        """The tokens that were drawn, up to the first that was not foreseen. Each is drawn as it would have been without a draft: by the model's
        own probabilities, the row's seed and its position; so nothing is lost, and what was foreseen is accepted as often as it is what is drawn."""
        draft, events, row.draft = row.draft, [], []
        for place, each in enumerate(drawn):
            row.table.computed = len(row.tokens)  # what was foreseen so far is what came
            events.append(self._drawn(row, now, *each))
            if events[-1].finished:
                return events
            if place == len(draft) or draft[place] != events[-1].token:
                break
            self.accepted[place] += 1
        self.blocks.truncate(row.table, row.table.computed, now)
        return events

    def _rows_of(self, row: Row) -> list[int]:
        """The numbers of the rows that go on from a row, itself the first."""
        return [row.id] if not row.forks else [each for each, live in self.live.items() if live.row is row]

    def _drawn(self, row: Row, now: float, token: int, logprob: float, likely: Likely) -> Event:
        """A row's next token, or its end."""
        live = self.live[row.id]
        if token == NOT_A_NUMBER:
            event = Event(row.id, None, None, "error")
        else:
            row.tokens.append(token)
            if live.grammar:
                live.grammar.take(token)
            self.blocks.publish(row.table, row.tokens, now)
            request = live.request
            reason = "stop" if token in request.stops else "length" if len(row.tokens) == row.limit else ""
            places = self.device.places(row) if request.watched else None
            told = likely[: request.likely], live.turn.at, live.turn.found, places
            event = Event(row.id, token, logprob, reason, *told)
        if event.finished:
            end(self.queue, self.blocks, row, now)
            del self.live[row.id]
            self.stats["over"] += 1
        return event

    def filled(self) -> tuple[int, int]:
        """Slots of the blocks that rows hold, one that several hold counted for each, and how many of them have a token."""
        tables = [(len(row.table.blocks) * self.blocks.size, len(row.tokens)) for row in self.queue.running]
        return sum(held for held, _ in tables), sum(min(pair) for pair in tables)

    def check(self) -> None:
        """AssertionError if a block is lost, or counted wrong."""
        self.blocks.check([row.table for row in self.queue.running])
