"""What codecs may know of a model: `kvcascade calibrate --model smollm2 --data file:some.txt --to smollm2.safetensors`; a minute."""

import dataclasses
from pathlib import Path

from kvcascade.cache.errors import BadInput
from kvcascade.model import generate
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Window, arguments_of
from kvcascade.train import calibration


@dataclasses.dataclass(frozen=True)
class Args:
    """Put a text through a model, and write the moments of its queries, keys and values, for caches such as `full@int4m with FILE`."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    to: Path
    """The file to be made."""
    data: str = "stdlib"
    """Text to learn from: file:PATH, or the training split of stdlib or a hub data set; none of it should be evaluated on."""
    windows: Count = 32
    """Windows, spread over the text."""
    context: Window = 512
    """Tokens per window."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""


def main(arguments: list[str]) -> None:
    """Record moments, write the file, say how large it is."""
    args = arguments_of(Args, "calibrate", arguments)
    if args.to.exists():
        raise BadInput(f"{args.to} is there already")
    if args.context <= calibration.SKIP:
        raise BadInput(f"--context is {args.context}; the first {calibration.SKIP} tokens of a window do not count")
    model = console.open_model(args.model, args.weights)
    generate.check_context(model.config, args.context)
    found = console.windows_to_learn_from(model, args.data, args.context, args.windows)
    about = {
        "model": model.name, "model_key": model.identity, "weights": args.weights, "data": found.data, "rows": found.key,
        "context": args.context, "windows": args.windows,
    }  # fmt: skip
    with console.progress("calibrate", args.windows) as show:
        tell = lambda done: show(done, "windows")
        made = calibration.calibrate(model.config, model.params, found.rows_BT, about, tell)
    made.write(args.to)
    print(f"{args.to}: {args.to.stat().st_size:,} bytes, fingerprint {made.fingerprint}")
