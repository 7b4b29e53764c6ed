"""Train a GPT: `kvcascade train --config toy --model.kv-heads 2 --run runs/gqa2`; about 17 minutes per 1,000 steps of `toy` on two cores."""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.scripts import console
from kvcascade.scripts.arguments import arguments_of
from kvcascade.train import checkpoint, config, run, tracking
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
    """Go on from the newest checkpoint, with the run's own settings. More steps may be asked for, by a number or as --train.steps 2x (which
    doubles them each time that it is said), and other intervals between checkpoints, validations and lines; the learning rate then follows the
    schedule of the new length, so it jumps up."""
    track: Annotated[tuple[Literal["tensorboard", "wandb"], ...], tyro.conf.UseAppendAction] = ()
    """Where the numbers of log.jsonl go as well; give it several times for several."""


def main(arguments: list[str]) -> None:
    """Parse the flags, make the run's folder or open it, and train to the last step."""
    args = _parse(arguments)
    path = args.run or Path("runs") / Path(args.config).stem
    tracking.check(args.track)
    if not args.resume:
        run.start(path, args.settings)
    with console.training(str(path), args.settings.train.steps) as report:
        run.resume(path, report, args.settings, args.track)
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
    return arguments_of(Args, "train", _in_steps(arguments, base.train.steps), Args(base, known.config or "toy"))


def _in_steps(arguments: list[str], steps: int) -> list[str]:
    """The same with `2x` after --train.steps replaced by twice as many as there are."""
    found = []
    for before, each in zip(["", *arguments], arguments, strict=False):
        times = re.fullmatch(r"(--train\.steps=)?(\d+(?:\.\d+)?)x", each)
        if times and (times[1] or before == "--train.steps"):
            each = f"{times[1] or ''}{round(float(times[2]) * steps)}"
        found.append(each)
    return found
