"""Serve a trace: `kvcascade simulate --model smollm2 --weights int8 --cache "full@int8 on blocks" --trace poisson:rate=4 --batches 8`; a minute or two."""

import dataclasses
from typing import Literal

from kvcascade.cache.spec import parse
from kvcascade.eval.speed import serving
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, Recorded, arguments_of
from kvcascade.serve import trace
from kvcascade.serve.plan import Limits


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Serve a trace of requests by the engine, every program compiled before; time in which nobody is there is skipped."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    cache: str = "full on blocks"
    """A cache in one line, wholly on blocks."""
    trace: str = "poisson:"
    """poisson:rate=4,requests=32,prompt=55,output=37,spread=0.8,shared=0, or a file: Azure's CSV, Mooncake's JSON lines."""
    blocks: Count = 640
    """Blocks of the pool, of 16 tokens each; one of them is nobody's."""
    rows: Count = 32
    """Rows that run at once, at most."""
    tokens: Count = 128
    """Tokens of a step, at most."""
    shorten: Count = 1
    """Divide all lengths of the trace by so much."""
    batches: CountOrNone = 0
    """Serve the trace also by `generate`, so many requests at a time, with a full cache in rows; 0: not."""
    clock: Literal["wall", "cpu"] = "wall"
    """What time is: the wall's, or the processor's, all threads together."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""


def main(arguments: list[str]) -> None:
    """Serve the trace, print the table, append the records."""
    args = arguments_of(Args, "simulate", arguments)
    spec, limits = parse(args.cache), Limits(args.tokens, args.rows)
    arrivals = trace.read(args.trace)
    model = console.open_model(args.model, args.weights)
    arrivals = trace.shortened(arrivals, args.shorten, model.config.context)
    job = serving.job(model, spec, args.trace, arrivals, args.shorten, args.blocks, limits, args.batches, args.clock)
    console.show(serving.table(console.measured("simulate", [job], args)))
