"""Perplexity, bytes and speed of a model behind caches: `kvcascade evaluate --model runs/toy --cache full --cache "sink 4 | recent 124"`; seconds per cache."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from kvcascade.cache.spec import parse
from kvcascade.eval import record_files, records
from kvcascade.eval.quality import fidelity, perplexity
from kvcascade.model import tokenizer
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, Window, arguments_of
from kvcascade.train import run


@dataclasses.dataclass(frozen=True)
class Args:
    """Score windows of a text, teacher-forced, one token at a time through each cache."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A cache in one line, or a preset's name: streaming, h2o, neurokv. Give it several times to compare."""
    data: str | None = None
    """stdlib, file:PATH or a hub data set; by default the text that a run was validated on, and stdlib for others."""
    context: Window = 512
    """Tokens per window."""
    sequences: Count = 8
    """Windows, the first ones of the text."""
    batch: Count = 8
    """Windows at once."""
    prefix: CountOrNone = 0
    """Tokens of each window that enter in one prefill and are not scored."""
    fidelity: bool = False
    """Also compare every next-token distribution with the full cache's: KL divergence and the same likeliest token; doubles the time."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Whether each window begins with BOS, which is not scored: auto as the model's tokenizer does with a text."""
    out: Path | None = None
    """File that one JSON object per cache is appended to."""


def main(arguments: list[str]) -> None:
    """Evaluate each cache, print a table, append the records."""
    args = arguments_of(Args, "evaluate", arguments)
    specs = [parse(text) for text in args.cache or ("full",)]
    model = console.open_model(args.model, args.weights)
    perplexity.check(model.config, specs, args.context, args.prefix, min(args.batch, args.sequences))
    record_files.check_writable(args.out)
    bos = model.begins_with_bos(args.bos)
    rows = run.evaluation_windows(model, args.data, args.context, args.sequences, bos)
    lengths = tokenizer.token_bytes(model.encoding)
    found = []
    with console.progress("evaluate", len(specs)) as show:
        for index, spec in enumerate(specs):
            start = time.monotonic()
            scores = perplexity.score(model.config, model.params, spec, rows, args.batch, args.prefix)
            data_name = args.data or model.data
            record = records.evaluation(model, spec, data_name, rows, args.prefix, lengths, scores, args.batch, bos)
            found.append(records.stamp(record, time.monotonic() - start))
            show(index + 1, str(spec))
    if args.fidelity:
        with console.progress("fidelity", None) as show:
            tell = lambda done, of: show(done, f"of {of} steps")
            compared = fidelity.fidelity(model.config, model.params, specs, rows, args.batch, tell)
        found = [record | records.fidelity(each) for record, each in zip(found, compared, strict=True)]
    if args.out:
        record_files.append(args.out, found)
    console.table(*records.evaluation_table(found))
