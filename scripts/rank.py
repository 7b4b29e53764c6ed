"""Train a ranker of tokens, for `learned[ranker=FOLDER] 64`: `kvcascade rank --model smollm2 --data file:some.txt --to ranker`; minutes."""

import dataclasses
import time
from pathlib import Path

import numpy as np

from kvcascade.cache.errors import BadInput
from kvcascade.cache.ranker import Shape
from kvcascade.eval import record_files, records
from kvcascade.eval.origin import origin
from kvcascade.eval.quality import ranking
from kvcascade.model import generate
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, Seed, Window, arguments_of
from kvcascade.train import ranker
from kvcascade.train.ranker import Settings


@dataclasses.dataclass(frozen=True)
class Args:
    """Learn from a text what attention a token will get, and write the networks that say it."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    to: Path
    """The folder to be made."""
    data: str = "stdlib"
    """Text to learn from: file:PATH, or the training split of stdlib or a hub data set; none of it should be evaluated on."""
    windows: Count = 64
    """Windows, spread over the text; the last eighth of them is held out."""
    context: Window = 512
    """Tokens per window."""
    skip: CountOrNone = Settings.skip
    """Attention counts from so many positions after a token on, since a window of recent tokens holds it before."""
    horizon: Count = Settings.horizon
    """And up to so many positions after it."""
    hidden: Count = Settings.hidden
    """Width of a network's hidden layer."""
    steps: Count = Settings.steps
    """Steps of Adam."""
    seed: Seed = 0
    """Of the networks, the tokens and the batches."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""
    out: Path | None = None
    """File that one JSON object is appended to."""


def main(arguments: list[str]) -> None:
    """Record what tokens got, train, write the folder, print how well it ranks."""
    args = arguments_of(Args, "rank", arguments)
    settings = Settings(args.skip, args.horizon, args.hidden, args.steps, seed=args.seed)
    if args.to.exists():
        raise BadInput(f"{args.to} is there already")
    if args.horizon <= args.skip:
        raise BadInput(f"--horizon is {args.horizon}; it must be above --skip, {args.skip}")
    if args.context < args.skip + ranker.LEAST:
        raise BadInput(
            f"--context is {args.context}; it must be at least --skip and {ranker.LEAST} more, {args.skip + ranker.LEAST}"
        )
    if args.windows < 2:
        raise BadInput("--windows is 1; one to learn from and one to hold out are needed")
    record_files.check_writable(args.out)
    model = console.open_model(args.model, args.weights)
    shape = Shape.of(model.config.layer_heads)
    generate.check_context(model.config, args.context)
    found = console.windows_to_learn_from(model, args.data, args.context, args.windows)
    # In the order of the text, so that what is held out is its end.
    rows_BT = found.rows_BT[np.argsort(found.documents_B, kind="stable")]
    start = time.monotonic()
    with console.progress("record", args.windows) as show:
        examples = ranker.record(model.config, model.params, rows_BT, settings, lambda done: show(done, "windows"))
    with console.progress("train", args.steps) as show:
        tell = lambda done, left: show(done, f"steps; {left:.1%} of the held-out variance is not explained")
        trained, held, unexplained = ranker.fit(examples, shape, settings, tell)
    about = {
        "model": model.name, "weights": args.weights, "data": found.data, "rows": found.key, "context": args.context, "windows": args.windows,
        "held_out": held.windows, "skip": args.skip, "horizon": args.horizon, "hidden": args.hidden, "steps": args.steps, "seed": args.seed,
    }  # fmt: skip
    trained.write(args.to, about)
    x_JWEF = held.x_JEF.reshape(*held.by_window(held.y_JE).shape, -1)
    measured = {
        "unexplained": round(unexplained, 5),
        "ranker_bytes": trained.nbytes,
        "fingerprint": trained.fingerprint,
    }
    correlations = ranking.correlations(trained, x_JWEF, held.by_window(held.y_JE))
    record = records.Ranking(**about, **measured, correlations=correlations)
    record = records.changed(record, **origin(time.monotonic() - start))
    if args.out:
        record_files.append(args.out, [record])
    console.show(ranking.table(record))
