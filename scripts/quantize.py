"""Round a model's weights to four bits: `kvcascade quantize smollm2 --method gptq --data file:some.txt --held-out file:other.txt --to quantised`; minutes."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

import kvcascade
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import measure, record_files, records
from kvcascade.eval.origin import origin
from kvcascade.eval.quality import evaluation, perplexity, weights
from kvcascade.eval.quality.evaluation import Protocol
from kvcascade.model import pretrained, rounding, written
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Window, arguments_of
from kvcascade.train import data


@dataclasses.dataclass(frozen=True)
class Args:
    """Write a directory with the layers' matrices in four bits, as GPTQ's format has them, and measure what that costs."""

    model: Annotated[str, tyro.conf.Positional]
    """smollm2, gguf:FILE, or a Hugging Face directory or name."""
    to: Path
    """The directory to be made."""
    weights: Literal["int4"] = "int4"
    """What the matrices become."""
    method: Literal["rtn", "gptq", "awq"] = "gptq"
    """To the nearest code, or as a calibration text's activations ask for."""
    group: Count = 32
    """Inputs under one scale; must divide every matrix's, and be a multiple of 32."""
    data: str = "stdlib"
    """Calibration text: stdlib, file:PATH or a hub data set."""
    held_out: str | None = None
    """Text that the perplexity before and after is measured on; by default the validation split of the calibration text's data set."""
    samples: Count = 32
    """Windows of the calibration text, spread over it."""
    context: Window = 512
    """Tokens per window."""
    sequences: Count = 8
    """Windows of the held-out text, spread over it."""
    out: Path | None = None
    """File that one JSON object is appended to."""


def main(arguments: list[str]) -> None:
    """Quantise, write, read back, and compare."""
    args = arguments_of(Args, "quantize", arguments)
    if args.to.exists():
        raise BadInput(f"{args.to} is there already")
    if args.group % 32:
        raise BadInput(f"--group is {args.group}; it must be a multiple of 32")
    if args.data.startswith("file:") and args.held_out in (None, args.data):
        raise BadInput("--data is a file: name another text, that is not in it, as --held-out")
    if not pretrained.is_pretrained(args.model):
        raise BadInput(f"{args.model} is no pretrained model")
    model = console.open_model(args.model)
    written.hub_config(model.config, model.name)  # refused before the work
    spec = parse("full")
    perplexity.check(model.config, [spec], args.context, 0, args.sequences)
    held_out = args.held_out or args.data
    rows = kvcascade.windows(model, held_out, args.context, args.sequences)
    text = data.unseen(args.data) if args.data.startswith("file:") else data.load(args.data).train
    tokens = data.tokenize(text, model.encoding)
    whole = data.windows(tokens, args.context, len(tokens) // args.context)
    if len(whole) < args.samples:
        raise BadInput(
            f"{args.data} has {len(whole)} windows of {args.context} tokens, fewer than --samples {args.samples}"
        )
    picked = whole[np.linspace(0, len(whole) - 1, args.samples).astype(int)]
    record_files.check_writable(args.out)
    protocol = Protocol(args.sequences)
    start = time.monotonic()
    with console.progress(args.method, None) as show:
        tell = lambda done, of: show(done, f"of {of} matrices")
        params, codes = rounding.quantize(model.config, model.params, picked, args.method, args.group, tell)
    took = time.monotonic() - start
    size = written.write(args.to, dataclasses.replace(model, params=params), codes, args.group)
    after = console.open_model(str(args.to), args.weights)
    before, rounded = measure.measure(
        [evaluation.job(each, spec, rows, protocol) for each in (model, after)], None
    ).records
    about = {"method": args.method, "group": args.group, "calibration": args.data, "samples": args.samples}
    record = weights.quantized(before, rounded, **about, file_bytes=size, quantize_seconds=round(took, 2))
    record = records.changed(record, **origin(time.monotonic() - start))
    if args.out:
        record_files.append(args.out, [record])
    console.show(weights.table([record]))
