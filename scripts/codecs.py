"""What codecs do: `kvcascade codecs --model smollm2 --data file:TEXT --calibration smollm2.safetensors --out codecs.jsonl`; a minute or two."""

import dataclasses

import kvcascade
from kvcascade.cache import calibration
from kvcascade.cache.codec import NAMES
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec, parse
from kvcascade.eval.quality import codecs
from kvcascade.model import generate
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Recorded, Seed, Window, arguments_of


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Write a model's keys and values by each codec and read them back: how far they are from what they were, and attention with them."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    data: str | None = None
    """Text: file:PATH, stdlib or a hub data set, by default the model's own."""
    codec: tuple[str, ...] = ()
    """Names such as int4h, or one for keys and one for values, int8/int4h; by default all, those of a calibration where there is one."""
    calibration: str = ""
    """A file that kvcascade calibrate made of other text."""
    context: Window = 512
    """Tokens per window."""
    windows: Count = 4
    """Windows, spread over the text."""
    seed: Seed = 0
    """Which windows are chosen."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""


def main(arguments: list[str]) -> None:
    """Measure each codec, print a table, append the records."""
    args = arguments_of(Args, "codecs", arguments)
    specs = [_spec(name, args.calibration) for name in args.codec or _all(args.calibration)]
    model = console.open_model(args.model, args.weights, specs)
    generate.check_context(model.config, args.context)
    rows = kvcascade.windows(model, args.data, args.context, args.windows, "spread", args.seed)
    console.show(codecs.table(console.measured("codecs", codecs.jobs(model, specs, rows), args)))


def _all(known: str) -> list[str]:
    return [name for name in NAMES if known or not calibration.needed(name)]


def _spec(name: str, known: str) -> CacheSpec:
    needed = calibration.needed(name)
    if needed and not known:
        raise BadInput(f"{name} needs a --calibration, which kvcascade calibrate makes")
    return parse(f"full@{name}" + f" with {known}" * needed)
