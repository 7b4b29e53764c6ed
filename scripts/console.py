"""What the scripts show a person: progress on stderr, tables on stdout."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.eval import measure, record_files
from kvcascade.eval import spread as spreading
from kvcascade.eval.measure import Job, Measured
from kvcascade.eval.quality import windows
from kvcascade.eval.quality.windows import Windows
from kvcascade.eval.records import Record
from kvcascade.eval.spread import Place, Recipe
from kvcascade.eval.table import Table, brief, on_terminal
from kvcascade.model import pretrained
from kvcascade.model.pretrained import Model
from kvcascade.model.tokenizer import token_bytes
from kvcascade.scripts.arguments import Recorded
from kvcascade.serve import draft
from kvcascade.serve.draft import Draft

err = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


@contextlib.contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[[int | None, str], None]]:
    """How far a task is, on stderr: a bar on a terminal, else a line now and then.

    Yields a function that takes how far the work is (None: as far as before) and a few words.
    """
    if not err.is_terminal:
        lines = _Lines(title, total)
        try:
            yield lines.show
        finally:
            lines.close()
        return
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


class _Lines:
    """A task's progress in lines, for a file or a pipe: every SHARE of it where that is known, else ever more seldom; and the end of it."""

    SECONDS, SHARE = 3.0, 0.025  # at least so long, and so much of the task, between two lines

    def __init__(self, title: str, total: int | None):
        self.title, self.total = title, total
        self.start = self.told = time.monotonic()
        self.first: int | None = None  # how far it was when it was first heard of
        self.done, self.words, self.last = 0, "", ""
        self.due = 0.0  # how far the next line is

    def show(self, done: int | None, words: str) -> None:
        """Say how far it is, if it is time to."""
        self.done, self.words = self.done if done is None else done, words
        if self.first is None:
            self.first = self.done
        now = time.monotonic()
        wait = self.SECONDS if self.total else max(self.SECONDS, 0.3 * (self.told - self.start))
        if now - self.told >= wait and (not self.total or self.done >= self.due):
            self.told, self.due = now, self.done + self.SHARE * (self.total or 0)
            self._say(now)

    def close(self) -> None:
        """Say where it ended, if it began and that was not said."""
        if self.first is not None:
            self._say(time.monotonic())

    def _say(self, now: float) -> None:
        passed, moved = now - self.start, self.done - (self.first or 0)
        far = f"{self.done:,}"
        if self.total:
            far += f"/{self.total:,} ({100 * self.done / self.total:.0f}%)"
        told = f"{self.title}: {far}  {self.words}".rstrip()
        if told == self.last:
            return
        self.last = told
        if self.total and moved and self.done < self.total:
            told += f"  {_clock(passed / moved * (self.total - self.done))} left"
        print(f"{told}  after {_clock(passed)}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


@contextlib.contextmanager
def training(title: str, steps: int) -> Iterator[Callable[[int, dict], None]]:
    """A progress bar that shows the lines of a run's log: loss, tokens per second, how much of the card that uses, validation loss."""
    words: dict[str, str] = {}
    with progress(title, steps) as show:

        def report(step: int, line: dict) -> None:
            if "loss" in line:
                words["loss"] = f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s"
            if "mfu" in line:
                words["mfu"] = f"MFU {line['mfu']:.0%}"
            if "validation_loss" in line:
                words["validation"] = f"validation {line['validation_loss']:.3f} ± {line['validation_stderr']:.3f}"
            show(step, "  ".join(words.values()))

        yield report


def open_model(name: str, weights: str = "float32", specs: Sequence[CacheSpec] = ()) -> Model:
    """A model by its name, with a progress bar while it loads; BadInput for a run whose weights are to be other than float32, and for caches
    that are not for it."""
    model = _opened(name, weights)
    for spec in specs:
        model.check(spec)
    return model


def open_draft(name: str, model: Model) -> Draft | None:
    """The smaller model of `draft:MODEL`, for a model; None for other ways to foresee."""
    kind, _, place = name.partition(":")
    return draft.read(place, model) if kind == "draft" else None


def _opened(name: str, weights: str) -> Model:
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


def measured[R: Record](title: str, jobs: Sequence[Job[R]], args: Recorded) -> list[R]:
    """The records of some jobs, measured where the file has them not, with a progress bar; a line says what was there, or what is left to do."""
    return _recorded(title, len(jobs), args, lambda tell: measure.measure(jobs, args.out, args.again, tell))


def spread(
    title: str, recipe: Recipe, jobs: Sequence[Sequence[Job]], args: Recorded, processes: int, place: Place
) -> list:
    """The same of jobs that several processes make and measure."""
    assert args.out is not None
    out = args.out
    run = lambda tell: spreading.spread(recipe, jobs, out, processes, place, args.again, tell)
    return _recorded(title, len(jobs), args, run)


def _recorded[R: Record](
    title: str, count: int, args: Recorded, run: Callable[[Callable[[int, str], None]], Measured[R]]
) -> list[R]:
    if args.again and args.out is None:
        raise BadInput("--again measures what --out has already, and there is no --out")
    record_files.check_writable(args.out)
    done = 0

    def tell(index: int, words: str) -> None:
        nonlocal done
        done = index
        show(index, brief(words))

    try:
        with progress(title, count) as show:
            found = run(tell)
    except measure.Stopped as stopped:
        kept = (
            f"; {done} of {count} are in {args.out}, and the same command goes on with the others" if args.out else ""
        )
        raise measure.Stopped(stopped.signal, f"stopped{kept}") from None
    if found.before:
        say(f"{found.before} of {count} were in {args.out} already; --again measures them anew")
    return found.records


def say(words: str) -> None:
    """A line for the person who waits, on stderr."""
    print(f"kvcascade: {words}", file=sys.stderr)


def answers(prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Print prompts and what came after them, one below the other."""
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"── {prompt}\n{text}\n")


def show(table: Table, file: TextIO | None = None) -> None:
    """Print a table to stdout or a file."""
    # A file or a pipe has no width of its own; rich would take 80 columns and fold every figure.
    width = None if file is None and sys.stdout.isatty() else 160
    Console(file=file, width=width).print(on_terminal(table))


def windows_to_learn_from(model: Model, data: str, context: int, count: int) -> Windows:
    """Windows of a text that nothing is to be evaluated on, as evaluation has them of others: of a file all of it, else the training split."""
    from kvcascade.train import data as corpus  # a second of imports, which other commands do not need

    text = corpus.unseen(data) if data.startswith("file:") else corpus.load(data).train
    tokens = corpus.tokenize(text, model.encoding)
    starts = corpus.document_starts(text, tokens, token_bytes(model.encoding))
    begin = model.bos if model.begins_with_bos("auto") else None
    return windows.choose(tokens, starts, data, context, count, bos=begin)
