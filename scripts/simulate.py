"""Serve a trace: `kvcascade simulate --model smollm2 --weights int8 --cache "full@int8 on blocks" --trace poisson:rate=4 --batches 8`; a minute or two.

Without a model: `kvcascade simulate --costs RECORDS.jsonl --trace poisson:rate=4,requests=100000`; a minute.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import record_files
from kvcascade.eval.records import Served, of
from kvcascade.eval.speed import serving
from kvcascade.eval.speed.server import Server
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, Recorded, arguments_of, foreseen
from kvcascade.serve import trace
from kvcascade.serve.plan import Limits


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Serve a trace of requests by the engine, every program compiled before; time in which nobody is there is skipped."""

    model: str = ""
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    costs: Path | None = None
    """Instead of a model: records of traces that were served; the last that fits says what each step takes."""
    cache: str = ""
    """A cache in one line: by default `full on blocks`, or, with --costs, whatever was recorded, which must be wholly on blocks."""
    trace: str = "poisson:"
    """poisson:rate=4,requests=32,prompt=55,output=37,spread=0.8,shared=0, or a file: Azure's CSV, Mooncake's JSON lines."""
    blocks: Count = 640
    """Blocks of the pool, of 16 tokens each; one of them is nobody's."""
    aside: CountOrNone = 0
    """Blocks of rows that had to stop that host memory has room for."""
    snapshots: CountOrNone = 256
    """MB of host memory for what rows had in slots of their own after chunks of their prompts; others that begin alike go on from there."""
    speculate: str = "none"
    """Foresee tokens and compute them along with the next: `ngram`, what followed the same tokens before; `self`, what the model finds by half of
    the bits of `full@planes on blocks`; `draft:MODEL`, what a smaller one finds (`distill`). The answers are the same ones."""
    ahead: Count = 3
    """How many tokens are foreseen, at most."""
    rows: Count = 32
    """Rows that run at once, at most."""
    tokens: Count = 128
    """Tokens of a step, at most."""
    shorten: Count = 1
    """Divide all lengths of the trace by so much."""
    batches: CountOrNone = 0
    """Serve the trace also by `generate`, so many requests at a time, with a full cache in rows; 0: not."""
    server: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Servers that serve the trace after that, NAME=URL up to /v1; each with the same model, by OpenAI's completions. By the wall's clock."""
    clients: CountOrNone = 0
    """Let servers alone serve the trace, not at its times but from so many clients, each of which sends its next request when its last is answered."""
    clock: Literal["wall", "cpu"] = "wall"
    """What time is: the wall's, or the processor's, all threads together."""
    weights: str | None = None
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4; by default float32."""


def main(arguments: list[str]) -> None:
    """Serve the trace, print the table, append the records."""
    args = arguments_of(Args, "simulate", arguments)
    propose, ahead = foreseen(args.speculate, args.ahead)
    limits = Limits(args.tokens, args.rows, aside=args.aside, snapshots=10**6 * args.snapshots, **ahead)
    arrivals = trace.read(args.trace)
    if bool(args.model) == bool(args.costs):
        raise BadInput("a trace is served by a --model, or by the --costs that one was recorded with")
    servers = [Server.of(text) for text in args.server]
    if servers and args.clock != "wall":
        raise BadInput("what a server takes is told by the wall's clock alone")
    if args.clients and (not servers or args.batches):
        raise BadInput("--clients ask servers, and nobody else: give --server, and no --batches")
    if args.costs:
        if args.batches or args.aside or args.weights or args.server or args.clock != "wall" or propose:
            raise BadInput(
                "--batches, --aside, --server, --weights, --clock and --speculate go with a model, and --costs are what one took"
            )
        served = _recorded(args.costs, str(parse(args.cache)) if args.cache else None, args.tokens)
        longest = max(each.tokens for each in arrivals)
        mine = serving.Trace(args.trace, trace.shortened(arrivals, args.shorten, longest), args.shorten, 0)
        jobs = [serving.replay_job(served, mine, args.blocks, limits)]
    else:
        model = console.open_model(args.model, args.weights or "float32")
        short = trace.shortened(arrivals, args.shorten, model.config.context)
        mine = serving.Trace(args.trace, short, args.shorten, model.seed)
        spec = parse(args.cache or "full on blocks")
        model.check(spec)
        ours = [
            serving.job(
                model,
                spec,
                mine,
                args.blocks,
                limits,
                args.batches,
                args.clock,
                args.speculate,
                console.open_draft(args.speculate, model),
            )
        ]
        jobs = [] if args.clients else ours
        jobs += [serving.server_job(model, each, mine, args.clients) for each in servers]
    console.show(serving.table(console.measured("simulate", jobs, args)))


def _recorded(file: Path, cache: str | None, tokens: int) -> Served:
    """The last record of a file that says what steps of so many tokens take, of this cache if one is named."""
    found = [each for each in of(record_files.read(file), Served) if each.programs and cache in (None, each.cache)]
    if not found:
        words = f" with {cache}" if cache else ""
        raise BadInput(f"{file} has no record of a trace that was served by an engine{words}")
    return next((each for each in reversed(found) if (each.step_tokens or 0) >= tokens), found[-1])
