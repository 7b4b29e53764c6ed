"""Each method beside kvpress' version of it: `kvcascade parity --model smollm2 --data file:TEXT --peer PYTHON --out parity.jsonl`; a minute per method."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

import kvcascade
from kvcascade.cache.errors import BadInput
from kvcascade.eval.quality import parity
from kvcascade.eval.speed import peers
from kvcascade.model import generate, pretrained
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Recorded, Seed, Window, arguments_of


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Prune a prompt by each method, as we do and as kvpress does, and score what follows: the same weights, windows and tokens kept."""

    model: str
    """smollm2, gguf:FILE, or a Hugging Face directory or name."""
    peer: Path
    """A Python that has kvpress, torch and transformers."""
    data: str | None = None
    """stdlib, file:PATH or a hub data set; by default stdlib."""
    method: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A method by its name in the table, such as SnapKV; may be given several times; by default all."""
    kept: tuple[Count, ...] = (96, 192)
    """Tokens per head that stay of the prompt."""
    prefix: Count = 384
    """Tokens of each window that enter at once, as a prompt."""
    context: Window = 512
    """Tokens per window."""
    sequences: Count = 16
    """Windows, spread over the text."""
    seed: Seed = 0
    """Where the spread begins."""
    batch: Count = 8
    """Windows at once, of ours."""


def main(arguments: list[str]) -> None:
    """Score all windows by both, print a table, append the records."""
    args = arguments_of(Args, "parity", arguments)
    if unknown := [name for name in args.method if name not in parity.METHODS]:
        raise BadInput(f"no method {unknown[0]!r}; there are {', '.join(parity.METHODS)}")
    parity.check(args.kept, args.prefix, args.context)
    if not pretrained.is_pretrained(args.model):
        raise BadInput(f"{args.model} is a run, which kvpress cannot load; parity is of pretrained models")
    peer = peers.find((args.peer,), pretrained.locate(args.model), ("kvpress ",))[0]
    model = console.open_model(args.model)
    generate.check_context(model.config, args.context)
    rows = kvcascade.windows(model, args.data, args.context, args.sequences, "spread", args.seed)
    cases = [(parity.METHODS[name], kept) for name in args.method or parity.METHODS for kept in args.kept]
    cases = [(method, kept) for method, kept in cases if method.press or kept == args.kept[0]]  # nothing is pruned once
    try:
        peer.start()
        jobs = parity.jobs(model, cases, rows, args.prefix, min(args.batch, args.sequences), peer)
        found = console.measured("parity", jobs, args)
    except peers.PeerFailed as failed:
        raise BadInput(f"{args.peer}: {failed}") from None
    finally:
        peer.close()
    console.show(parity.table(found))
