"""What a cache still lets a model find: `kvcascade retrieve --model smollm2 --cache "sink 4 | recent 124" --length 512 --task passkey single`; minutes."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import record_files, records
from kvcascade.eval.quality import retrieval
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Seed, Share, arguments_of


@dataclasses.dataclass(frozen=True)
class Args:
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
    """Samples per task, length and depth."""
    batch: Count = 8
    """Rows at once."""
    seed: Seed = 0
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""
    out: Path | None = None
    """File that one JSON object per cache, task, length and depth is appended to."""


def main(arguments: list[str]) -> None:
    """Ask each model behind each cache, print a table of the shares answered, append the records."""
    args = arguments_of(Args, "retrieve", arguments)
    if not (args.task and args.length and args.depth):
        raise BadInput("retrieve needs at least one task, length and depth")
    specs = [parse(text) for text in args.cache]
    model = console.open_model(args.model, args.weights)
    slots = [spec.slots(model.config.layer_heads, max(args.length)) for spec in specs]
    fewest = min(slots, default=max(args.length) // 4)
    specs = list(dict.fromkeys([parse("full"), *specs, parse(f"random {fewest}")]))
    make = lambda task, length, depth: [
        retrieval.sample(task, model.encoding, length, depth, args.seed + i, model.before) for i in range(args.samples)
    ]
    made = {(task, length): [make(task, length, d) for d in args.depth] for task in args.task for length in args.length}
    room = retrieval.asked(each for by_depth in made.values() for samples in by_depth for each in samples)
    record_files.check_writable(args.out)
    found: list[records.Record] = []
    with console.progress("retrieve", len(specs) * len(made)) as show:
        for spec in specs:
            for (task, length), by_depth in made.items():
                start = time.monotonic()
                flat = [each for samples in by_depth for each in samples]
                answered, size = retrieval.score(model.config, model.params, spec, flat, room, args.batch)
                seconds = (time.monotonic() - start) / len(args.depth)
                for index, depth in enumerate(args.depth):
                    mine = answered[index * args.samples : (index + 1) * args.samples]
                    one = records.retrieval(model, spec, task, length, depth, args.seed, mine, size)
                    found.append(records.stamp(one, seconds))
                show(len(found) // len(args.depth), f"{spec}: {task} in {length}")
    if args.out:
        record_files.append(args.out, found)
    console.table(*records.retrieval_table(found))
