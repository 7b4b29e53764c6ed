"""The best cache of so many bytes: `kvcascade tune --model smollm2 --data file:some.txt --budget 25%`; some ten minutes."""

import dataclasses
from typing import Literal

import kvcascade
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import measure, record_files
from kvcascade.eval.memory.arithmetic import full_bytes
from kvcascade.eval.quality import evaluation, perplexity
from kvcascade.eval.search import options, tune
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Recorded, Seed, Window, arguments_of, share


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Search for the cache of which least is lost, of all sizes, codecs and policies for each layer and head; score it on text held out."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    data: str | None = None
    """Text: file:PATH, stdlib or a hub data set; its first half is tuned on, its second held out."""
    budget: tuple[str, ...] = ("25%",)
    """Of the bytes of the full cache in bf16 for this context, such as 25%; several share what is found out of the model."""
    objective: Literal["ppl", "kl", "retrieval"] = "ppl"
    """What counts: perplexity, the divergence from the full cache, or puzzles answered."""
    slots_only: bool = False
    """All tokens that are kept are in bf16."""
    bits_only: bool = False
    """All tokens are kept."""
    calibration: str = ""
    """A file that kvcascade calibrate made, for codecs in the model's own bases; made of text that is not held out here."""
    context: Window = 512
    """Tokens per window."""
    windows: Count = 24
    """Windows, half of them to tune on and half held out."""
    seed: Seed = 0
    """Which windows are chosen."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""


def main(arguments: list[str]) -> None:
    """Search, print the winner and its rivals on the half that was held out, append the records."""
    args = arguments_of(Args, "tune", arguments)
    parts = [share("budget", each) for each in args.budget]
    record_files.check_writable(args.out)
    if args.slots_only and args.bits_only:
        raise BadInput(
            "--slots-only keeps what is kept in bf16, --bits-only keeps every token: together there is nothing to choose"
        )
    model = console.open_model(
        args.model, args.weights, [parse(f"full@int4m with {args.calibration}")] if args.calibration else []
    )
    chosen = kvcascade.windows(model, args.data, args.context, args.windows, "spread", args.seed)
    tuning, held = tune.halves(chosen)
    budgets = [int(part * full_bytes(model.config, args.context)) for part in parts]
    search = tune.Search(0, args.objective, not args.bits_only, not args.slots_only, args.calibration)
    perplexity.check(model.config, [parse("full")], args.context, 0, tune.BATCH)
    every, heard = tune.curves_of(model, budgets, search, tuning)
    curves = console.measured("curves", heard, args)
    with console.progress("search", None) as show:
        jobs = tune.jobs(model, budgets, search, tuning, every, curves, lambda words: show(None, words))
        searches = measure.measure(jobs, args.out, args.again).records
    protocol = tune.protocol(held, args.objective == "kl")
    for found in searches:
        console.show(tune.table(found))
        rivals = options.rivals(model.config.layer_heads, args.context, found.budget, args.calibration)
        lot = [spec for name, spec in rivals.items() if name == "method: random"]  # it needs a slot besides the sinks
        # What was found, the full cache, random eviction, and what came to the last round, each once.
        specs = dict.fromkeys(
            [parse(found.cache), parse("full"), *lot, *(parse(each["cache"]) for each in tune.last(found))]
        )
        records = console.measured("held out", [evaluation.job(model, spec, held, protocol) for spec in specs], args)
        console.show(tune.held_out(records[0], records[1:]))
    print("\n".join(found.cache for found in searches))
