"""Train a GPT: `kvcascade train --config toy --model.kv-heads 2 --run runs/gqa2`; about 17 minutes per 1,000 steps of `toy` on two cores."""

import argparse
from pathlib import Path

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.scripts import console
from kvcascade.train import checkpoint, config, run
from kvcascade.train.config import RunConfig

DESCRIPTION = """Train a GPT, or go on with a run that was stopped (--resume).

--config NAME|FILE.yaml   what to start from: nano, toy, small, or a file with the sections model, data, train (default: toy)
--run DIR                 the run's folder (default: runs/NAME)
--resume                  go on from the newest checkpoint, with the run's own settings"""


def main(arguments: list[str]) -> None:
    """Parse the flags, make the run's folder or open it, and train to the last step."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config")
    own.add_argument("--run", type=Path)
    own.add_argument("--resume", action="store_true")
    known, rest = own.parse_known_args(arguments)
    preset = config.load(known.config or "toy")
    wanted = tyro.cli(RunConfig, prog="kvcascade train", description=DESCRIPTION, default=preset, args=rest)
    path = known.run or Path("runs") / Path(known.config or "toy").stem
    if not known.resume:
        run.start(path, wanted)
    elif not (path / "config.json").exists():
        raise BadInput(f"{path} holds no run to resume; start one without --resume")
    elif known.config or rest:
        run.check_same(path, wanted)
    steps = checkpoint.open_run(path)[0].train.steps
    with console.training(str(path), steps) as report:
        run.resume(path, report)
    print(f"trained {steps} steps; the run is in {path}")
