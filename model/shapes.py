"""The shape of a pretrained model, from what its files tell of it: what changes its mathematics is read or refused, never passed over."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from kvcascade.cache.errors import BadInput
from kvcascade.model.config import ModelConfig, by_layer
from kvcascade.model.metadata import REQUIRED, Metadata, shown
from kvcascade.model.rope import Stretch, stretch

GGUF_KINDS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "smollm3", "phi3", "qwen3moe")
HUB_KINDS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "smollm3",
    "phi3",
    "mixtral",
    "qwen3_moe",
)
LAYERS = 10_000
"""More layers than any model has."""

IRRELEVANT = frozenset(
    """
    _attn_implementation _name_or_path architectures attention_dropout attn_implementation attn_pdrop auto_map bos_token_id
    cache_implementation chunk_size_feed_forward decoder_start_token_id do_sample dtype embd_pdrop eos_token_id
    gradient_checkpointing id2label initializer_range is_encoder_decoder is_llama_config label2id max_length model_type n_ctx
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type quantization_config
    reorder_and_upcast_attn resid_pdrop return_dict router_aux_loss_coef router_jitter_noise sep_token_id summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params tokenizer_class torch_dtype
    transformers.js_config transformers_version unk_token_id use_cache vocab_size
""".split()
)
"""Keys of a config.json that say nothing of the logits: of training, of other tasks, or of what other files and readers decide."""
IRRELEVANT_GGUF = frozenset("vocab_size rope.scaling.finetuned tensor_data_layout".split())

log = logging.getLogger("kvcascade")


def from_gguf(fields: dict[str, Any], tensors: dict[str, tuple[int, ...]], source: str) -> ModelConfig:
    """The shape that a GGUF's metadata tells; BadInput for another architecture, or one with parts that are not implemented."""
    kind = fields.get("general.architecture")
    if kind not in GGUF_KINDS:
        raise BadInput(f"{source} is a model of the architecture {shown(kind)}; there are {', '.join(GGUF_KINDS)}")
    own = {key.removeprefix(f"{kind}."): value for key, value in fields.items() if key.startswith(f"{kind}.")}
    said = Metadata(own, source, f"{kind}.")
    experts = _whole(said, "expert_count", 0, least=0)
    _refuse(source, "a mixture of experts", experts and kind not in ("llama", "qwen3moe"))
    for key in ("expert_shared_count", "expert_group_count", "leading_dense_block_count"):
        _refuse(source, key, said.whole(key, 0, least=0))
    _refuse(
        source, "another expert_gating_func than softmax", said.whole("expert_gating_func", 1, least=0) not in (0, 1)
    )
    _refuse(source, "shares of experts that do not sum to 1", not said.flag("expert_weights_norm", True))
    _refuse(source, "an expert_weights_scale", said.number("expert_weights_scale", 1.0) not in (0.0, 1.0))
    heads, width = _whole(said, "attention.head_count"), _whole(said, "embedding_length")
    head_dim, context = _whole(said, "attention.key_length", width // heads), _whole(said, "context_length")
    turned = _whole(said, "rope.dimension_count", head_dim)
    _refuse(source, "partial RoPE", turned != head_dim and (kind != "phi3" or turned % 2 or turned > head_dim))
    _refuse(source, "values of another width than keys", _whole(said, "attention.value_length", head_dim) != head_dim)
    base = said.number("rope.freq_base", 10_000.0, above=0)
    found = _gguf_stretch(said, base, turned, context, tensors)
    found = dataclasses.replace(found, width=turned if turned != head_dim else 0)
    layer_norm, gemma = kind == "gpt2", kind.startswith("gemma")
    eps = "attention.layer_norm_epsilon" if layer_norm else "attention.layer_norm_rms_epsilon"
    # Where the file does not say it, the query's scale is that of the published models: another one for those of 27 billion parameters.
    layers = _whole(said, "block_count", most=LAYERS)
    scalar = width // heads if gemma and layers in (46, 62) else head_dim
    scale = said.number("attention.scale", max(scalar, 1) ** -0.5, above=0)
    config = ModelConfig(
        layers=layers, width=width, heads=heads, kv_heads=_whole(said, "attention.head_count_kv", heads),
        mlp=_whole(said, "expert_feed_forward_length" if kind == "qwen3moe" else "feed_forward_length"), experts=experts,
        experts_per_token=_whole(said, "expert_used_count") if experts else 0, vocab=tensors.get("token_embd.weight", (0,))[0], context=context,
        activation="gelu" if layer_norm else "geglu" if gemma else "swiglu", positions="learned" if layer_norm else "rope",
        rope_base=base, **_rope(found), head_width=head_dim, norm="layer" if layer_norm else "rms", norm_eps=said.number(eps, least=0),
        qk_norm=kind in ("qwen3", "qwen3moe", "gemma3"), post_norms=gemma, biases={"gpt2": "all", "qwen2": "qkv"}.get(kind, "none"),
        tied="output.weight" not in tensors, scaled_embedding=gemma,
        final_soft_cap=said.number("final_logit_softcapping", 0.0, least=0),
        window=_whole(said, "attention.sliding_window", 0, least=0) if kind != "smollm3" else 0,
        soft_cap=said.number("attn_logit_softcapping", 0.0, least=0),
        attention_scale=scale if gemma or "attention.scale" in said else 0.0,
    )  # fmt: skip
    local_base = said.number("rope.freq_base_swa", 10_000.0, above=0)
    pattern = said.content.get("attention.sliding_window_pattern")
    if gemma and isinstance(pattern, list | tuple):
        flags = said.many(
            "attention.sliding_window_pattern", of="flags", right=lambda x: isinstance(x, bool), count=layers
        )
    else:
        period = said.whole("attention.sliding_window_pattern", {"gemma2": 2}.get(kind, 6))
        flags = [bool((index + 1) % period) for index in range(layers)]
    _name_unknown(said, IRRELEVANT_GGUF)
    if kind == "smollm3":
        return by_layer(config, [{"positions": "rope" if turn else "none"} for turn in _turned(layers)])
    if not gemma:
        return config
    local = {"rope_base": local_base, "rope_factors": ()} if kind == "gemma3" else {}
    return by_layer(config, [local if flag else {"window": 0} for flag in flags])


def _gguf_stretch(said: Metadata, base: float, head_dim: int, context: int, tensors: dict) -> Stretch:
    """A GGUF's keys on RoPE under the names of the hub's; a factor without a kind is linear, as llama.cpp takes it, and so is the old key."""
    old = said.number("rope.scale_linear", None, above=0)
    factor = said.number("rope.scaling.factor", old, above=0)
    kind = said.text("rope.scaling.type", "linear" if factor else "none")
    multiplier = said.number("rope.scaling.yarn_log_multiplier", 0.0)
    _refuse(said.source, "a yarn_log_multiplier", multiplier)
    original = said.whole("rope.scaling.original_context_length", None)
    attention = said.number("rope.scaling.attn_factor", None, above=0)
    if kind == "longrope":
        for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
            if name not in tensors:
                raise BadInput(f"{said.source} lacks {name}")
        return Stretch(short_context=original or context, scale=attention or 1.0)
    table = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    betas = {name: said.number(f"rope.scaling.yarn_{name}", None, above=0) for name in ("beta_fast", "beta_slow")}
    extrapolated = said.number("rope.scaling.yarn_ext_factor", None)
    _refuse(said.source, f"a yarn_ext_factor of {extrapolated}", extrapolated not in (None, 1.0, -1.0))
    found = stretch(Metadata(table | betas, said.source, f"{said.prefix}rope.scaling."), base, head_dim, context)
    return dataclasses.replace(found, scale=found.scale * (attention or 1.0))


def from_hub(content: dict[str, Any], source: str) -> ModelConfig:
    """The shape that a Hugging Face config.json tells; BadInput for another architecture, or one with parts that are not implemented."""
    said = Metadata(content, f"{source}/config.json")
    kind = content.get("model_type")
    if kind not in HUB_KINDS:
        raise BadInput(f"{source} is a model of the architecture {shown(kind)}; there are {', '.join(HUB_KINDS)}")
    config = _gpt2(said) if kind == "gpt2" else _gemma(kind, said) if kind.startswith("gemma") else _llama(kind, said)
    _name_unknown(said, IRRELEVANT)
    return config


def _gpt2(said: Metadata) -> ModelConfig:
    gelu = said.text("activation_function", "gelu_new")
    _refuse(said.source, f"the activation {gelu}", gelu not in ("gelu_new", "gelu_pytorch_tanh"))
    _refuse(said.source, "attention to another model", said.flag("add_cross_attention", False))
    width, heads, layers = said.whole("n_embd"), said.whole("n_head"), said.whole("n_layer", most=LAYERS)
    config = ModelConfig(
        layers=layers, width=width, heads=heads, kv_heads=heads, mlp=said.whole("n_inner", 4 * width), vocab=said.whole("vocab_size"),
        context=said.whole("n_positions"), activation="gelu", positions="learned", norm="layer",
        norm_eps=said.number("layer_norm_epsilon", 1e-5, least=0), biases="all", tied=said.flag("tie_word_embeddings", True),
    )  # fmt: skip
    scaled, by_index = said.flag("scale_attn_weights", True), said.flag("scale_attn_by_inverse_layer_idx", False)
    if scaled and not by_index:
        return config
    scale = config.head_dim**-0.5 if scaled else 1.0
    return by_layer(
        config, [{"attention_scale": scale / (index + 1 if by_index else 1)} for index in range(config.layers)]
    )


def _llama(kind: str, said: Metadata) -> ModelConfig:
    """Llama and those that are like it: Mistral, Qwen 2 and 3, SmolLM3, Phi-3."""
    by_flag = kind.startswith("qwen") or kind == "smollm3"  # whether there is a window at all
    activation = said.text("hidden_act", "silu")
    _refuse(said.source, f"the activation {activation}", activation not in ("silu", "swish"))
    for flag in ("attention_bias", "mlp_bias", "rope_interleaved"):
        _refuse(said.source, flag, said.flag(flag, False))
    width, heads, layers = (
        said.whole("hidden_size"),
        said.whole("num_attention_heads"),
        said.whole("num_hidden_layers", most=LAYERS),
    )
    head_dim, context = said.whole("head_dim", max(width // heads, 1)), said.whole("max_position_embeddings")
    tables = [said.table("rope_scaling"), said.table("rope_parameters")]
    rope = tables[1] if tables[1].content else tables[0]
    if {"full_attention", "sliding_attention"} & {*rope}:
        raise rope.bad("", "differs by layers, which is not implemented for this architecture")
    theta = said.number("rope_theta", {"smollm3": 2e6, "mixtral": 1e6}.get(kind, 10_000.0), above=0)
    base, found = _hub_rope(said, rope, theta, head_dim, context, kind == "phi3")
    config = ModelConfig(
        layers=layers, width=width, heads=heads, kv_heads=said.whole("num_key_value_heads", heads), mlp=said.whole("intermediate_size"),
        vocab=said.whole("vocab_size"), context=context, activation="swiglu", rope_base=base, **_rope(found), head_width=head_dim,
        norm="rms", norm_eps=said.number("rms_norm_eps", 1e-6, least=0), qk_norm=kind.startswith("qwen3"),
        biases="qkv" if kind == "qwen2" else "none", tied=said.flag("tie_word_embeddings", kind == "smollm3"),
    )  # fmt: skip
    if kind in ("mixtral", "qwen3_moe"):
        config = dataclasses.replace(config, **_experts(kind, said))
    window = said.whole("sliding_window", 4096 if kind.startswith("qwen") else 0, least=0)
    first = said.whole("max_window_layers", 28, least=0)
    if by_flag and not said.flag("use_sliding_window", False) or kind == "llama":
        window = 0
    sliding = "sliding_attention" if window else "full_attention"
    every = kind in ("mistral", "mixtral", "phi3")
    usual = [
        sliding if every or kind.startswith("qwen") and index >= first else "full_attention" for index in range(layers)
    ]
    windows = {"sliding_attention": window, "full_attention": 0}
    changes: list[dict[str, Any]] = [{"window": windows[each]} for each in _layer_types(said, usual)]
    if kind == "smollm3":
        interval = said.whole("no_rope_layer_interval", 4)
        turned = said.wholes("no_rope_layers", _turned(layers, interval), most=1, count=layers)
        changes = [each | {"positions": "rope" if turn else "none"} for each, turn in zip(changes, turned, strict=True)]
    return by_layer(config, changes)


def _experts(kind: str, said: Metadata) -> dict[str, Any]:
    """The fields of a mixture of experts in every layer."""
    count = said.whole("num_local_experts", said.whole("num_experts", None))
    if count is None:
        raise BadInput(f"{said.source} lacks num_experts")
    found = {"experts": count, "experts_per_token": said.whole("num_experts_per_tok", 2 if kind == "mixtral" else 8)}
    if kind == "mixtral":
        return found
    _refuse(
        said.source,
        "layers without experts",
        said.whole("decoder_sparse_step", 1) != 1 or said.wholes("mlp_only_layers", ()),
    )
    return found | {
        "mlp": said.whole("moe_intermediate_size"),
        "experts_normalised": said.flag("norm_topk_prob", False),
    }


def _turned(layers: int, interval: int = 4) -> list[int]:
    """1 for the layers of SmolLM3 that have RoPE: all but every so-manieth."""
    return [int((index + 1) % interval != 0) for index in range(layers)]


def _gemma(kind: str, said: Metadata) -> ModelConfig:
    """Gemma 2 and 3: some layers see a window and some everything, in Gemma 3 with a RoPE of their own."""
    gelu = said.text("hidden_activation", "gelu_pytorch_tanh")
    _refuse(said.source, f"the activation {gelu}", gelu != "gelu_pytorch_tanh")
    said.text("hidden_act", None)  # what transformers itself passes over
    for flag in ("attention_bias", "use_bidirectional_attention"):
        _refuse(said.source, flag, said.flag(flag, False))
    second = kind == "gemma2"
    # Without the key the published models' cap; with null none.
    absent = lambda key, usual: usual if second and key not in said.content else 0.0
    cap = said.number("attn_logit_softcapping", absent("attn_logit_softcapping", 50.0), least=0)
    _refuse(said.source, "attn_logit_softcapping in Gemma 3", cap and not second)
    layers, heads = said.whole("num_hidden_layers", most=LAYERS), said.whole("num_attention_heads")
    head_dim, context = said.whole("head_dim", 256), said.whole("max_position_embeddings")
    scale = said.number("query_pre_attn_scalar", 256, above=0) ** -0.5
    config = ModelConfig(
        layers=layers, width=said.whole("hidden_size"), heads=heads, kv_heads=said.whole("num_key_value_heads", heads),
        mlp=said.whole("intermediate_size"), vocab=said.whole("vocab_size"), context=context, activation="geglu", head_width=head_dim,
        norm_eps=said.number("rms_norm_eps", 1e-6, least=0), qk_norm=not second, post_norms=True,
        tied=said.flag("tie_word_embeddings", True), scaled_embedding=True,
        final_soft_cap=said.number("final_logit_softcapping", absent("final_logit_softcapping", 30.0), least=0),
        attention_scale=scale, soft_cap=cap,
    )  # fmt: skip
    parameters, scaling = said.table("rope_parameters"), said.table("rope_scaling")
    base = said.number("rope_theta", 10_000.0 if second else 1e6, above=0)
    local_base = said.number("rope_local_base_freq", 10_000.0, above=0)
    nested = {"full_attention", "sliding_attention"} & {*parameters}
    full = parameters.table("full_attention") if nested else parameters if parameters.content else scaling
    local = parameters.table("sliding_attention") if nested else Metadata({}, said.source)
    windows = {"sliding_attention": said.whole("sliding_window", 4096), "full_attention": 0}
    kinds = {}
    for name, table, theta in (("full_attention", full, base), ("sliding_attention", local, local_base)):
        if second and not nested:
            table, theta = full, base
        theta, found = _hub_rope(said, table, theta, head_dim, context)
        kinds[name] = {"window": windows[name], "rope_base": theta, **_rope(found)}
    period = said.whole("sliding_window_pattern", said.whole("_sliding_window_pattern", 2 if second else 6))
    usual = ["full_attention" if (index + 1) % period == 0 else "sliding_attention" for index in range(layers)]
    return by_layer(config, [kinds[each] for each in _layer_types(said, usual)])


def _layer_types(said: Metadata, usual: list[str]) -> Sequence[str]:
    """Which layers see a window and which everything, as `layer_types` says, or as is usual."""
    types = said.texts("layer_types", usual, count=len(usual))
    if others := sorted({*types} - {"sliding_attention", "full_attention"}):
        raise said.bad("layer_types", f"has {', '.join(others)}, which is not implemented")
    return types


def _hub_rope(
    said: Metadata, rope: Metadata, base: float, head_dim: int, context: int, partial: bool = False
) -> tuple[float, Stretch]:
    """RoPE's base and stretch, of which some may stand beside the table as well."""
    share = rope.number("partial_rotary_factor", said.number("partial_rotary_factor", 1.0, above=0), above=0)
    width = int(head_dim * share)
    if share != 1 and (not partial or not 2 <= width <= head_dim or width % 2):
        raise rope.bad("partial_rotary_factor", f"is {share:g}, which is not implemented for this model")
    base = rope.number("rope_theta", base, above=0)
    found = stretch(rope, base, width, context, said.whole("original_max_position_embeddings", None))
    _name_unknown(rope, frozenset())
    return base, dataclasses.replace(found, width=width if share != 1 else 0)


def _rope(found: Stretch) -> dict[str, Any]:
    return {
        "rope_factors": found.factors,
        "rope_long_factors": found.long_factors,
        "rope_short_context": found.short_context,
        "rope_scale": found.scale,
        "rope_width": found.width,
    }


def _whole(said: Metadata, key: str, default: Any = REQUIRED, **bounds: int) -> int:
    """A whole number, also where it stands once for every layer and all are alike."""
    value = said.content.get(key)
    if isinstance(value, list | tuple):
        said.asked.add(key)
        if not value or any(each != value[0] for each in value):
            raise said.bad(key, f"is {shown(value)}; layers that differ in it are not implemented")
        said = Metadata({key: value[0]}, said.source, said.prefix)
    return said.whole(key, default, **bounds)


def _name_unknown(said: Metadata, irrelevant: frozenset[str]) -> None:
    """Say in one line which keys nobody asked for: what they mean is not known."""
    if unknown := sorted(key for key in said if key in said and key not in said.asked | irrelevant):
        log.warning(
            "%s: passed over, as not known: %s", said.source, ", ".join(said.prefix + key for key in unknown[:8])
        )


def _refuse(source: str, what: str, condition: object) -> None:
    if condition:
        raise BadInput(f"{source.removesuffix('/config.json')} uses {what}, which is not implemented")
