"""A model in four bits as a directory that Hugging Face's libraries, and `pretrained.load`, read: GPTQ's format."""

import json
import secrets
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy

from kvcascade.cache.errors import BadInput
from kvcascade.model.config import ModelConfig
from kvcascade.model.pretrained import Model
from kvcascade.model.rounding import Rounded
from kvcascade.model.vocabulary import FileTokenizer
from kvcascade.model.weights import HUB_LLAMA, leaves


def write(folder: Path, model: Model, codes: dict[str, Rounded], group: int) -> int:
    """Write a model whose layers' matrices have these codes, whole or not at all; return the bytes of its weights.

    Raises BadInput where something is there already, and for a model that is not of Llama's kind.
    """
    if folder.exists():
        raise BadInput(f"{folder} is there already")
    config = hub_config(model.config, model.name) | {
        "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": False, "checkpoint_format": "gptq",
        }
    }  # fmt: skip
    tensors = {}
    for path, array in leaves(model.params).items():
        stem, leaf = path.rpartition(".")[::2]
        layer = path.split(".")[1]
        theirs = HUB_LLAMA[path.replace(f"layers.{layer}.", "layers.*.", 1)].replace("*", layer, 1)
        if leaf == "weight" and stem in codes:
            tensors |= packed(theirs.removesuffix(".weight"), codes[stem], group)
        else:
            tensors[theirs] = np.asarray(array).astype(np.float16)
    # What safetensors is given must lie in C order: it writes the memory as it is.
    content = safetensors.numpy.save(
        {name: np.ascontiguousarray(each) for name, each in tensors.items()}, {"format": "pt"}
    )
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        (temporary / "model.safetensors").write_bytes(content)
        files = {"config.json": config, "generation_config.json": {"eos_token_id": sorted(model.end)}} | _texts(model)
        for name, each in files.items():
            (temporary / name).write_text(each if isinstance(each, str) else json.dumps(each, indent=1), "utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(content)


def packed(stem: str, rounded: Rounded, group: int) -> dict[str, np.ndarray]:
    """A matrix as GPTQ keeps it: codes of inputs, and zeros, less by one, of outputs in words of 32 bits from the lowest bits on."""
    words = lambda codes: (codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, 8) << np.arange(0, 32, 4, dtype=np.uint32)).sum(
        -1, dtype=np.uint32
    )  # fmt: skip
    I = rounded.codes_OI.shape[1]
    return {
        f"{stem}.qweight": words(rounded.codes_OI).T.view(np.int32),
        f"{stem}.qzeros": words(rounded.zero_OG.T - 1).view(np.int32),
        f"{stem}.scales": rounded.scale_OG.T.astype(np.float16),
        f"{stem}.g_idx": (np.arange(I) // group).astype(np.int32),
    }


def hub_config(config: ModelConfig, name: str) -> dict:
    """The config.json of a model of Llama's kind; BadInput for others."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.biases == "qkv" else "mistral" if config.window else "llama"
    plain = (config.norm, config.activation, config.positions) == ("rms", "swiglu", "rope")
    unlike = (
        config.unlike or config.post_norms or config.rope_width or config.rope_scale != 1 or config.rope_long_factors
    )
    if not plain or unlike or config.biases == "all" or config.experts or len({*config.rope_factors}) > 1:
        raise BadInput(f"{name} is not of Llama's kind, and cannot be written")
    linear = (
        {"rope_type": "linear", "factor": config.rope_factors[0]} if config.rope_factors else {"rope_type": "default"}
    )
    return {
        "model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"], "vocab_size": config.vocab, "hidden_size": config.width,
        "intermediate_size": config.mlp, "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps, "hidden_act": "silu", "rope_parameters": linear | {"rope_theta": config.rope_base},
        "tie_word_embeddings": config.tied, "torch_dtype": "float16",
    } | ({"sliding_window": config.window} if config.window else {})  # fmt: skip


def _texts(model: Model) -> dict[str, str | dict]:
    """tokenizer.json and tokenizer_config.json."""
    if not isinstance(model.encoding, FileTokenizer):
        raise BadInput(f"{model.name} is a run; only pretrained models are written")
    special = {key: text for key, text in model.special.items() if isinstance(text, str)}
    template = {"chat_template": model.chat_template} if model.chat_template else {}
    if isinstance(model.chat_template, dict):
        template = {"chat_template": [{"name": name, "template": each} for name, each in model.chat_template.items()]}
    return {"tokenizer.json": model.encoding.written(model.before), "tokenizer_config.json": special | template}
