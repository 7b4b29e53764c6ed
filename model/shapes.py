"""The shape of a pretrained model, from what its files tell of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from kvcascade.cache.errors import BadInput
from kvcascade.model.config import ModelConfig, by_layer

GGUF_KINDS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2")
HUB_KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2")


def from_gguf(fields: dict[str, Any], tensors: dict[str, tuple[int, ...]], source: str) -> ModelConfig:
    """The shape that a GGUF's metadata tells; BadInput for another architecture, or one with parts that are not implemented."""
    kind = fields.get("general.architecture")
    if kind not in GGUF_KINDS:
        raise BadInput(f"{source} is a model of the architecture {kind!r}; there are {', '.join(GGUF_KINDS)}")

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
    layer_norm, gemma = kind == "gpt2", kind.startswith("gemma")
    config = ModelConfig(
        layers=get("block_count"),
        width=width,
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        mlp=get("feed_forward_length"),
        vocab=tensors.get("token_embd.weight", (0,))[0],
        context=get("context_length"),
        activation="gelu" if layer_norm else "geglu" if gemma else "swiglu",
        positions="learned" if layer_norm else "rope",
        rope_base=float(get("rope.freq_base", 10_000.0)),
        rope_factors=factors,
        head_width=head_dim,
        norm="layer" if layer_norm else "rms",
        norm_eps=get("attention.layer_norm_epsilon" if layer_norm else "attention.layer_norm_rms_epsilon"),
        qk_norm=kind in ("qwen3", "gemma3"),
        post_norms=gemma,
        biases={"gpt2": "all", "qwen2": "qkv"}.get(kind, "none"),
        tied="output.weight" not in tensors,
        scaled_embedding=gemma,
        final_soft_cap=fields.get(f"{kind}.final_logit_softcapping", 0.0),
        window=get("attention.sliding_window", 0),
        soft_cap=fields.get(f"{kind}.attn_logit_softcapping", 0.0),
    )
    if not gemma:
        return config
    # Where the file does not say it, the query's scale is that of the published models: another one for those of 27 billion parameters.
    scalar = width // heads if config.layers in (46, 62) else head_dim
    config = dataclasses.replace(config, attention_scale=get("attention.scale", scalar**-0.5))
    everything, local = {"window": 0}, {}
    if kind == "gemma3":
        local = {"rope_base": float(get("rope.freq_base_swa", 10_000.0)), "rope_factors": ()}
    period = get("attention.sliding_window_pattern", {"gemma2": 2, "gemma3": 6}[kind])
    return by_layer(config, [local if (index + 1) % period else everything for index in range(config.layers)])


def from_hub(content: dict[str, Any], source: str) -> ModelConfig:
    """The shape that a Hugging Face config.json tells; BadInput for another architecture, or one with parts that are not implemented."""
    kind = content.get("model_type")
    if kind not in HUB_KINDS:
        raise BadInput(f"{source} is a model of the architecture {kind!r}; there are {', '.join(HUB_KINDS)}")

    def get(key: str, default: Any = None) -> Any:
        value = content.get(key)
        value = default if value is None else value
        if value is None:
            raise BadInput(f"{source}/config.json lacks {key}")
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
    if kind in ("gemma2", "gemma3_text"):
        return _gemma(kind, content, get, source)
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


def _gemma(kind: str, content: dict[str, Any], get: Callable[..., Any], source: str) -> ModelConfig:
    """Gemma 2 and 3: some layers see a window and some everything, in Gemma 3 with a RoPE of their own."""
    gelu = get("hidden_activation", "gelu_pytorch_tanh")
    _refuse(source, f"the activation {gelu}", gelu != "gelu_pytorch_tanh")
    _refuse(source, "attention_bias", content.get("attention_bias"))
    _refuse(source, "attention in both directions", content.get("use_bidirectional_attention"))
    second = kind == "gemma2"
    cap = content.get("attn_logit_softcapping", 50.0 if second else None) or 0.0
    _refuse(source, "attn_logit_softcapping in Gemma 3", cap and not second)
    layers, head_dim = get("num_hidden_layers"), get("head_dim", 256)
    config = ModelConfig(
        layers=layers, width=get("hidden_size"), heads=get("num_attention_heads"),
        kv_heads=get("num_key_value_heads", get("num_attention_heads")), mlp=get("intermediate_size"),
        vocab=get("vocab_size"), context=get("max_position_embeddings"), activation="geglu", head_width=head_dim,
        norm_eps=get("rms_norm_eps", 1e-6), qk_norm=not second, post_norms=True, tied=get("tie_word_embeddings", True),
        scaled_embedding=True, final_soft_cap=content.get("final_logit_softcapping", 30.0 if second else None) or 0.0,
        attention_scale=get("query_pre_attn_scalar", 256) ** -0.5, soft_cap=cap,
    )  # fmt: skip
    said = content.get("rope_parameters") or {}
    full = {"rope_theta": get("rope_theta", 10_000.0 if second else 1e6), **(content.get("rope_scaling") or {})}
    if second:
        ropes = dict.fromkeys(("sliding_attention", "full_attention"), full | said)
    else:
        sliding = {"rope_theta": get("rope_local_base_freq", 10_000.0)}
        ropes = {
            "sliding_attention": sliding | said.get("sliding_attention", {}),
            "full_attention": full | said.get("full_attention", {}),
        }
    windows = {"sliding_attention": get("sliding_window", 4096), "full_attention": 0}
    kinds = {
        name: {
            "window": windows[name], "rope_base": float(rope["rope_theta"]),
            "rope_factors": _rope_factors(rope, rope["rope_theta"], head_dim, source),
        }
        for name, rope in ropes.items()
    }  # fmt: skip
    period = 2 if second else get("sliding_window_pattern", 6)
    usual = ["full_attention" if (index + 1) % period == 0 else "sliding_attention" for index in range(layers)]
    types = get("layer_types", usual)
    _refuse(source, f"layers of the kinds {', '.join(sorted({*types} - {*kinds}))}", {*types} - {*kinds})
    if len(types) != layers:
        raise BadInput(f"{source}/config.json has {len(types)} layer_types for {layers} layers")
    return by_layer(config, [kinds[each] for each in types])


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
