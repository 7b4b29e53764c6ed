"""Runs side by side: `kvcascade compare runs/mha runs/gqa --cache "sink 4 | recent 124"`; about 15 seconds per run and cache."""

import dataclasses
from typing import Annotated

import tyro

import kvcascade
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.quality import evaluation, perplexity
from kvcascade.eval.quality.evaluation import Protocol
from kvcascade.eval.table import CACHE, KV_BYTES, Column, Table
from kvcascade.model import tokenizer
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Recorded, Window, arguments_of


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
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
    """Windows at once."""


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
    specs = [*dict.fromkeys(map(parse, ("full", *args.cache, f"random {context // 4}")))]
    for model in loaded:
        for spec in specs:
            model.check(spec)
        perplexity.check(model.config, specs, context, 0, args.batch)
    rows = kvcascade.windows(first, None, context, args.sequences)
    protocol = Protocol(min(args.batch, args.sequences))
    jobs = [evaluation.job(model, spec, rows, protocol) for model in loaded for spec in specs]
    found = console.measured("compare", jobs, args)
    heads = {model.name: "/".join(dict.fromkeys(str(each.kv) for each in model.config.layer_heads)) for model in loaded}
    columns = [
        Column("run", "model"), Column("KV heads", lambda r: heads[r.model]), CACHE, Column("loss", "nll", "{:.4f}"), evaluation.PPL,
        Column("Δ PPL vs the first (95 %)", lambda r: evaluation.against(r, found[0])), evaluation.BITS, KV_BYTES,
        Column("step, ms", lambda r: r.batch / r.tokens_per_second * 1e3, "{:.2f}"),
    ]  # fmt: skip
    title = f"{evaluation.protocol(found[0])}; a decode step of {found[0].batch} rows"
    console.show(Table.of(title, columns, found))
