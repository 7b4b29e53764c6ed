"""The weights of pretrained models: where each parameter is found in GGUF files and in Hugging Face directories."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from kvcascade.cache.errors import BadInput
from kvcascade.kernels import linear
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.metadata import Metadata

type Report = Callable[[int, int], None]
"""Called with the number of tensors loaded and how many there are."""


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
        """The shape of every tensor by its name."""
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        tensor = self.tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes()[name])
        except (NotImplementedError, ValueError) as error:
            raise BadInput(f"{self.path}: {name} is of the type {tensor.tensor_type.name}: {error}") from error


class Safetensors:
    """The tensors of a directory's *.safetensors; BadInput if a shard is missing or damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        files = _shards(folder / "model.safetensors.index.json")
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
        """The shape of every tensor by its name."""
        return {name: shape for name, (_, shape) in self.files.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        with safetensors.safe_open(self.folder / self.files[name][0], framework="flax") as tensors:
            return np.asarray(tensors.get_tensor(name).astype(jnp.float32))


def _shards(index: Path) -> list[str]:
    """The files that an index names, or the only one where there is no index; BadInput for one that is not beside it."""
    if not index.exists():
        return ["model.safetensors"]
    where = Metadata.read(index).table("weight_map")
    files = sorted({where.text(tensor) for tensor in where})
    if not files:
        raise BadInput(f"{index} lacks weight_map, or it is empty")
    for file in files:
        if Path(file).name != file:
            raise where.bad("", f"names {file!r}, which is no file's name")
    return files


# Weights: our path with * for the layer, and where it is found


def _from_projections(template: str, parts: dict[str, str]) -> dict[str, str]:
    return {
        f"layers.*.{ours}.{leaf}": f"{template.format(theirs)}.{name}"
        for ours, theirs in parts.items()
        for leaf, name in (("weight", "weight"), ("bias", "bias"), ("scale", "weight"))
    }


HUB_LLAMA = (
    {"embed.weight": "model.embed_tokens.weight", "norm.scale": "model.norm.weight", "head.weight": "lm_head.weight"}
    | _from_projections("model.layers.*.self_attn.{}_proj", {f"attention.{x}": x for x in "qkvo"})
    | _from_projections("model.layers.*.self_attn.{}", {"attention.q_norm": "q_norm", "attention.k_norm": "k_norm"})
    | _from_projections("model.layers.*.mlp.{}_proj", {x: x for x in ("gate", "up", "down")})
    | _from_projections(
        "model.layers.*.{}", {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    )
)
HUB_GEMMA = HUB_LLAMA | _from_projections(
    "model.layers.*.{}_layernorm",
    {
        "attention_post_norm": "post_attention",
        "mlp_norm": "pre_feedforward",
        "mlp_post_norm": "post_feedforward",
    },
)
HUB_GPT2 = (
    {"embed.weight": "wte.weight", "position.embedding": "wpe.weight", "head.weight": "lm_head.weight"}
    | {"norm.scale": "ln_f.weight", "norm.bias": "ln_f.bias"}
    | _from_projections("h.*.{}", {"attention_norm": "ln_1", "mlp_norm": "ln_2"})
    | _from_projections("h.*.attn.{}", {f"attention.{x}": "c_attn" for x in "qkv"} | {"attention.o": "c_proj"})
    | _from_projections("h.*.mlp.{}", {"up": "c_fc", "down": "c_proj"})
)
GGUF = (
    {
        "embed.weight": "token_embd.weight",
        "position.embedding": "position_embd.weight",
        "head.weight": "output.weight",
    }
    | {"norm.scale": "output_norm.weight", "norm.bias": "output_norm.bias"}
    | _from_projections("blk.*.{}_norm", {"attention_norm": "attn", "mlp_norm": "ffn"})
    | _from_projections("blk.*.post_{}_norm", {"attention_post_norm": "attention", "mlp_post_norm": "ffw"})
    | _from_projections("blk.*.attn_{}", {f"attention.{x}": x for x in "qkv"} | {"attention.o": "output"})
    | _from_projections("blk.*.attn_{}", {"attention.q_norm": "q_norm", "attention.k_norm": "k_norm"})
    | _from_projections("blk.*.ffn_{}", {x: x for x in ("gate", "up", "down")})
)
GGUF_GPT2 = GGUF | _from_projections("blk.*.attn_{}", {f"attention.{x}": "qkv" for x in "qkv"})

# Tensors that say nothing that the shape does not say already.
IGNORED = re.compile(r"rope_freqs\.weight|.*\.rotary_emb\.inv_freq|.*\.attn\.(masked_)?bias")


def load_params(
    config: ModelConfig,
    source: GGUFFile | Safetensors,
    names: dict[str, str],
    name: str,
    paired_rope: bool,
    report: Report,
) -> Params:
    """Read every parameter of a model, one tensor at a time; BadInput that names what is missing, unexpected or of another shape.

    `paired_rope`: queries and keys are laid out for RoPE that turns neighbours (h, h + 1), as GGUF's llama does, and are put back.
    """
    wanted = leaves(gpt.graph(dataclasses.replace(config, weights="float32"))[1])
    where = _find(wanted, source.shapes(), names, config.tied, name)
    params = {}
    for index, (path, leaf) in enumerate(wanted.items()):
        theirs, folder = where[path], path.rpartition(".")[0]
        array = source.read(theirs)
        if names is HUB_GPT2 and re.search(r"\.c_\w+\.weight", theirs):
            array = array.T  # Conv1D multiplies from the left
        if names is HUB_GEMMA and path.endswith(".scale"):
            array = array + 1  # stored as the difference from 1
        projection = folder.split(".")[-1]
        if re.search(r"c_attn|attn_qkv", theirs) and len(array) % 3 == 0:
            array = np.split(array, 3)["qkv".index(projection)]
        if array.shape != leaf.shape:
            raise BadInput(f"{name}: {theirs} has the shape {array.shape}, not {leaf.shape}")
        if paired_rope and projection in ("q", "k"):
            pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        stored = {path: jnp.asarray(array, leaf.dtype)}
        if path.endswith(".weight"):
            stored = {f"{folder}.{part}": each for part, each in linear.store(stored[path], config.weights).items()}
        for each, value in stored.items():
            put(params, each, value)
        report(index + 1, len(wanted))
    return params


def _find(
    wanted: dict[str, Any], there: dict[str, Any], names: dict[str, str], tied: bool, name: str
) -> dict[str, str]:
    """The tensor that each of our paths is read from; BadInput if one is not there, or another is left."""
    prefix = "transformer." if any(each.startswith("transformer.") for each in there) else ""
    where = {}
    for path in wanted:
        theirs = names[re.sub(r"^layers\.\d+", "layers.*", path)].replace("*", path.split(".")[1], 1)
        where[path] = theirs if theirs.startswith("lm_head") else prefix + theirs
    missing = sorted({*where.values()} - {*there})
    expected = {*where.values()} | ({"lm_head.weight", "output.weight"} if tied else set())
    unexpected = sorted(each for each in {*there} - expected if not IGNORED.fullmatch(each))
    for what, tensors in (("lacks", missing), ("has unexpected", unexpected)):
        if tensors:
            more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
            raise BadInput(f"{name} {what} {', '.join(tensors[:3])}{more}")
    return where


def leaves(tree: dict, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their dotted path."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def put(tree: dict, path: str, value: jax.Array) -> None:
    *folders, last = path.split(".")
    for folder in folders:
        tree = tree.setdefault(int(folder) if folder.isdigit() else folder, {})
    tree[last] = value
