"""What a training run is told, and the named settings that it starts from."""

import dataclasses
import difflib
import math
import os
from pathlib import Path

import yaml

from kvcascade.cache.errors import BadInput
from kvcascade.model.config import ModelConfig, built


def located(source: str) -> str:
    """A text's name as it is valid in every folder: of `file:PATH` the absolute path."""
    if not source.startswith("file:"):
        return source
    return f"file:{os.path.abspath(Path(source.removeprefix('file:')).expanduser())}"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens; the model's `vocab` is the tokeniser's size."""

    source: str = "stdlib"
    """stdlib, file:PATH, or a Hugging Face data set such as wikitext-2."""
    tokenizer: str = "bpe"
    """bpe (trained on the corpus, so a run needs no network), gpt2, or bytes."""

    def __post_init__(self):
        object.__setattr__(self, "source", located(self.source))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """AdamW with linear warm-up and cosine decay."""

    steps: int = 1000
    batch_size: int = 8
    """Windows per step."""
    accumulation: int = 1
    """Microbatches that a step's batch is cut into, to save memory."""
    learning_rate: float = 2e-3
    warmup: int = 50
    """Steps from 0 to the full learning rate."""
    final: float = 0.1
    """The last learning rate as a share of the full one."""
    weight_decay: float = 0.1
    """On matrices only."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    evaluate_every: int = 100
    """Steps between validation losses."""
    evaluate_windows: int = 32
    """Windows of the validation text, always the first ones."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    checkpoint_minutes: float = 10.0
    """Minutes after which a checkpoint is written in any case, so that no more is lost; 0: by steps alone."""
    log_every: int = 10
    seed: int = 0

    def __post_init__(self):
        counts = ("steps", "batch_size", "accumulation", "evaluate_every", "evaluate_windows", "checkpoint_every")
        for name in (*counts, "log_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"train.{name} is {getattr(self, name)}; it must be above 0 and finite")
        for name in ("warmup", "weight_decay", "final", "checkpoint_minutes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"train.{name} is {getattr(self, name)}; it must be at least 0 and finite")
        if not 0 <= self.seed < 2**31:
            raise BadInput(f"train.seed is {self.seed}; it must be at least 0 and below 2^31")
        if self.batch_size % self.accumulation:
            raise BadInput(f"train.accumulation {self.accumulation} must divide train.batch-size {self.batch_size}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that a run's result depends on."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self):
        if self.model.weights != "float32":
            raise BadInput(f"model.weights is {self.model.weights}; a model is trained in float32")


# nano: tests, seconds. toy: the demo, minutes on two cores. small: GPT-2 small's shape.
PRESETS = {
    "nano": RunConfig(
        ModelConfig(layers=2, width=64, heads=4, kv_heads=4, mlp=128, vocab=512, context=128),
        train=TrainConfig(
            steps=60, batch_size=8, warmup=10, evaluate_every=20, evaluate_windows=16, checkpoint_every=20
        ),
    ),
    "toy": RunConfig(),
    "small": RunConfig(
        ModelConfig(layers=12, width=768, heads=12, kv_heads=12, mlp=3072, vocab=50257, context=1024, dtype="bfloat16"),
        DataConfig("wikitext-103", "gpt2"),
        TrainConfig(
            steps=20_000,
            batch_size=64,
            accumulation=4,
            learning_rate=6e-4,
            warmup=500,
            evaluate_every=500,
            checkpoint_every=500,
        ),
    ),
}


def as_dict(config: RunConfig) -> dict[str, dict]:
    """The configuration as nested dicts, which `from_dict` reads back."""
    return dataclasses.asdict(config)


def from_dict(content: object, source: Path | str) -> RunConfig:
    """Build a configuration from nested dicts; a missing field keeps its default, an unknown one is BadInput naming `source`."""
    parts: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
        raise BadInput(f"{source}: a configuration has the sections {', '.join(parts)}")
    for name in content:
        if name not in parts:
            raise BadInput(f"{source}: unknown section {name!r}; there are {', '.join(parts)}")
    return RunConfig(**{name: built(cls, content.get(name, {}), source, name) for name, cls in parts.items()})


def load(name: str) -> RunConfig:
    """A preset by name, or a YAML file with the sections model, data and train; BadInput if it is neither."""
    if name in PRESETS:
        return PRESETS[name]
    file = Path(name)
    if file.suffix in (".yaml", ".yml"):
        try:
            content = yaml.safe_load(file.read_text("utf-8"))
            return from_dict({} if content is None else content, file)
        except OSError as error:
            raise BadInput(f"{name}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadInput(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(PRESETS)}, or FILE.yaml"
    raise BadInput(f"no preset {name!r}{hint}")


MAY_CHANGE = ("steps", "evaluate_every", "evaluate_windows", "checkpoint_every", "checkpoint_minutes", "log_every")
"""Settings of training that a run may be given anew when it goes on; of steps only more."""


def may_become(found: RunConfig, wanted: RunConfig) -> bool:
    """Whether a run may go on with other settings: only some of training differ, and where its text is, and the steps are no fewer."""
    new = {name: getattr(wanted.train, name) for name in MAY_CHANGE}
    data = dataclasses.replace(found.data, source=wanted.data.source)
    with_new = dataclasses.replace(found, data=data, train=dataclasses.replace(found.train, **new))
    return with_new == wanted and wanted.train.steps >= found.train.steps


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """The settings in which two configurations differ, as `model.kv_heads: 8 and 2`."""
    found = []
    for part in ("model", "data", "train"):
        left, right = dataclasses.asdict(getattr(a, part)), dataclasses.asdict(getattr(b, part))
        found += [f"{part}.{key}: {left[key]} and {right[key]}" for key in left if left[key] != right[key]]
    return found
