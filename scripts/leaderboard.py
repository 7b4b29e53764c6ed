"""Everything known, by what it loses at so many bytes: `kvcascade leaderboard --model smollm2 --data file:some.txt`; half a minute for each cache."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import kvcascade
from kvcascade.cache.spec import parse
from kvcascade.eval import measure, spread
from kvcascade.eval.measure import Job
from kvcascade.eval.memory import prompt
from kvcascade.eval.quality import perplexity
from kvcascade.eval.quality.windows import Windows
from kvcascade.eval.records import Board, Record, Tuned, of
from kvcascade.eval.report import page
from kvcascade.eval.search import leaderboard, tune
from kvcascade.eval.speed import bench
from kvcascade.model import generate
from kvcascade.model.pretrained import Model
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, Recorded, Seed, Window, arguments_of, share

type Measure = Literal["fidelity", "answers", "speed", "prompt"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Recorded):
    """Score every policy, codec, preset, mixture and allocation at each budget, and what `kvcascade tune` wrote to the same file."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    out: Path | None = Path("leaderboard.jsonl")
    """File that each measurement is appended to as it ends, as JSON lines; what it has is not measured again, so the same command goes on."""
    data: str | None = None
    """Text: file:PATH, stdlib or a hub data set; its first half is left to tune on, its second is scored."""
    budget: tuple[str, ...] = ("50%", "33%", "25%", "10%")
    """Shares of the bytes of the full cache in bf16 for this context."""
    calibration: str = ""
    """A file that kvcascade calibrate made of other text, for codecs in the model's own bases."""
    context: Window = 512
    """Tokens per window."""
    windows: Count = 24
    """Windows, of which half are scored; with those of kvcascade tune what it found takes part, and nothing is scored twice."""
    seed: Seed = 0
    """Which windows are chosen."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""
    measure: tuple[Measure, ...] = ("fidelity", "answers", "speed", "prompt")
    """Besides perplexity and bytes, of the finalists: the divergence from the full cache, puzzles, the time of a step, the memory of a prompt."""
    finalists: CountOrNone = 5
    """So many of the best of each budget, beside random eviction and the full cache."""
    processes: Count = 1
    """Processes that score, each on its share of the cores."""
    on: spread.Place = "processes"
    """Where they are: here, or on the Ray cluster that RAY_ADDRESS names."""
    page: Path | None = None
    """Write the page to this file."""


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The jobs of one stage, as any process makes them."""

    args: Args
    caches: tuple[str, ...]
    measure: tuple[str, ...]
    """Of perplexity, fidelity and answers."""

    def __call__(self) -> list[list[Job]]:
        """Open the model and the text, and make them."""
        model = kvcascade.load(self.args.model, self.args.weights)
        return self.made(model, _halves(model, self.args)[1])

    def made(self, model: Model, held: Windows) -> list[list[Job]]:
        """Make them of what is open already."""
        made: list[list[Job]] = []
        for fidelity, name in ((False, "perplexity"), (True, "fidelity")):
            if name in self.measure:
                made += [[job] for job in leaderboard.quality(model, self.caches, held, fidelity)]
        if "answers" in self.measure:
            made += leaderboard.asked(model, self.caches, self.args.context)
        return made


def main(arguments: list[str]) -> None:
    """Score what takes part, then measure more of the finalists; print a table for each budget, and write the page."""
    args = arguments_of(Args, "leaderboard", arguments)
    shares = [share("budget", each) for each in args.budget]
    known = [parse(f"full@int4m with {args.calibration}")] if args.calibration else []
    model = console.open_model(args.model, args.weights, known)
    if "answers" in args.measure:
        leaderboard.asked(model, ["full"], args.context)  # what is too short for a task, or too long, is told now
    if "speed" in args.measure:
        steps = bench.room(args.context, leaderboard.STEPS, leaderboard.ROUNDS, 1)
        generate.check_context(model.config, steps)
    perplexity.check(model.config, [parse("full")], args.context, 0, tune.BATCH)
    tuning, held = _halves(model, args)
    assert args.out is not None
    before = [each for some in measure.done(args.out).values() for each in some]
    who = leaderboard.job(model, shares, tuning, held, args.calibration, of(before, Tuned))
    found = console.measured("leaderboard", [who], args)
    (board,) = of(found, Board)
    caches = ("full", *dict.fromkeys(each["cache"] for each in board.entries))
    found += _spread("score", Scoring(args, caches, ("perplexity",)), model, held)
    finalists = leaderboard.finalists(board, found, args.finalists)
    found += _spread("finalists", Scoring(args, tuple(finalists), args.measure), model, held)
    found += console.measured("alone", _alone(args, model, board, found, finalists), args)
    for table in leaderboard.tables(board, found):
        console.show(table)
    if args.page:
        page.write(args.page, found, f"kvcascade leaderboard --model {args.model}")


def _halves(model: Model, args: Args) -> tuple[Windows, Windows]:
    return tune.halves(kvcascade.windows(model, args.data, args.context, args.windows, "spread", args.seed))


def _spread(title: str, recipe: Scoring, model: Model, held: Windows) -> list[Record]:
    """The records of a stage, measured by as many processes as are asked for."""
    args, units = recipe.args, recipe.made(model, held)
    if args.processes == 1 and args.on == "processes":
        return console.measured(title, [job for some in units for job in some], args)
    return console.spread(title, recipe, units, args, args.processes, args.on)


def _alone(args: Args, model: Model, board: Board, found: Sequence[Record], finalists: Sequence[str]) -> list[Job]:
    """What is measured while nothing else runs: the finalists of each budget in turns with the full cache, and prompts, each in a process of its own."""
    jobs: list[Job] = []
    if "speed" in args.measure:
        for budget in board.budgets:
            specs = [parse(each) for each in finalists if each == "full" or each in board.at(budget)]
            jobs.append(
                bench.job([model], specs, [], leaderboard.ROWS, args.context, leaderboard.STEPS, leaderboard.ROUNDS, 1)
            )
    if "prompt" in args.measure:
        part = max(1, args.context // leaderboard.PARTS)
        jobs += [
            prompt.job(args.model, parse(each), args.context, part, leaderboard.ROWS, args.weights)
            for each in finalists
        ]
    return jobs
