"""Where a decode step goes: `kvcascade profile --model smollm2 --cache full --cache "sink 4 | recent 124"`; about a minute per cache."""

import dataclasses
import io
import time
from pathlib import Path
from typing import Annotated

import tyro

from kvcascade.cache.spec import parse
from kvcascade.eval import record_files, records
from kvcascade.eval.memory import buffers
from kvcascade.eval.speed import bench, profile, profile_report
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, arguments_of


@dataclasses.dataclass(frozen=True)
class Args:
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
    out: Path | None = None
    """File that one JSON object per cache is appended to."""


def main(arguments: list[str]) -> None:
    """Profile a step behind every cache, print what it says, write the files, append the records."""
    args = arguments_of(Args, "profile", arguments)
    specs = [parse(text) for text in args.cache or ("full",)]
    model = console.open_model(args.model, args.weights)
    context = min(1024, model.config.context) if args.context is None else args.context
    profile.check(model.config, specs, context)
    record_files.check_writable(args.out)
    found = []
    with console.progress("profile", 2 * len(specs)) as show:
        bandwidth = 0.0
        for spec in specs:
            start = time.monotonic()
            bandwidth = max(bandwidth, bench.bandwidth())
            record = profile.profile(model, spec, args.batch, context)
            show(2 * len(found) + 1, f"steps behind {spec}")
            record["growth"] = buffers.measured(model, spec, args.batch, context)
            found.append(records.stamp(record, time.monotonic() - start))
            show(2 * len(found), f"memory of {spec}")
    found = [record | {"bandwidth": bandwidth} for record in found]
    text = io.StringIO()
    for record in found:
        console.table(*profile_report.table(record), file=text)
        print(*profile_report.sentences(record), "", sep="\n", file=text)
    for some in (profile_report.summary, profile_report.memory_table):
        console.table(*some(found), file=text)
    if args.out:
        record_files.append(args.out, found)
    profile_report.write(args.dir, found, text.getvalue())
    print(text.getvalue() + f"{args.dir}: profile.txt, step.csv, memory.csv, step.svg, memory.svg")
