"""Pretrained models from GGUF files and Hugging Face directories: their shape, their weights, their tokeniser."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvcascade.cache import calibration
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.model import kept, quantised, shapes, texts
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.metadata import Metadata
from kvcascade.model.places import is_pretrained as is_pretrained
from kvcascade.model.places import locate
from kvcascade.model.tensors import GGUFFile
from kvcascade.model.tokenizer import Tokenizer
from kvcascade.model.weights import (
    GGUF,
    GGUF_NAMES,
    HUB_LLAMA,
    HUB_NAMES,
    Report,
    load_params,
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to be run: what evaluation and generation need."""

    name: str
    config: ModelConfig
    params: Params
    encoding: Tokenizer
    chat_template: str | dict[str, str] | None = None
    """jinja2 source of the text that a list of messages becomes, or several by their names."""
    special: dict[str, str | list[str]] = dataclasses.field(default_factory=dict)
    """Texts of `bos_token`, `eos_token` and so on, by these names, where the model has them: a template may write them."""
    before: tuple[int, ...] = ()
    """Tokens that a text begins with, as its tokeniser says: BOS, or none."""
    after: tuple[int, ...] = ()
    """Tokens that a whole text ends with, as its tokeniser says: mostly none."""
    bos: int | None = None
    """The token that a text may begin with, also where the tokeniser puts none."""
    end: frozenset[int] = frozenset()
    """Tokens that end a text or an answer."""
    data: str = "stdlib"
    """The text that it is evaluated on where none is named."""
    trained_on: str | None = None
    """The fingerprint of `data` where it was trained on that, empty if it was not noted; None where it is not known what it was trained on."""
    seed: int = 0

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells its weights from others, whatever they are called."""
        found = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(self.params):
            content = np.ascontiguousarray(leaf)
            found.update(f"{jax.tree_util.keystr(path)} {content.dtype} {content.shape}".encode())
            found.update(content.view(np.uint8).data)
        return found.hexdigest()[:16]

    @functools.cached_property
    def identity(self) -> str:
        """What tells the model from others, whatever its matrices are kept in: of its norms, rounded to bf16."""
        found = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(self.params):
            if "norm" in jax.tree_util.keystr(path):
                found.update(np.asarray(leaf).astype(jnp.bfloat16).tobytes())
        return found.hexdigest()[:16]

    def check(self, spec: CacheSpec) -> None:
        """BadInput for a cache that is not for this model, or is calibrated for another."""
        spec.groups(self.config.layer_heads)
        if spec.calibration and calibration.read(spec.calibration).about.get("model_key") != self.identity:
            raise BadInput(f"the calibration {spec.calibration} is of another model than {self.name}")

    def encode(self, text: str) -> list[int]:
        """The tokens of a whole text, with what its tokeniser puts before and after one."""
        return [*self.before, *self.encoding.encode(text, disallowed_special=()), *self.after]

    def begins_with_bos(self, wanted: Literal["auto", "yes", "no"]) -> bool:
        """Whether windows of a text begin with BOS: as the tokeniser says, or as is wanted; BadInput where there is none."""
        if wanted == "yes" and self.bos is None:
            raise BadInput(f"{self.name} has no BOS token that a text could begin with")
        return wanted == "yes" or (wanted == "auto" and self.bos in self.before)


def load(name: str, report: Report = lambda done, of: None, weights: str = "float32") -> Model:
    """Load a model by any name that `locate` takes: GGUF, or config.json and *.safetensors.

    Architectures: llama (SmolLM2, Llama 2 and 3), mistral, qwen2, qwen3, gemma2, gemma3 (text), smollm3, phi3, mixtral, qwen3_moe, gpt2. `weights` says
    what matrices are kept in: float32, bfloat16, int8 or int4. Raises BadInput where there is no such model, or its files are incomplete, damaged
    or of another architecture. What had to be converted is kept in the user's cache, up to 8 GiB, and mapped from there the next time.
    """
    path = locate(name)
    read = _load_directory if path.is_dir() else _load_gguf
    return dataclasses.replace(kept.load(path, weights, report, lambda: read(name, path, weights, report)), name=name)


def shape(name: str) -> ModelConfig:
    """The shape of what `load` takes, without reading its weights; BadInput as there."""
    path = locate(name, shape=True)
    return _of_directory(name, path) if path.is_dir() else _of_gguf(GGUFFile(path), path)


def _of_gguf(file: GGUFFile, path: Path) -> ModelConfig:
    config = shapes.from_gguf(file.fields, file.shapes(), str(path))
    tensors = {"freqs": "rope_factors", "factors_short": "rope_factors", "factors_long": "rope_long_factors"}
    for theirs, ours in tensors.items():
        if (tensor := f"rope_{theirs}.weight") in file.tensors:
            config = dataclasses.replace(config, **{ours: tuple(float(x) for x in file.read(tensor).ravel())})
    return config


def _of_directory(name: str, folder: Path) -> ModelConfig:
    return shapes.from_hub(Metadata.read(folder / "config.json").content, name)


def _load_gguf(name: str, path: Path, weights: str, report: Report) -> Model:
    file = GGUFFile(path)
    config = dataclasses.replace(_of_gguf(file, path), weights=weights)
    about_text = texts.from_gguf(file.fields, str(path), config.vocab)
    kind = file.fields["general.architecture"]
    names = GGUF_NAMES.get(kind, GGUF)
    params = load_params(config, file, names, str(path), kind in ("llama", "smollm3"), report)
    return Model(name, config, params, **vars(about_text))


def _load_directory(name: str, folder: Path, weights: str, report: Report) -> Model:
    config = dataclasses.replace(_of_directory(name, folder), weights=weights)
    about_text = texts.from_directory(folder, Metadata.read(folder / "config.json"), config.vocab)
    said = Metadata.read(folder / "config.json")
    names = HUB_NAMES.get(said.text("model_type"), HUB_LLAMA)
    tensors = quantised.opened(folder, said.content)
    params = load_params(config, tensors, names, name, False, report)
    return Model(name, config, params, **vars(about_text))
