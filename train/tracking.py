"""Where the numbers of a training run go: log.jsonl in its folder always, TensorBoard and Weights & Biases where asked for."""

import dataclasses
import importlib
import importlib.util
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.files import write_whole
from kvcascade.train.checkpoint import read_log
from kvcascade.train.config import RunConfig


@runtime_checkable
class Tracker(Protocol):
    """Takes the numbers of a run as they come, with the steps that they are of, in ascending order."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Take some numbers of a step."""
        ...

    def close(self) -> None:
        """Take no more of them."""
        ...


class JsonLines:
    """A run's log.jsonl, continued after step `done`: what was written of later steps is dropped."""

    def __init__(self, path: Path, done: int):
        self.file = path / "log.jsonl"
        self.kept = [line for line in read_log(path) if line["step"] <= done]
        write_whole(self.file, "".join(json.dumps(line) + "\n" for line in self.kept).encode())

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files in the run's folder `tensorboard`; those of steps after `done` are hidden by what comes."""

    def __init__(self, path: Path, config: RunConfig, done: int):
        writer, folder = importlib.import_module("tensorboardX").SummaryWriter, path / "tensorboard"
        before = (
            len([*folder.iterdir()]) if folder.exists() else 0
        )  # a name is a second's, and is written anew if it is there
        self.writer = writer(str(folder), purge_step=done + 1, filename_suffix=f".{before:04}")

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project `kvcascade`, gone on with by the id in the run's folder; it keeps what it has of steps that are done again."""

    def __init__(self, path: Path, config: RunConfig, done: int):
        file = path / "wandb_id"
        if not file.exists():
            write_whole(file, secrets.token_hex(8).encode())
        self.run = importlib.import_module("wandb").init(
            project="kvcascade",
            name=path.name,
            id=file.read_text("utf-8"),
            resume="allow",
            dir=str(path),
            config=dataclasses.asdict(config),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": (TensorBoard, "tensorboardX"), "wandb": (WeightsAndBiases, "wandb")}
"""What each is called, and the package that it takes."""


def check(names: Sequence[str]) -> None:
    """BadInput if the package of a tracker is not installed."""
    for name in names:
        package = TRACKERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise BadInput(f"--track {name} takes the package {package}: pip install 'kvcascade[{name}]'")


def begin(names: Sequence[str], path: Path, config: RunConfig, done: int) -> list[Tracker]:
    """The trackers of a run that goes on after step `done`; BadInput if the package of one is not installed."""
    check(names)
    return [TRACKERS[name][0](path, config, done) for name in dict.fromkeys(names)]
