"""Where a decode step goes: `kvcascade profile --model smollm2 --cache full --cache "sink 4 | recent 124"`; about a minute per cache."""

import dataclasses
import io
from pathlib import Path
from typing import Annotated

import tyro

from kvcascade.cache.spec import parse
from kvcascade.eval.speed import profile, profile_report
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Recorded, arguments_of


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Divide the time and the bytes of a decode step among the parts of the model, and measure how its memory grows with the context."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A cache in one line, or a preset's name; give it several times to compare."""
    context: Count | None = None
    """Tokens up to which is decoded, and the longest context of the memory; by default 1,024, or what the model has room for."""
    batch: Count = 1
    """Rows at once."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""
    dir: Path = Path("runs/profile")
    """Folder for profile.txt, step.csv, memory.csv, step.svg and memory.svg."""


def main(arguments: list[str]) -> None:
    """Profile a step behind every cache, print what it says, write the files, append the records."""
    args = arguments_of(Args, "profile", arguments)
    specs = [parse(text) for text in args.cache or ("full",)]
    model = console.open_model(args.model, args.weights, specs)
    context = min(1024, model.config.context) if args.context is None else args.context
    profile.check(model.config, specs, context)
    jobs = [profile.job(model, spec, args.batch, context) for spec in specs]
    found = console.measured("profile", jobs, args)
    text = io.StringIO()
    for record in found:
        console.show(profile_report.table(record), text)
        print(*profile_report.sentences(record), "", sep="\n", file=text)
    for some in (profile_report.summary, profile_report.memory_table):
        console.show(some(found), text)
    profile_report.write(args.dir, found, text.getvalue())
    print(text.getvalue() + f"{args.dir}: profile.txt, step.csv, memory.csv, step.svg, memory.svg")
