"""Train a GPT: `kvcascade train --config toy --model.kv-heads 2 --run runs/gqa2`; about 17 minutes per 1,000 steps of `toy` on two cores."""

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.scripts import console
from kvcascade.scripts.arguments import arguments_of
from kvcascade.train import checkpoint, config, run
from kvcascade.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Args:
    """Train a GPT, or go on with a run that was stopped."""

    settings: Annotated[RunConfig, tyro.conf.arg(name="")]
    config: str = "toy"
    """What to start from: nano, toy, small, or FILE.yaml with the sections model, data and train."""
    run: Path | None = None
    """The run's folder; by default runs/ and the name of the configuration."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on from the newest checkpoint, with the run's own settings."""


def main(arguments: list[str]) -> None:
    """Parse the flags, make the run's folder or open it, and train to the last step."""
    args = _parse(arguments)
    path = args.run or Path("runs") / Path(args.config).stem
    if args.resume:
        run.check_same(path, args.settings)
    else:
        run.start(path, args.settings)
    with console.training(str(path), args.settings.train.steps) as report:
        run.resume(path, report)
    print(f"trained {args.settings.train.steps} steps; the run is in {path}")


def _parse(arguments: list[str]) -> Args:
    """Look for what to start from first, because the other flags change that."""
    first = argparse.ArgumentParser("kvcascade train", add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?")
    first.add_argument("--run", nargs="?", type=Path)
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(arguments)
    path = known.run or Path("runs") / Path(known.config or "toy").stem
    if known.resume and not (path / "config.json").exists():
        raise BadInput(f"{path} holds no run to resume; start one without --resume")
    base = checkpoint.open_run(path)[0] if known.resume and not known.config else config.load(known.config or "toy")
    return arguments_of(Args, "train", arguments, Args(base, known.config or "toy"))
