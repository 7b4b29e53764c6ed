"""Perplexity, bytes and speed of a model behind caches: `kvcascade evaluate --model runs/toy --cache full --cache "sink 4 | recent 124"`; seconds per cache."""

import dataclasses
from typing import Annotated, Literal

import tyro

import kvcascade
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.quality import evaluation, perplexity
from kvcascade.eval.quality.evaluation import Protocol
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, Recorded, Seed, Window, arguments_of, share


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Score windows of a text, teacher-forced, one token at a time through each cache."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A cache in one line, or a preset's name; `kvcascade methods` lists what there is. Give it several times to compare."""
    data: str | None = None
    """stdlib, file:PATH or a hub data set; by default the text that a run was validated on, and stdlib for others."""
    context: Window = 512
    """Tokens per window."""
    sequences: Count = 8
    """Windows."""
    windows: Literal["spread", "first"] = "spread"
    """Spread over all documents of the text, or the first ones."""
    seed: Seed = 0
    """Where the spread begins."""
    until: str | None = None
    """Add windows, twice as many each time, until every interval is narrower than this, such as 0.1%: of the change in perplexity against the full cache."""
    batch: Count = 8
    """Windows at once."""
    prefix: CountOrNone = 0
    """Tokens of each window that enter in one prefill and are not scored."""
    chunk: CountOrNone = 0
    """Tokens of the prefix that enter at once, each such part before the next is read; 0: all."""
    fidelity: bool = False
    """Also compare every next-token distribution with the full cache's: KL divergence and the same likeliest token; doubles the time."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Whether each window begins with BOS, which is not scored: auto as the model's tokenizer does with a text."""


def main(arguments: list[str]) -> None:
    """Evaluate each cache, print a table, append the records."""
    args = arguments_of(Args, "evaluate", arguments)
    specs = [parse(text) for text in args.cache or ("full",)]
    until = share("until", args.until) if args.until is not None else None
    model = console.open_model(args.model, args.weights, specs)
    perplexity.check(model.config, specs, args.context, args.prefix, min(args.batch, args.sequences))
    protocol = Protocol(min(args.batch, args.sequences), args.prefix, args.chunk, args.fidelity)
    choose = lambda count: kvcascade.windows(model, args.data, args.context, count, args.windows, args.seed, args.bos)
    rows, known = choose(args.sequences), [None] * len(specs)
    while True:
        count = len(rows.rows_BT)
        jobs = [evaluation.job(model, spec, rows, protocol, before) for spec, before in zip(specs, known, strict=True)]
        found = console.measured(f"evaluate {count} windows", jobs, args)
        if until is None or (width := evaluation.width(found)) <= until:
            break
        console.say(f"with {count} windows the widest interval is {width:.3%}")
        try:
            rows, known = choose(2 * count), found
        except BadInput as error:
            console.say(f"not narrower than {args.until}: {error}")
            break
    console.show(evaluation.table(found))
