"""How fast a model prefills and decodes: `kvcascade bench --model smollm2 --cache full --cache "sink 4 | recent 124"`; a minute per batch and context."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import bench, records
from kvcascade.model import generate, pretrained
from kvcascade.scripts import console


@dataclasses.dataclass(frozen=True)
class Args:
    """Time prefill and greedy decode steps on random tokens, everything compiled and warm, against the memory's bandwidth."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A cache in one line, or a preset's name; give it several times to compare."""
    batch: tuple[int, ...] = (1, 8)
    """Rows at once."""
    context: tuple[int, ...] = ()
    """Tokens per row before the first that is decoded; by default 64, and 1,024 or what the model has room for."""
    steps: int = 24
    """Decode steps timed per round."""
    repeats: int = 5
    """Rounds, taken in turns by all caches and the peer."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16 or int8."""
    peer: Path | None = None
    """A Python that has torch and transformers, which are then timed in turns, in float32, on the same pretrained model."""
    out: Path | None = None
    """File that one JSON object per row is appended to."""


def main(arguments: list[str]) -> None:
    """Time every cache at every batch and context, print a table, append the records."""
    args = tyro.cli(Args, prog="kvcascade bench", args=arguments)
    specs = [parse(text) for text in args.cache or ("full",)]
    if min((*args.batch, *args.context, args.steps, args.repeats)) < 1:
        raise BadInput("batch, context, steps and repeats must be at least 1")
    if args.peer and not pretrained.is_pretrained(args.model):
        raise BadInput(f"{args.model} is a run, which transformers cannot load; --peer is for pretrained models")
    model = console.open_model(args.model, args.weights)
    after = args.steps + bench.WARM
    contexts = args.context or (64, min(1024, model.config.context - after))
    for context in contexts:
        generate.check_context(model.config, context + after)
    records.check_writable(args.out)
    peer = bench.Peer(args.peer, args.model) if args.peer else None
    found = []
    try:
        with console.progress("bench", len(args.batch) * len(contexts)) as show:
            bandwidth = bench.bandwidth()
            for batch in args.batch:
                for context in contexts:
                    start = time.monotonic()
                    some = bench.bench(model, specs, batch, context, args.steps, args.repeats, peer)
                    seconds = time.monotonic() - start
                    found += [records.stamp(one | {"bandwidth": bandwidth}, seconds) for one in some]
                    show(len(found) // len(some), f"batch {batch}, context {context}")
    finally:
        if peer:
            peer.close()
    if args.out:
        records.append(args.out, found)
    console.table(*bench.table(found))
