"""The weights of pretrained models: where each parameter is found in GGUF files and in Hugging Face directories."""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvcascade.cache.errors import BadInput
from kvcascade.kernels import linear
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.linear import filled, head_weights
from kvcascade.model.quantised import Quantised
from kvcascade.model.tensors import GGUFFile, Safetensors

type Report = Callable[[int, int], None]
"""Called with the number of tensors loaded and how many there are."""


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
HUB_PHI3 = (
    HUB_LLAMA
    | _from_projections("model.layers.*.self_attn.{}_proj", {f"attention.{x}": "qkv" for x in "qkv"})
    | _from_projections("model.layers.*.mlp.{}_proj", {x: "gate_up" for x in ("gate", "up")})
)
HUB_MIXTRAL, HUB_QWEN3_MOE = (
    HUB_LLAMA
    | _from_projections(f"model.layers.*.{folder}.{{}}", {"experts.router": "gate"})
    | _from_projections(f"model.layers.*.{folder}.experts.#.{{}}", {f"experts.{x}": part[x] for x in part})
    for folder, part in (
        ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
        ("mlp", {x: f"{x}_proj" for x in ("gate", "up", "down")}),
    )
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
    | _from_projections("blk.*.ffn_{}", {f"experts.{x}": f"{x}_exps" for x in ("gate", "up", "down")})
    | _from_projections("blk.*.ffn_{}", {"experts.router": "gate_inp"})
)
GGUF_GPT2 = GGUF | _from_projections("blk.*.attn_{}", {f"attention.{x}": "qkv" for x in "qkv"})

GGUF_PHI3 = GGUF_GPT2 | _from_projections("blk.*.ffn_{}", {x: "up" for x in ("gate", "up")})
HUB_NAMES = {"gpt2": HUB_GPT2, "gemma2": HUB_GEMMA, "gemma3_text": HUB_GEMMA, "phi3": HUB_PHI3}
HUB_NAMES |= {"mixtral": HUB_MIXTRAL, "qwen3_moe": HUB_QWEN3_MOE}
"""By config.json's model_type, where they are not those of Llama."""
GGUF_NAMES = {"gpt2": GGUF_GPT2, "phi3": GGUF_PHI3}
"""By general.architecture, where they are not GGUF's usual ones."""
PARTS = ("attention.q", "attention.k", "attention.v", "gate", "up")
"""Projections that may be in one tensor, in the order in which they follow each other there."""

# Tensors that say nothing that the shape does not say already.
IGNORED = re.compile(
    r"rope_(freqs|factors_long|factors_short)\.weight|.*\.rotary_emb\.inv_freq|.*\.attn\.(masked_)?bias"
)


def load_params(
    config: ModelConfig,
    source: GGUFFile | Safetensors | Quantised,
    names: dict[str, str],
    name: str,
    paired_rope: bool,
    report: Report,
) -> Params:
    """Read every parameter of a model, one tensor at a time; BadInput that names what is missing, unexpected or of another shape.

    `paired_rope`: queries and keys are laid out for RoPE that turns neighbours (h, h + 1), as GGUF's llama does, and are put back.
    For int4 a matrix that is there in four bits is kept as it is, what else such a file has in int8.
    """
    there = source.shapes()
    if config.layers > len(there):
        raise BadInput(f"{name} says that it has {config.layers:,} layers, and has {len(there)} tensors")
    wanted = leaves(gpt.graph(dataclasses.replace(config, weights="float32"))[1])
    where = _find(wanted, there, names, config, name)
    params, shared = {}, collections.defaultdict(list)
    for path in wanted:
        shared[where[path]].append(path)
    for index, (path, leaf) in enumerate(wanted.items()):
        theirs, folder = where[path], path.rpartition(".")[0]
        weights = head_weights(config) if folder in ("embed", "head") else config.weights
        part = _part(path)
        together = [other for other in shared[theirs] if other != path]
        before = sum(wanted[o].shape[0] for o in together if PARTS.index(_part(o)) < PARTS.index(part))
        take = functools.partial(_rows, config, part, paired_rope, before, leaf.shape[0] if together else 0)
        pieces = _each(theirs, config)
        matrix = _packed(source, pieces) if weights == "int4" and path.endswith(".weight") else None
        array = None
        if matrix is not None:
            rows = take(len(matrix["weight"]))
            matrix = {part: each if part == "order" else each[rows] for part, each in matrix.items()}
            shape = len(matrix["weight"]), there[pieces[0]][-1]
        else:
            # Experts stand one below the other, each in a tensor of its own or all in one.
            array = np.concatenate([source.read(each) for each in pieces]) if len(pieces) > 1 else source.read(theirs)
            array = array.reshape(-1, array.shape[-1]) if array.ndim == 3 else array
            if names is HUB_GPT2 and re.search(r"\.c_\w+\.weight", theirs):
                array = array.T  # Conv1D multiplies from the left
            if names is HUB_GEMMA and path.endswith(".scale"):
                array = array + 1  # stored as the difference from 1
            array = array[take(len(array))]
            shape = array.shape
        if shape != leaf.shape:
            raise BadInput(f"{name}: {theirs} has the shape {shape}, not {leaf.shape}")
        if path.endswith(".router.weight"):
            weights, matrix = "float32", None
        if not path.endswith(".weight"):
            put(params, path, jnp.asarray(array, leaf.dtype))
        else:
            kind = "int8" if weights == "int4" and source.has_int4 else weights
            matrix = matrix or linear.store(jnp.asarray(array, leaf.dtype), kind)
            for part, each in (filled(matrix) if weights == "int4" else matrix).items():
                put(params, f"{folder}.{part}", each)
        report(index + 1, len(wanted))
    return params


def _each(theirs: str, config: ModelConfig) -> list[str]:
    """The tensors that a name stands for: with `#` one per expert."""
    return [theirs.replace("#", str(index)) for index in range(config.experts)] if "#" in theirs else [theirs]


def _packed(source: GGUFFile | Safetensors | Quantised, pieces: list[str]) -> linear.Matrix | None:
    """A matrix that is there in four bits as it is, or None."""
    found = [source.packed(each) for each in pieces]
    if len(found) == 1:
        return found[0]
    whole = [each for each in found if each is not None and "order" not in each]
    if len(whole) < len(found):
        return None
    return {part: jnp.concatenate([each[part] for each in whole]) for part in whole[0]}


def _part(path: str) -> str:
    """The projection that a path belongs to, whatever its layer."""
    return re.sub(r"^layers\.\d+\.", "", path).rpartition(".")[0]


def _rows(config: ModelConfig, part: str, paired_rope: bool, first: int, count: int, there: int) -> slice | np.ndarray:
    """Which rows of a tensor of so many are ours, in which order: `count` from `first` on, or all; queries' and keys' as RoPE pairs them here."""
    count, H, W = count or there, config.head_dim, config.rope_width
    if part not in ("attention.q", "attention.k") or count % H or not (paired_rope or W):
        return slice(first, first + count)
    channels = np.arange(H)
    if paired_rope:
        channels = channels.reshape(-1, 2).T.reshape(-1)
    else:  # halves of what is turned, and then of what is not
        channels = np.concatenate([channels[:W].reshape(2, -1), channels[W:].reshape(2, -1)], 1).reshape(-1)
    return first + (np.arange(0, count, H)[:, None] + channels).reshape(-1)


def _find(
    wanted: dict[str, Any], there: dict[str, Any], names: dict[str, str], config: ModelConfig, name: str
) -> dict[str, str]:
    """The tensor that each of our paths is read from; BadInput if one is not there, or another is left."""
    prefix = "transformer." if any(each.startswith("transformer.") for each in there) else ""
    where = {}
    for path in wanted:
        theirs = names[re.sub(r"^layers\.\d+", "layers.*", path)].replace("*", path.split(".")[1], 1)
        where[path] = theirs if theirs.startswith("lm_head") else prefix + theirs
    needed = {each for theirs in where.values() for each in _each(theirs, config)}
    missing = sorted(needed - {*there})
    expected = needed | ({"lm_head.weight", "output.weight"} if config.tied else set())
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
