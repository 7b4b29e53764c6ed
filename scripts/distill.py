"""Train a small model that foresees a large one: `kvcascade distill --model smollm2 --weights int8 --to draft.safetensors`; up to an hour."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

from kvcascade.cache.errors import BadInput
from kvcascade.eval import record_files, records
from kvcascade.eval.origin import origin
from kvcascade.eval.table import Column, Table
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Part, Seed, Window, arguments_of
from kvcascade.serve import draft
from kvcascade.train import distillation
from kvcascade.train.distillation import Settings


@dataclasses.dataclass(frozen=True)
class Args:
    """Let a model write texts, teach a small GPT what it would have said in each of their places, and write that, for `--speculate draft:FILE`."""

    model: str
    """smollm2, gguf:FILE, a run's folder, or a Hugging Face directory or name."""
    to: Path
    """The file to be made, such as draft.safetensors."""
    texts: Count = Settings.texts
    """Texts that the model writes; the last eighth of them is held out."""
    length: Window = Settings.length
    """Tokens of each."""
    layers: Count = Settings.layers
    """Of the small model."""
    width: Count = Settings.width
    """Of the small model, a multiple of 64."""
    steps: Count = Settings.steps
    """Steps of AdamW."""
    batch: Count = Settings.batch
    """Texts of a step."""
    learning_rate: Part = Settings.learning_rate
    seed: Seed = 0
    """Of what is drawn, and of the small model."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""
    out: Path | None = None
    """File that one JSON object is appended to."""


def main(arguments: list[str]) -> None:
    """Write texts, hear them once more, learn, write the file, say how well it foresees."""
    args = arguments_of(Args, "distill", arguments)
    fields = {
        name: getattr(args, name)
        for name in ("texts", "length", "layers", "width", "steps", "batch", "learning_rate", "seed")
    }
    settings = Settings(**fields)
    if args.to.exists():
        raise BadInput(f"{args.to} is there already")
    if args.to.suffix != ".safetensors":
        raise BadInput(f"--to is {args.to}; it must end with .safetensors")
    if args.texts <= args.batch or args.texts < 2:
        raise BadInput(
            f"--texts is {args.texts}; some must be left to learn from beside those held out, more than --batch, {args.batch}"
        )
    record_files.check_writable(args.out)
    model = console.open_model(args.model, args.weights)
    distillation.shape(model.config, settings)
    start = time.monotonic()
    with console.progress("write", args.texts) as show:
        rows = distillation.write(model, settings, lambda done: show(done, "texts"))
    with console.progress("hear", args.texts) as show:
        heard = distillation.hear(model, rows, lambda done: show(done, "texts"))
    with console.progress("learn", args.steps) as show:
        made = distillation.learn(model, rows, heard, settings, show)
    about: dict[str, Any] = {"model": model.name, "weights": args.weights} | fields
    fingerprint = draft.write(args.to, made.config, made.params, about | {"model_key": model.identity})
    record = records.Distilled(
        **about, held_out=made.held, parameters=sum(each.size for each in jax.tree.leaves(made.params)), divergence=float(made.compared.divergence),
        accepted=float(made.compared.shared), alike=float(made.compared.alike), fingerprint=fingerprint,
    )  # fmt: skip
    record = records.changed(record, **origin(time.monotonic() - start))
    if args.out:
        record_files.append(args.out, [record])
    console.show(table(record))


def table(record: records.Distilled) -> Table:
    """How well it foresees, in a row."""
    columns = [
        Column("parameters", "parameters", "{:,}"),
        Column("nats from the model", "divergence", "{:.3f}"),
        Column("agrees at best, drawn", "accepted", "{:.1%}"),
        Column("same likeliest token", "alike", "{:.1%}"),
    ]
    title = f"a draft of {record.model}, in {record.held_out} texts that nothing was learned from, of {record.texts}"
    return Table.of(title, columns, [record])
