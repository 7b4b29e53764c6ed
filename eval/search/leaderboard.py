"""Everything known at so many bytes, by what it loses: who takes part, what is measured of whom, and the places."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from kvcascade.cache.spec import parse
from kvcascade.eval import stats
from kvcascade.eval.measure import Job
from kvcascade.eval.memory.arithmetic import full_bytes
from kvcascade.eval.quality import evaluation, retrieval
from kvcascade.eval.quality.windows import Windows
from kvcascade.eval.records import (
    Bench,
    Board,
    Compared,
    Entry,
    Evaluation,
    Prompting,
    Record,
    Retrieval,
    Tuned,
    of,
)
from kvcascade.eval.search import options, tune
from kvcascade.eval.table import CACHE, Column, Table
from kvcascade.model.pretrained import Model

TASKS = ("single", "passkey")
DEPTHS = (0.25, 0.75)
SAMPLES = 10
"""Puzzles of each task at each depth."""
ROWS, STEPS, ROUNDS = 8, 32, 5
"""Of what is timed."""
PARTS = 4
"""In which a prompt as long as the context enters."""


def job(
    model: Model, shares: Sequence[float], tuning: Windows, held: Windows, known: str, tuned: Iterable[Tuned]
) -> Job:
    """Who takes part, as a record: what is known without a search, and what searches found that were tuned on the other half of the text."""
    context = held.rows_BT.shape[1]
    about = {
        "kind": "board", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint, "data": held.data,
        "rows": held.key, "context": context, "windows": len(held.rows_BT), "calibration": known,
    }  # fmt: skip
    mine = [each for each in tuned if (each.weights_key, each.rows) == (model.fingerprint, tuning.key)]
    entries = [entry for share in shares for entry in _entries(model, share, context, known, mine)]
    about |= options.content(parse(entry["cache"]) for entry in entries)
    return Job(about | {"entries": entries}, "eval/search", lambda: [Board(**about, entries=entries)], "who takes part")


def _entries(model: Model, share: float, context: int, known: str, tuned: Sequence[Tuned]) -> list[Entry]:
    budget = int(share * full_bytes(model.config, context))
    name = lambda each: "tuned" if each.objective == "ppl" else f"tuned for {each.objective}"
    found = {name(each): each.cache for each in tuned if each.budget == budget}
    found |= {
        name: str(spec) for name, spec in options.rivals(model.config.layer_heads, context, budget, known).items()
    }
    unique = {cache: name for name, cache in reversed(found.items())}
    return [Entry(name=name, budget=share, cache=cache) for cache, name in reversed(unique.items())]


def quality(model: Model, caches: Iterable[str], held: Windows, fidelity: bool = False) -> list[Job]:
    """The perplexity of some caches, or their fidelity as well."""
    protocol = tune.protocol(held, fidelity)
    return [evaluation.job(model, parse(cache), held, protocol) for cache in caches]


def asked(model: Model, caches: Iterable[str], context: int) -> list[list[Job]]:
    """What they still let a model find: for each task the measurements of all caches, which share its prompts."""
    specs = [*map(parse, caches)]
    return [retrieval.jobs(model, specs, [task], [context], DEPTHS, SAMPLES, model.seed, tune.BATCH) for task in TASKS]


def finalists(board: Board, found: Sequence[Record], count: int) -> list[str]:
    """The full cache, and of each budget the best by perplexity and random eviction."""
    chosen = {"full": None}
    for budget in board.budgets:
        standings = standing(board, budget, found)
        last = [each for each in standings if each.name.endswith("random")]
        chosen |= dict.fromkeys(each.cache for each in [*standings[:count], *last])
    return [*chosen]


@dataclasses.dataclass(frozen=True)
class Standing:
    """An entry at its place; what was not measured is None."""

    place: int
    places: tuple[int, int]
    """The 95 % interval of its place, over documents."""
    name: str
    cache: str
    score: Evaluation
    change: str
    """Of perplexity, against the full cache."""
    behind: bool
    """Whether its loss is above the first one's by a paired interval of its own."""
    level: bool
    """Whether it is not told apart from the first, all that are at this budget taken together."""
    faithful: Compared | None
    answers: str | None
    speed: Bench | None
    full_speed: Bench | None
    prompt: Prompting | None


def standing(board: Board, budget: float, found: Sequence[Record]) -> list[Standing]:
    """Those of a budget that were scored, the best first."""
    scored = scores(board, found)
    names = board.at(budget)
    mine = sorted((scored[cache] for cache in names if cache in scored), key=lambda r: r.nll)
    if not mine:
        return []
    full = scored.get("full")
    places = stats.ranks(np.array([r.nll_windows for r in mine]), mine[0].document_windows)
    p_values = [math.nan, *(evaluation.paired(r, mine[0], stats.p_value) for r in mine[1:])]
    apart = stats.decided(p_values)
    same = lambda kind: [
        r for r in of(found, kind) if (r.model, r.given.get("weights")) == (board.model, board.weights)
    ]
    benches = [r for r in same(Bench) if (r.batch, r.context) == (ROWS, board.context)]
    beside = {r.key: r for r in benches if r.cache == "full"}  # a cache is timed in turns with the full one
    speeds = {r.cache: (r, beside.get(r.key)) for r in benches}
    prompts = {r.cache: r for r in same(Prompting) if (r.tokens, r.batch) == (board.context, ROWS)}
    faithful = {r.cache: r for r in of(found, Compared) if (r.weights_key, r.rows) == (board.weights_key, board.rows)}
    answers = answered(board, found)
    return [
        Standing(
            place, places[place - 1], names[r.cache], r.cache, r, evaluation.against(r, full) if full else "",
            place > 1 and evaluation.paired(r, mine[0])[0] > 0, place == 1 or not apart[place - 1], faithful.get(r.cache),
            str(share) if (share := retrieval.average(answers, r.cache, board.context)) else None,
            *speeds.get(r.cache, (None, None)), prompts.get(r.cache),
        )
        for place, r in enumerate(mine, 1)
    ]  # fmt: skip


def scores(board: Board, found: Sequence[Record]) -> dict[str, Evaluation]:
    """The newest score of each cache on the board's windows."""
    same = lambda r: (r.weights_key, r.rows) == (board.weights_key, board.rows) and not r.given.get("prefix")
    return {r.cache: r for r in of(found, Evaluation) if same(r)}


def answered(board: Board, found: Sequence[Record]) -> list[Retrieval]:
    """What the board's model was asked in contexts as long as its windows."""
    return [r for r in of(found, Retrieval) if (r.weights_key, r.length) == (board.weights_key, board.context)]


COLUMNS = [
    CACHE,
    Column("what", lambda s: "mixture by hand" if s.name.startswith("mixture") else s.name),
    Column("place (95 %)", lambda s: "{} ({} … {})".format(s.place, *s.places)),
    Column("bytes", lambda s: 1 - s.score.compression, "{:.1%}"),
    Column("PPL", lambda s: s.score.ppl, "{:.2f}"),
    Column("Δ PPL (95 %)", "change"),
    Column("≈ first", lambda s: "≈" if s.level and s.place > 1 else ""),
]
MORE = [
    Column("KL, nats", lambda s: s.faithful and s.faithful.kl, "{:.4f}"),
    Column("same top-1", lambda s: s.faithful and s.faithful.same_top, "{:.1%}"),
    Column("answered", "answers"),
    Column("ms a step", lambda s: s.speed and s.speed.step_ms, "{:.1f}"),
    Column("of full", lambda s: s.speed and s.full_speed and s.speed.step_ms / s.full_speed.step_ms, "{:.2f}"),
    Column("prompt, MB", lambda s: s.prompt and s.prompt.grown / 1e6, "{:.0f}"),
]


def tables(board: Board, found: Sequence[Record]) -> list[Table]:
    """A table for each budget, the best first."""
    made = []
    for budget in board.budgets:
        standings = standing(board, budget, found)
        more = [column for column in MORE if any(column.cell(each) for each in standings)]
        full = scores(board, found).get("full")
        beside = f"; the full cache has PPL {full.ppl:.2f}" if full else ""
        behind = sum(each.behind for each in standings)
        title = (
            f"At most {budget:.0%} of the bytes, {len(standings)} scored{beside}; of the others {behind} lose more than the first by a paired "
            f"interval of 95 % each"
        )
        made.append(Table.of(title, [*COLUMNS, *more], standings))
    return made


def kind(name: str) -> str:
    """What sort of entry it is, by its name."""
    return "random" if name == "method: random" else name.split(":")[0].split(" for ")[0]


KINDS = ("tuned", "mixture", "codec", "method", "allocation", "preset", "random")


def panels(
    board: Board, found: Sequence[Record]
) -> tuple[dict[float, list[tuple[str, str, Evaluation]]], Evaluation | None]:
    """What a figure shows of each budget: the kind, the name and the score of each entry; and the full cache's score, None if it was not scored."""
    short = lambda name: "" if kind(name) in ("tuned", "mixture") else name.split(": ")[-1]
    made = {
        budget: [(kind(each.name), short(each.name), each.score) for each in standing(board, budget, found)]
        for budget in board.budgets
    }
    return made, scores(board, found).get("full")


def best_of_each(board: Board, found: Sequence[Record]) -> Table:
    """Of each budget the best of each kind of entry, and random eviction."""
    rows: list[tuple[float, Standing]] = []
    for budget in board.budgets:
        first: dict[str, Standing] = {}
        for each in standing(board, budget, found):
            first.setdefault(kind(each.name), each)
        rows += [(budget, each) for each in sorted(first.values(), key=lambda each: each.place)]
    cache, what, _, *figures = COLUMNS
    theirs = [what, cache, *figures[:3], *MORE[:5]]
    columns = [
        Column("at most", lambda row: row[0], "{:.0%}"),
        *(each._replace(value=lambda row, each=each: each.cell(row[1]), form="{}") for each in theirs),
    ]
    return Table.of("", [each for each in columns if any(each.cell(row) for row in rows)], rows)
