"""Tiny models of every architecture as Hugging Face writes them, with weights from a seed; needs neither torch nor transformers."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB, WIDTH, MLP, LAYERS, HEADS, KV_HEADS = 270, 32, 48, 2, 4, 2

COMMON = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0], "rope_theta": 100.0,
}  # fmt: skip
GEMMA = {
    "num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 4, "sliding_window": 6, "final_logit_softcapping": 4.0,
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS = {
    "llama": COMMON | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 500.0, "tie_word_embeddings": True},
    "llama3": COMMON
    | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": False},
    "yarn": COMMON | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_parameters": YARN, "tie_word_embeddings": True},
    # The prompts are longer than 16 tokens, and shorter than 32.
    "longrope": COMMON
    | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True,
        "rope_parameters": LONGROPE | {"original_max_position_embeddings": 16},
    },
    "longrope_short": COMMON
    | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True,
        "rope_parameters": LONGROPE | {"original_max_position_embeddings": 32},
    },
    "mistral": COMMON
    | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "rope_theta": 10000.0, "sliding_window": 6, "tie_word_embeddings": False},
    "qwen2": COMMON
    | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 10000.0, "use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3": COMMON
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rope_theta": 10000.0, "head_dim": 16, "tie_word_embeddings": False},
    "gemma2": COMMON | GEMMA
    | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "rope_theta": 10000.0, "attn_logit_softcapping": 5.0},
    "gemma3": COMMON | GEMMA
    | {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 3, "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "attn_logit_softcapping": None,
    },
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
        "n_positions": 64, "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
}  # fmt: skip

CONFIGS["smollm3"] = COMMON | {
    "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 4, "rope_theta": 500.0,
    "tie_word_embeddings": True, "pad_token_id": None,
}  # fmt: skip
CONFIGS["phi3"] = COMMON | {
    "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "head_dim": 8, "rope_theta": 500.0, "tie_word_embeddings": False, "pad_token_id": None,
    "sliding_window": 6,
}  # fmt: skip
CONFIGS["phi4"] = CONFIGS["phi3"] | {
    "sliding_window": None, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0]},
}  # fmt: skip
CONFIGS["mixtral"] = COMMON | {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "rope_theta": 500.0, "num_local_experts": 4, "num_experts_per_tok": 2,
    "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip
CONFIGS["qwen3_moe"] = COMMON | {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "rope_theta": 500.0, "num_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS["qwen3_moe_raw"] = CONFIGS["qwen3_moe"] | {"norm_topk_prob": False}
CONFIGS["gpt2_by_layer"] = CONFIGS["gpt2"] | {"scale_attn_by_inverse_layer_idx": True}
CONFIGS["gpt2_unscaled"] = CONFIGS["gpt2"] | {"scale_attn_weights": False}

POSITIONS = [0, 5, 7, 15, 23]  # whose logits are kept: before and after mistral's window of 6
PROMPTS = np.random.default_rng(7).integers(0, VOCAB, (2, 24))


def weights(name: str) -> dict[str, np.ndarray]:
    """Weights of an architecture, large enough for attention to be peaked."""
    config, rng, found = CONFIGS[name], np.random.default_rng(sum(map(ord, name))), {}

    gemma = name.startswith("gemma")

    def put(tensor: str, *shape: int) -> None:
        norm = "norm" in tensor or "ln_" in tensor
        start = norm and "bias" not in tensor and not gemma
        found[tensor] = (rng.normal(size=shape) * (0.3 if norm else 0.25) + start).astype(np.float32)

    if config["model_type"] == "gpt2":
        put("transformer.wte.weight", VOCAB, WIDTH)
        put("transformer.wpe.weight", 64, WIDTH)
        for layer in range(LAYERS):
            for part, shape in (
                ("ln_1", (WIDTH,)), ("attn.c_attn", (WIDTH, 3 * WIDTH)), ("attn.c_proj", (WIDTH, WIDTH)),
                ("ln_2", (WIDTH,)), ("mlp.c_fc", (WIDTH, 4 * WIDTH)), ("mlp.c_proj", (4 * WIDTH, WIDTH)),
            ):  # fmt: skip
                put(f"transformer.h.{layer}.{part}.weight", *shape)
                put(f"transformer.h.{layer}.{part}.bias", shape[-1])
        put("transformer.ln_f.weight", WIDTH)
        put("transformer.ln_f.bias", WIDTH)
        return found
    head_dim = config.get("head_dim", WIDTH // HEADS)
    put("model.embed_tokens.weight", VOCAB, WIDTH)
    fused, experts = config["model_type"] == "phi3", config.get("num_experts", config.get("num_local_experts", 0))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for part, rows, columns in (
            ("self_attn.q_proj", HEADS * head_dim, WIDTH), ("self_attn.k_proj", KV_HEADS * head_dim, WIDTH),
            ("self_attn.v_proj", KV_HEADS * head_dim, WIDTH), ("self_attn.o_proj", WIDTH, HEADS * head_dim),
            ("mlp.gate_proj", MLP, WIDTH), ("mlp.up_proj", MLP, WIDTH), ("mlp.down_proj", WIDTH, MLP),
        ):  # fmt: skip
            if fused and part[10] in "qkv" or fused and part[:8] in ("mlp.gate", "mlp.up_p"):
                continue
            if experts and part.startswith("mlp."):
                continue
            put(f"{prefix}.{part}.weight", rows, columns)
            if name == "qwen2" and part[10] in "qkv":
                put(f"{prefix}.{part}.bias", rows)
        mixtral, mlp = config["model_type"] == "mixtral", config.get("moe_intermediate_size", MLP)
        if experts:
            put(f"{prefix}.{'block_sparse_moe' if mixtral else 'mlp'}.gate.weight", experts, WIDTH)
        for index in range(experts):
            for part, old, shape in (
                ("gate", "w1", (mlp, WIDTH)),
                ("up", "w3", (mlp, WIDTH)),
                ("down", "w2", (WIDTH, mlp)),
            ):
                expert = f"block_sparse_moe.experts.{index}.{old}" if mixtral else f"mlp.experts.{index}.{part}_proj"
                put(f"{prefix}.{expert}.weight", *shape)
        if fused:
            put(f"{prefix}.self_attn.qkv_proj.weight", (HEADS + 2 * KV_HEADS) * head_dim, WIDTH)
            put(f"{prefix}.mlp.gate_up_proj.weight", 2 * MLP, WIDTH)
        for norm in ("input", "post_attention", *(("pre_feedforward", "post_feedforward") if gemma else ())):
            put(f"{prefix}.{norm}_layernorm.weight", WIDTH)
        if name.startswith(("qwen3", "gemma3")):
            for norm in ("q_norm", "k_norm"):
                put(f"{prefix}.self_attn.{norm}.weight", head_dim)
    put("model.norm.weight", WIDTH)
    if not config["tie_word_embeddings"]:
        put("lm_head.weight", VOCAB, WIDTH)
    return found


def write(name: str, folder: Path, shards: int = 1) -> Path:
    """Write config.json, tokenizer.json (one token per byte) and the weights, in one file or several, as `save_pretrained` does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = weights(name)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {each: tensors[each] for each in sorted(tensors)[index::shards]}
        save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
