"""The best cache of so many bytes: `kvcascade tune --model smollm2 --data file:some.txt --budget 25%`; some ten minutes."""

import dataclasses
from typing import Literal

import kvcascade
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import measure, record_files
from kvcascade.eval.memory.arithmetic import full_bytes
from kvcascade.eval.quality import evaluation, perplexity
from kvcascade.eval.quality.evaluation import Protocol
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
    budget: str = "25%"
    """Of the bytes of the full cache in bf16 for this context, such as 25%."""
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
    part = share("budget", args.budget)
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
    budget = int(part * full_bytes(model.config, args.context))
    search = tune.Search(budget, args.objective, not args.bits_only, not args.slots_only, args.calibration)
    perplexity.check(model.config, [parse("full")], args.context, 0, 8)
    with console.progress("search", None) as show:
        job = tune.job(model, search, tuning, lambda words: show(None, words))
        (found,) = measure.measure([job], args.out, args.again).records
    console.show(tune.table(found))
    rivals = options.rivals(model.config.layer_heads, args.context, budget, args.calibration)
    best = [parse(each["cache"]) for each in found.candidates[:3]]
    # What was found, the full cache, every rival, and what came next, each once.
    specs = dict.fromkeys([parse(found.cache), parse("full"), *rivals.values(), *best])
    protocol = Protocol(min(8, len(held.rows_BT)), fidelity=args.objective == "kl")
    records = console.measured("held out", [evaluation.job(model, spec, held, protocol) for spec in specs], args)
    console.show(tune.held_out(records[0], records[1:]))
    print(found.cache)
