"""Users that fit on a GPU, without one: `kvcascade fit --gpu h100 --model llama3-8b --cache full --cache full@int8 --context 8192`; a minute a cache."""

import dataclasses
import sys
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.kernels import check
from kvcascade.eval.memory import arithmetic, fit
from kvcascade.eval.records import FitFailed, of
from kvcascade.kernels import aot
from kvcascade.model import known
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Part, Recorded, arguments_of
from kvcascade.train import run


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Compile a model's decode step for a card and find the most users, and for one user the longest context, that its memory holds."""

    gpu: str
    """h100, a100, rtx3060, rtx3090, rtx4090, l4, …"""
    model: str
    """A model's shape: gpt2, llama3-8b, …, a run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A cache in one line, or a preset's name. The others are compared with the first."""
    context: tuple[Count, ...] = ()
    """Tokens per user; several are fitted in turn. By default the model's own context."""
    weights: str | None = None
    """What matrices are kept in: float32, bfloat16, int8 or int4; by default bfloat16 for a model that is known by its shape, float32 for others."""
    share: Part = arithmetic.SHARE
    """Of the card's memory, what the program may have; the rest is for CUDA, the libraries and the allocator's gaps."""


def main(arguments: list[str]) -> None:
    """Fit each cache, print a table, append the records."""
    args = arguments_of(Args, "fit", arguments)
    arithmetic.budget(args.gpu, args.share)
    specs = [parse(text) for text in args.cache or ("full",)]
    config = run.shape(args.model, args.weights)
    contexts = args.context or (config.context,)
    known.stretch(config, max(contexts))
    for spec in specs:
        arithmetic.decode_step(config, spec, max(contexts))
    try:
        (card,) = check.cards([args.gpu])
    except aot.NotInstalled as error:
        raise BadInput(str(error)) from error
    jobs = [fit.job(args.model, config, card, spec, specs[0], contexts, args.share) for spec in specs]
    found = console.measured("fit", jobs, args)
    console.show(fit.table(found))
    print(*fit.notes(found), sep="\n")
    if of(found, FitFailed):
        sys.exit(1)
