"""Memory that a prompt takes: `kvcascade prompt --model smollm2 --cache full --cache "sink 4 | recent 508" --tokens 8000 --chunk 0 256`; a minute per case."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.memory import prompt
from kvcascade.eval.speed import peers
from kvcascade.model import pretrained
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, Recorded, arguments_of


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Put a prompt into each cache, at once and in parts, each time in a process of its own, and measure what that takes."""

    model: str
    """A run's folder, smollm2, gguf:FILE, a Hugging Face directory or name, or a model known by its shape, such as llama3-8b."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A cache in one line, or a preset's name; give it several times to compare."""
    tokens: Count = 8000
    """Tokens of the prompt."""
    chunk: tuple[CountOrNone, ...] = (0, 256)
    """Tokens that enter at once; 0: all."""
    batch: Count = 1
    """Rows at once."""
    peer: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """A Python that has kvpress: its presses prune the same prompt to as many tokens as the smallest cache keeps."""
    weights: str | None = None
    """What matrices are kept in: float32, bfloat16, int8 or int4; by default float32, and bfloat16 for a model known by its shape."""


def main(arguments: list[str]) -> None:
    """Measure every cache and chunk, print a table, append the records."""
    args = arguments_of(Args, "prompt", arguments)
    specs = [parse(text) for text in args.cache or ("full",)]
    jobs = [
        prompt.job(args.model, spec, args.tokens, chunk, args.batch, args.weights)
        for spec in specs
        for chunk in args.chunk
    ]
    if args.peer and not pretrained.is_pretrained(args.model):
        raise BadInput(f"{args.model} is a run, which no peer can load; --peer is for pretrained models")
    if args.peer:
        config = console.open_model(args.model).config
        kept = min(cascade.slots(args.tokens) for spec in specs for cascade in spec.cascades)
        others = peers.find(args.peer, pretrained.locate(args.model), ("kvpress",))
        jobs += [prompt.peer_job(other, args.model, config.vocab, kept, args.tokens) for other in others]
    console.show(prompt.table(console.measured("prompt", jobs, args)))
