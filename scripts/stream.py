"""Decode on and on: `kvcascade stream --model smollm2 --weights int8 --cache "sink 4 | recent 124" --tokens 100000`; minutes."""

import dataclasses
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.speed import stream
from kvcascade.model.known import stretch
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Recorded, arguments_of


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Decode many tokens greedily through each cache, and show milliseconds per token and the process's memory as they go."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A cache in one line, or a preset's name; give it several times to compare."""
    tokens: Count = 32_768
    """Tokens to decode, also past the model's own context."""
    batch: Count = 1
    """Rows at once."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""


def main(arguments: list[str]) -> None:
    """Decode through every cache, print the table, append the records."""
    args = arguments_of(Args, "stream", arguments)
    specs = [parse(text) for text in args.cache]
    if args.tokens < stream.STRETCH:
        raise BadInput(f"--tokens is {args.tokens}; it must be at least {stream.STRETCH}")
    model = console.open_model(args.model, args.weights, specs)
    stretch(model.config, args.tokens)
    jobs = [stream.job(model, spec, args.batch, args.tokens) for spec in specs]
    console.show(stream.table(console.measured("stream", jobs, args)))
