"""What the scripts show a person: progress on stderr, tables on stdout."""

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvcascade.cache.errors import BadInput
from kvcascade.eval import measure, record_files, records
from kvcascade.eval.measure import Job
from kvcascade.eval.records import Record
from kvcascade.model import pretrained
from kvcascade.model.pretrained import Model
from kvcascade.scripts.arguments import Recorded

err = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


@contextlib.contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[[int | None, str], None]]:
    """A progress bar on stderr; yields a function that takes how far the work is (None: as far as before) and a few words."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[words]}"), console=err, transient=False) as bar:
        task = bar.add_task(title, total=total, words="")
        yield lambda done, words: bar.update(task, completed=done, words=words)


@contextlib.contextmanager
def training(title: str, steps: int) -> Iterator[Callable[[int, dict], None]]:
    """A progress bar that shows the lines of a run's log: loss, tokens per second, validation loss."""
    words: dict[str, str] = {}
    with progress(title, steps) as show:

        def report(step: int, line: dict) -> None:
            if "loss" in line:
                words["loss"] = f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s"
            if "validation_loss" in line:
                words["validation"] = f"validation {line['validation_loss']:.3f} ± {line['validation_stderr']:.3f}"
            show(step, "  ".join(words.values()))

        yield report


def open_model(name: str, weights: str = "float32") -> Model:
    """A model by its name, with a progress bar while it loads; BadInput for a run whose weights are to be other than float32."""
    if not pretrained.is_pretrained(name):
        if weights != "float32":
            raise BadInput(f"{name} is a run, whose weights are float32; --weights {weights} is for pretrained models")
        from kvcascade.train import run  # a second of imports, which a pretrained model does not need

        return run.open_model(name)
    with progress(f"load {name}", None) as show:
        model = pretrained.load(name, lambda done, of: show(done, f"of {of} tensors"), weights)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        show(None, f"{size / 2**20:,.0f} MiB of parameters; the process took {peak / 2**20:,.0f} MiB at most")
    return model


def measured(title: str, jobs: Sequence[Job], args: Recorded) -> list[Record]:
    """The records of some jobs, measured where the file has them not, with a progress bar; a line says what was there, or what is left to do."""
    if args.again and args.out is None:
        raise BadInput("--again measures what --out has already, and there is no --out")
    record_files.check_writable(args.out)
    done = 0

    def tell(index: int, words: str) -> None:
        nonlocal done
        done = index
        show(index, words)

    try:
        with progress(title, len(jobs)) as show:
            found = measure.measure(jobs, args.out, args.again, tell)
    except measure.Stopped as stopped:
        kept = (
            f"; {done} of {len(jobs)} are in {args.out}, and the same command goes on with the others"
            if args.out
            else ""
        )
        raise measure.Stopped(stopped.signal, f"stopped{kept}") from None
    if found.before:
        say(f"{found.before} of {len(jobs)} were in {args.out} already; --again measures them anew")
    return found.records


def say(words: str) -> None:
    """A line for the person who waits, on stderr."""
    print(f"kvcascade: {words}", file=sys.stderr)


def answers(prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Print prompts and what came after them, one below the other."""
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"── {prompt}\n{text}\n")


def table(title: str, columns: list[str], rows: list[list[str]], file: TextIO | None = None) -> None:
    """Print a table to stdout or a file; its first column is text, the others are figures."""
    # A file or a pipe has no width of its own; rich would take 80 columns and fold every figure.
    width = None if file is None and sys.stdout.isatty() else 160
    Console(file=file, width=width).print(records.rich_table(title, columns, rows))
