"""A run's folder: config.json, tokenizer.json, log.jsonl and checkpoints/."""

import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import tiktoken
from orbax.checkpoint import v1 as ocp

from kvcascade.cache.errors import BadInput
from kvcascade.cache.files import write_whole
from kvcascade.model import gpt, tokenizer
from kvcascade.train import config as configs
from kvcascade.train.config import RunConfig

type State = dict[str, Any]
"""params, optimizer: everything that training goes on from, besides the step."""

BEST, LATEST = "best", "latest"


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model as evaluation wants it."""

    path: Path
    config: RunConfig
    params: gpt.Params
    encoding: tiktoken.Encoding
    step: int


def create(path: Path, config: RunConfig, encoding: tiktoken.Encoding) -> None:
    """Make a run's folder with its configuration and tokeniser; BadInput if a run is there already."""
    if (path / "config.json").exists():
        raise BadInput(f"{path} holds a run already; go on with it by --resume, or name another --run")
    tokenizer.save(encoding, path / "tokenizer.json")
    content = configs.as_dict(config) | {"tokenizer": tokenizer.fingerprint(encoding)}
    write_whole(path / "config.json", (json.dumps(content, indent=2) + "\n").encode())


def open_run(path: Path) -> tuple[RunConfig, tiktoken.Encoding]:
    """Read a run's configuration and tokeniser; BadInput if the folder holds no run, or its tokeniser is not the one it was trained with."""
    file = path / "config.json"
    try:
        content = json.loads(file.read_text())
        trained_with = content.pop("tokenizer")
    except FileNotFoundError:
        raise BadInput(f"{path} holds no run: there is no config.json in it") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BadInput(
            f"{file} is not a run's configuration, or is damaged ({type(error).__name__}: {error})"
        ) from error
    encoding = tokenizer.load(path / "tokenizer.json")
    if tokenizer.fingerprint(encoding) != trained_with:
        raise BadInput(f"{path} was trained with another tokenizer than the one in its tokenizer.json")
    return configs.from_dict(content, file), encoding


def read_log(path: Path) -> list[dict]:
    """The lines of a run's log.jsonl, oldest first; a last line cut short by a crash is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in (path / "log.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


class Checkpoints:
    """A run's checkpoints: written in the background under a temporary name, the newest two and the best one kept."""

    def __init__(self, path: Path):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every step of a save
        self.path = path / "checkpoints"
        policies = ocp.training.preservation_policies
        keep = [
            policies.LatestN(2),
            policies.BestN(
                get_metric_fn=lambda m: m["validation_loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
        self.checkpointer = ocp.training.Checkpointer(
            self.path.resolve(), preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
        )
        self.pending = None

    def save(self, step: int, state: State, validation_loss: float | None) -> None:
        """Start writing a checkpoint once the one before is done; BadInput if that one failed, with what is safe named."""
        self.wait()
        metrics = None if validation_loss is None else {"validation_loss": validation_loss}
        try:
            self.pending = self.checkpointer.save_checkpointables_async(step, state, force=True, metrics=metrics)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:  # orbax raises what its storage raises, of many types
            raise self._failed(error) from error

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        return sorted(checkpoint.step for checkpoint in self.checkpointer.checkpoints)

    def best(self) -> int | None:
        """The step with the lowest validation loss; the newest where none has one."""
        scored = [c for c in self.checkpointer.checkpoints if c.metrics]
        if scored:
            return min(scored, key=lambda c: c.metrics["validation_loss"]).step
        return max(self.steps(), default=None)

    def load(self, step: int, abstract: State) -> State:
        """Read the parts of a checkpoint that `abstract` names, in its shapes; BadInput if it is damaged or of another shape."""
        try:
            return self.checkpointer.load_checkpointables(step, abstract)
        except Exception as error:
            others = [str(s) for s in self.steps() if s != step]
            hint = f"; also there: {', '.join(others)}" if others else ""
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            raise BadInput(f"{self.path}: the checkpoint of step {step} cannot be read ({reason}){hint}") from error

    def close(self) -> None:
        """Wait for what is being written, and release orbax's threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):
                self.checkpointer.close()

    def _failed(self, error: Exception) -> BadInput:
        text = str(error)
        full = "No space left" in text or "Errno 28" in text
        reason = (
            "the disk is full" if full else text.strip().splitlines()[0][:160] if text.strip() else type(error).__name__
        )
        kept = self.steps()
        safe = f"the checkpoint of step {kept[-1]} is safe" if kept else "no checkpoint was written yet"
        return BadInput(f"cannot save to {self.path}: {reason}; {safe}")


def load_run(path: Path, which: str = BEST) -> Run:
    """Load a run's model from its best checkpoint (by validation loss) or its latest; BadInput if anything is missing or damaged."""
    config, encoding = open_run(path)
    if not (path / "checkpoints").is_dir():
        raise BadInput(f"{path} holds no checkpoint yet")
    checkpoints = Checkpoints(path)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise BadInput(f"{path} holds no complete checkpoint")
        step = checkpoints.best() if which == BEST else steps[-1]
        assert step is not None
        _, abstract = gpt.graph(config.model)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
        state = checkpoints.load(step, {"params": abstract})
    finally:
        checkpoints.close()
    return Run(path, config, state["params"], encoding, step)
