"""Bytes of models and caches by arithmetic alone: `kvcascade memory --model llama3-8b --context 8192 --cache full --gpu h100`; seconds."""

import dataclasses
from typing import Annotated

import tyro

from kvcascade.cache.spec import parse
from kvcascade.eval.memory import arithmetic
from kvcascade.model import known
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, arguments_of
from kvcascade.train import run


@dataclasses.dataclass(frozen=True)
class Args:
    """What a model's weights, a user's cache and a decode step take, and how many users that leaves room for on a card."""

    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A model's shape: gpt2, llama3-8b, … (all by default), a run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A cache in one line, or a preset's name; by default full, full@int8 and full@int4h."""
    context: tuple[Count, ...] = ()
    """Tokens per user; by default each model's own context."""
    weights: str | None = None
    """What matrices are kept in: float32, bfloat16, int8 or int4; by default bfloat16 for a model that is known by its shape, float32 for others."""
    gpu: str | None = None
    """A card to fit them on: h100, a100, rtx3060, rtx3090, rtx4090, l4, …"""


def main(arguments: list[str]) -> None:
    """Print a row for every model, context and cache."""
    args = arguments_of(Args, "memory", arguments)
    specs = [parse(text) for text in args.cache or ("full", "full@int8", "full@int4h")]
    shapes = {name: run.shape(name, args.weights) for name in args.model or known.KNOWN}
    for shape in shapes.values() if args.model else ():
        known.stretch(shape, max(args.context, default=1))
    longest = max(args.context, default=1)
    shapes = {name: shape for name, shape in shapes.items() if shape.positions != "learned" or longest <= shape.context}
    console.show(arithmetic.table(shapes, specs, list(args.context), args.gpu))
