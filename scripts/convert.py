"""Pool a run's KV heads: `kvcascade convert runs/mha --kv-heads 2 --run runs/uptrained`; seconds."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from kvcascade.scripts.arguments import Count, Part, arguments_of
from kvcascade.train import run


@dataclasses.dataclass(frozen=True)
class Args:
    """Make a run with fewer KV heads out of a trained one; `kvcascade train --run DIR --resume` then uptrains it."""

    source: Annotated[Path, tyro.conf.Positional]
    """The trained run."""
    kv_heads: Count
    """KV heads of the new run; must divide those of the old one."""
    run: Path
    """Folder of the new run."""
    method: Literal["mean", "first", "random"] = "mean"
    """How the heads of a group become one."""
    share: Part = 0.05
    """Steps of uptraining as a share of the source's (GQA, Ainslie et al. 2023, §3.1)."""


def main(arguments: list[str]) -> None:
    """Convert a run's latest checkpoint into step 0 of a new run."""
    args = arguments_of(Args, "convert", arguments)
    steps = run.convert(args.source, args.run, args.kv_heads, args.method, args.share)
    print(
        f"{args.run} has {args.kv_heads} KV heads; uptrain it ({steps} steps) with: kvcascade train --run {args.run} --resume"
    )
