"""A run's folder: config.json, tokenizer.json, log.jsonl, checkpoints/, and the lock that its one writer holds."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from orbax.checkpoint import v1 as ocp

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.files import write_whole
from kvcascade.model import gpt, tokenizer
from kvcascade.train import config as configs
from kvcascade.train.config import RunConfig

type State = dict[str, Any]
"""params, optimizer: everything that training goes on from, besides the step."""

BEST, LATEST = "best", "latest"
METRIC = "validation_loss"
SUMS = "sha256.json"
WINDOWS = "evaluate_windows"
NOTES = ("tokenizer", "text", "earlier")
"""What stands in config.json besides the settings."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model as evaluation wants it."""

    path: Path
    config: RunConfig
    params: gpt.Params
    encoding: tiktoken.Encoding
    step: int


def check_free(path: Path) -> None:
    """BadInput if a folder holds a run, or what is left of one."""
    if (path / "config.json").exists():
        raise BadInput(f"{path} holds a run already; go on with it by --resume, or name another --run")
    if Checkpoints(path).steps():
        raise BadInput(f"{path} holds checkpoints, but no config.json; name another --run")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Be the one writer of a run's folder, which is made if need be; may be nested. BadInput if another process is writing, or nobody can."""
    lock = filelock.FileLock(path / "lock", blocking=False, is_singleton=True)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise BadInput(f"{path} is being trained by another process; wait for it, or name another --run") from None
    except OSError as error:
        raise BadInput(f"cannot write to {path}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def create(
    path: Path, config: RunConfig, encoding: tiktoken.Encoding, text: str | None, state: State | None = None
) -> None:
    """Make a run's folder with its configuration, its tokeniser and its text's fingerprint (None: not known), and with a state to
    begin from as the checkpoint of step 0.

    config.json comes last, for it makes the folder a run. If anything fails, a folder that was not there before goes again;
    BadInput if it cannot be written, or holds a run already.
    """
    new = not path.exists()
    with writing(path):
        check_free(path)  # another process may have made one since it was asked
        try:
            if state is not None:
                with Saver(path) as saver:
                    saver.save(0, state, None)
            tokenizer.save(encoding, path / "tokenizer.json")
            _write(path, configs.as_dict(config) | {"tokenizer": tokenizer.fingerprint(encoding), "text": text})
        except BaseException as error:
            if new:
                shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, OSError):
                raise BadInput(f"cannot make the run {path}: {error.strerror}") from error
            raise


def open_run(path: Path) -> tuple[RunConfig, tiktoken.Encoding]:
    """Read a run's configuration and tokeniser; BadInput if the folder holds no run, or its tokeniser is not the one it was trained with."""
    content = _read(path)
    encoding = tokenizer.load(path / "tokenizer.json")
    if tokenizer.fingerprint(encoding) != content["tokenizer"]:
        raise BadInput(f"{path} was trained with another tokenizer than the one in its tokenizer.json")
    sections = {name: part for name, part in content.items() if name not in NOTES}
    return configs.from_dict(sections, path / "config.json"), encoding


def text_fingerprint(path: Path) -> str | None:
    """What `data.fingerprint` said of a run's text when the run was made; None for runs that did not note it."""
    return _read(path).get("text")


def change(path: Path, config: RunConfig) -> None:
    """Give a run other settings, from its newest checkpoint on; config.json keeps, as `earlier`, those of training up to there."""
    content = _read(path)
    earlier = {"until_step": max(Checkpoints(path).steps(), default=0), "train": content["train"]}
    with writing(path):
        _write(path, content | configs.as_dict(config) | {"earlier": [*content.get("earlier", []), earlier]})


def _read(path: Path) -> dict[str, Any]:
    """What is in a run's config.json."""
    file = path / "config.json"
    try:
        content = json.loads(file.read_text("utf-8"))
        if not isinstance(content, dict) or "tokenizer" not in content:
            raise ValueError("it names no tokenizer")
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{path} holds no run: there is no config.json in it") from None
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{file} is not a run's configuration, or is damaged ({type(error).__name__}: {error})"
        ) from error
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    write_whole(path / "config.json", (json.dumps(content, indent=2) + "\n").encode())


def read_log(path: Path) -> list[dict]:
    """The lines of a run's log.jsonl, oldest first; a line cut short by a crash is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in (path / "log.jsonl").read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


class Checkpoints:
    """A run's checkpoints, to be read; a training run that is under way is not disturbed."""

    def __init__(self, path: Path):
        self.path = path / "checkpoints"
        logging.getLogger("absl").setLevel(
            logging.CRITICAL
        )  # orbax tells every step of a save, and what it also raises

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        return sorted(int(folder.name) for folder in self.path.glob("*") if folder.name.isdecimal())

    def best(self) -> int | None:
        """The step with the lowest validation loss, on the windows that are used last; the newest where none has one. BadInput if a loss cannot be read."""
        found = {step: metrics for step in self.steps() if (metrics := self._metrics(step)) is not None}
        return _best(found) if found else max(self.steps(), default=None)

    def load(self, step: int, abstract: State) -> State:
        """Read the parts of a checkpoint that `abstract` names, in its shapes; BadInput if it is damaged or of another shape."""
        for part in abstract:
            self._check(step, part)
        folder = str(self.path.resolve() / str(step))
        try:
            found = ocp.checkpointables_metadata(folder).metadata
            if all(_shapes(found[part]) == _shapes(abstract[part]) for part in abstract):
                return ocp.load_checkpointables(folder, dict(abstract))
        except Exception as error:  # orbax raises what its storage raises, of many types
            raise self._unreadable(step, "it is damaged") from error
        raise self._unreadable(step, "it is not of the model that config.json describes")

    def _metrics(self, step: int) -> dict[str, Any] | None:
        file = self.path / str(step) / "metrics" / "metrics"
        if not file.exists():  # saved between two validations, or a process was killed as it deleted this checkpoint
            return None
        self._check(step, "metrics/metrics")
        try:
            found = json.loads(file.read_text("utf-8"))
            return found | {METRIC: float(found[METRIC])}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise self._unreadable(step, "metrics/metrics is damaged") from error

    def _check(self, step: int, part: str) -> None:
        """BadInput if a file of one part of a checkpoint is not what was written.

        Asked before orbax is, which takes some wrong bits for weights, and tells the other damage at length on stderr.
        """
        folder = self.path / str(step)
        try:
            sums = dict(json.loads((folder / SUMS).read_text("utf-8")))
        except FileNotFoundError:
            return  # then orbax has to see for itself
        except (OSError, ValueError, TypeError) as error:
            raise self._unreadable(step, f"{SUMS} is damaged") from error
        for name in sums:
            file = folder / name
            if f"{name}/".startswith(f"{part}/") and not (file.is_file() and _sum(file) == sums[name]):
                raise self._unreadable(step, f"{name} is missing or damaged")

    def _unreadable(self, step: int, reason: str) -> BadInput:
        others = ", ".join(str(other) for other in self.steps() if other != step)
        hint = f"; other checkpoints there: {others}" if others else ""
        return BadInput(f"the checkpoint {self.path / str(step)} cannot be read: {reason}{hint}")


class Saver(Checkpoints):
    """A run's checkpoints, to be written: in the background under a temporary name, the newest two and the best one kept.

    It is the run's one writer: BadInput if there is another. Leaving it as a context waits for what is being written, and turns an
    OSError into BadInput.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.best()  # BadInput now, not at the first save
        context = ocp.Context()
        context.asynchronous.post_finalization_callback = self._write_sums
        self.pending = None
        with contextlib.ExitStack() as locked:
            locked.enter_context(writing(path))
            try:
                for half in self._half_written():
                    shutil.rmtree(half)
                self.checkpointer = ocp.training.Checkpointer(
                    str(self.path.resolve()), context=context, preservation_policy=_Kept()
                )
            except Exception as error:
                raise self.failure(error) from error
            self.locked = locked.pop_all()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        with self.locked:
            try:
                self.wait()
            finally:
                with contextlib.suppress(Exception):
                    self.checkpointer.close()
        if isinstance(error, OSError):  # most likely the disk is full, and log.jsonl met it first
            raise self.failure(error) from error

    def save(self, step: int, state: State, validation_loss: float | None, windows: int = 0) -> None:
        """Start writing a checkpoint once the one before is done, with its loss on so many windows if it has one.

        BadInput if the one before failed, with what is safe named.
        """
        self.wait()
        metrics: dict[str, Any] | None = (
            None if validation_loss is None else {METRIC: validation_loss, WINDOWS: windows}
        )
        try:
            # A copy of the dict, because orbax puts the metrics into the one that it is given.
            self.pending = self.checkpointer.save_checkpointables_async(step, dict(state), force=True, metrics=metrics)
        except Exception as error:
            raise self.failure(error) from error

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete; BadInput if it failed."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:
            raise self.failure(error) from error

    def failure(self, error: Exception) -> BadInput:
        """What to tell the user when writing failed: why, and which checkpoint is safe."""
        text = str(error).strip() or type(error).__name__
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
        reason = "the disk is full" if full else text.splitlines()[0][:160]
        return BadInput(f"cannot write to {self.path.parent}: {reason}; {self.safe()}")

    def safe(self) -> str:
        """The last complete checkpoint, in words."""
        steps = self.steps()
        return f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"

    def _write_sums(self) -> None:
        """Write the sums of a checkpoint's files beside them, just before orbax gives the folder its name."""
        for folder in self._half_written():
            files = (file for part in folder.iterdir() if part.is_dir() for file in part.rglob("*") if file.is_file())
            sums = {file.relative_to(folder).as_posix(): _sum(file) for file in files}
            (folder / SUMS).write_text(json.dumps(sums, indent=0), "utf-8")

    def _half_written(self) -> list[Path]:
        return list(self.path.glob("*.orbax-checkpoint-tmp"))


class _Kept(ocp.training.preservation_policies.PreservationPolicy):
    """The newest two checkpoints and the one with the lowest validation loss."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = sorted(checkpoint.step for checkpoint in checkpoints)[-2:]
        if scored := {checkpoint.step: checkpoint.metrics for checkpoint in checkpoints if checkpoint.metrics}:
            kept.append(_best(scored))
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _best(metrics: dict[int, dict[str, Any]]) -> int:
    """The step with the lowest loss among those validated on as many windows as the newest: others cannot be compared with it."""
    windows = metrics[max(metrics)].get(WINDOWS)
    same = [step for step in sorted(metrics) if metrics[step].get(WINDOWS, windows) == windows]
    return min(same, key=lambda step: metrics[step][METRIC])


def _shapes(tree: Any) -> Counter:
    """How many arrays of each shape there are; orbax does not say which is which in the names that we use."""
    return Counter(leaf.shape for leaf in jax.tree.leaves(tree))


def _sum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def load_run(path: Path, which: str = BEST) -> Run:
    """Load a run's model from its best checkpoint (by validation loss) or its latest; BadInput if anything is missing or damaged."""
    config, encoding = open_run(path)
    checkpoints = Checkpoints(path)
    step = checkpoints.best() if which == BEST else max(checkpoints.steps(), default=None)
    if step is None:
        raise BadInput(f"{path} holds no complete checkpoint yet")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), gpt.graph(config.model)[1])
    params = checkpoints.load(step, {"params": abstract})["params"]
    # Orbax commits arrays to a device. A fresh cache is not, its successor would be: the decode step would be compiled for either.
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
    return Run(path, config, params, encoding, step)
