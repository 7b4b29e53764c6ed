"""What a cache still lets a model find: `kvcascade retrieve --model smollm2 --cache "sink 4 | recent 124" --length 512 --task passkey single`; minutes."""

import dataclasses
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.quality import retrieval
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Recorded, Seed, Share, arguments_of


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Hide things in contexts, compress, then ask; the full cache and random eviction are always among the caches."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A cache in one line, or a preset's name; may be given several times."""
    task: tuple[str, ...] = ("passkey", "single", "multikey", "copying", "arithmetic", "multiturn")
    """Of passkey, single, multikey, multivalue, tracking, common, copying, arithmetic, multiturn."""
    length: tuple[Count, ...] = (256, 512)
    """Tokens of a context."""
    depth: tuple[Share, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where in the context the answer is hidden: 0 at the start, 1 at the end."""
    samples: Count = 4
    """Puzzles per task, length and depth, no two alike."""
    batch: Count = 8
    """Rows at once."""
    seed: Seed = 0
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""


def main(arguments: list[str]) -> None:
    """Ask the model behind each cache, print a table of the shares answered, append the records."""
    args = arguments_of(Args, "retrieve", arguments)
    if not (args.task and args.length and args.depth):
        raise BadInput("retrieve needs at least one task, length and depth")
    specs = [parse(text) for text in args.cache]
    model = console.open_model(args.model, args.weights, specs)
    slots = [spec.slots(model.config.layer_heads, max(args.length)) for spec in specs]
    fewest = min(slots, default=max(args.length) // 4)
    specs = list(dict.fromkeys([parse("full"), *specs, parse(f"random {fewest}")]))
    tasks, lengths, depths = [*dict.fromkeys(args.task)], [*dict.fromkeys(args.length)], [*dict.fromkeys(args.depth)]
    jobs = retrieval.jobs(model, specs, tasks, lengths, depths, args.samples, args.seed, args.batch)
    console.show(retrieval.table(console.measured("retrieve", jobs, args)))
