"""Memory that a prompt takes: `kvcascade prompt --model smollm2 --cache full --cache "sink 4 | recent 508" --tokens 8000 --chunk 0 256`; a minute per case."""

import dataclasses
from typing import Annotated

import tyro

from kvcascade.cache.spec import parse
from kvcascade.eval.memory import prompt
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
    console.show(prompt.table(console.measured("prompt", jobs, args)))
