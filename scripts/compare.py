"""Runs side by side: `kvcascade compare runs/mha runs/gqa --cache "sink 4 | recent 124"`; about 15 seconds per run and cache."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import record_files, records
from kvcascade.eval.quality import perplexity
from kvcascade.eval.speed import latency
from kvcascade.model import tokenizer
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Window, arguments_of
from kvcascade.train import run


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare models on the first one's text; the full cache and random eviction are always among the caches."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs, or pretrained models as `evaluate` takes them, that share a tokenizer."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A cache in one line, or a preset's name; may be given several times."""
    context: Window | None = None
    """Tokens per window; by default 512, or what the shortest model takes."""
    sequences: Count = 8
    """Windows to score."""
    batch: Count = 8
    """Windows at once, and rows of the timed decode step."""
    out: Path | None = None
    """File that one JSON object per run and cache is appended to."""


def main(arguments: list[str]) -> None:
    """Score and time each run behind each cache; print one table."""
    args = arguments_of(Args, "compare", arguments)
    if not args.runs:
        raise BadInput("name at least one run to compare")
    loaded = [console.open_model(name) for name in args.runs]
    first = loaded[0]
    for other in loaded[1:]:
        if tokenizer.fingerprint(other.encoding) != tokenizer.fingerprint(first.encoding):
            raise BadInput(
                f"{other.name} was trained with another tokenizer than {first.name}: their losses per token do not compare"
            )
    context = args.context or min(512, *(model.config.context for model in loaded))
    texts = list(dict.fromkeys(["full", *args.cache, f"random {context // 4}"]))
    specs = [parse(text) for text in texts]
    for model in loaded:
        perplexity.check(model.config, specs, context, 0, args.batch)
    record_files.check_writable(args.out)
    bos = first.begins_with_bos("auto")
    rows = run.evaluation_windows(first, None, context, args.sequences, bos)
    lengths = tokenizer.token_bytes(first.encoding)
    found, shown = [], []
    with console.progress("compare", len(loaded) * len(specs)) as show:
        for model in loaded:
            heads = "/".join(dict.fromkeys(str(each.kv) for each in model.config.layer_heads))
            for spec in specs:
                start = time.monotonic()
                scores = perplexity.score(model.config, model.params, spec, rows, args.batch)
                timed = latency.decode_step(model.config, model.params, [spec], args.batch)[0]
                record = records.evaluation(model, spec, first.data, rows, 0, lengths, scores, args.batch, bos)
                record |= {key: timed[key] for key in ("step_ms", "products_ms")}
                found.append(records.stamp(record, time.monotonic() - start))
                shown.append([
                    model.name, heads, str(spec), f"{record['nll']:.4f}", f"{record['ppl']:.3f}",
                    f"{record['bits_per_byte']:.4f}", f"{record['kv_bytes']:,}", f"{timed['step_ms']:.2f}", f"{timed['products_ms']:.2f}",
                ])  # fmt: skip
                show(len(found), f"{model.name}: {spec}")
    if args.out:
        record_files.append(args.out, found)
    title = f"{args.sequences} windows of {context} tokens of {first.data}; a decode step of {args.batch} rows"
    columns = ["run", "KV heads", "cache", "loss", "PPL", "bits/byte", "KV bytes", "step, ms", "its products, ms"]
    console.table(title, columns, shown)
