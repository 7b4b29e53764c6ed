"""How fast a model prefills and decodes: `kvcascade bench --model smollm2 --cache full --cache "sink 4 | recent 124"`; a minute per batch and context."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.speed import bench, peers
from kvcascade.model import generate, pretrained
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Recorded, arguments_of


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Time prefill and greedy decode steps on random tokens, everything compiled and warm, against the memory's bandwidth."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A cache in one line, or a preset's name; give it several times to compare."""
    batch: tuple[Count, ...] = (1, 8)
    """Rows at once."""
    context: tuple[Count, ...] = ()
    """Tokens per row before the first that is decoded; by default 64, and 1,024 or what the model has room for."""
    steps: Count = 24
    """Decode steps timed per round, in each library's own loop and again one by one."""
    repeats: Count = 5
    """Rounds, taken in turns by all caches and peers; where the memory's bandwidth changes during them, up to twice as many."""
    weights: tuple[str, ...] = ("float32",)
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4; several take turns."""
    prefills: Count | None = None
    """Rounds that begin with the prompts, the others go on decoding where the one before ended; by default all."""
    peer: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """A Python that has transformers, kvpress or llama_cpp, which are timed in turns on the same pretrained model; by default this one."""
    variant: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only the peers whose name has this in it, as `llamacpp` or `DynamicCache`; give it several times for more."""


def main(arguments: list[str]) -> None:
    """Time every cache at every batch and context, print a table, append the records."""
    args = arguments_of(Args, "bench", arguments)
    specs = [parse(text) for text in args.cache or ("full",)]
    prefills = args.repeats if args.prefills is None else args.prefills
    known = pretrained.is_pretrained(args.model)
    if (args.peer or args.variant) and not known:
        raise BadInput(f"{args.model} is a run, which no peer can load; --peer and --variant are for pretrained models")
    models = [console.open_model(args.model, weights, specs) for weights in args.weights]
    config, after = models[0].config, bench.room(0, args.steps, args.repeats, prefills)
    contexts = args.context or (64, min(1024, config.context - after))
    for context in contexts:
        generate.check_context(config, context + after)
    others = peers.find(args.peer, pretrained.locate(args.model), args.variant) if known else []
    cases = [(batch, context) for batch in args.batch for context in contexts]
    jobs = [bench.job(models, specs, others, *case, args.steps, args.repeats, prefills) for case in cases]
    try:
        found = console.measured("bench", jobs, args)
    finally:
        for other in others:
            other.close()
    console.show(bench.table(found))
    if (headline := bench.headline(found)).rows:
        console.show(headline)
    for note in bench.notes(found):
        console.say(note)
