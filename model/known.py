"""Well-known models by their shape alone, as they are served: matrices and products in bfloat16. No weights are needed to count, compile or fit them."""

import dataclasses
import functools
from typing import Any

from kvcascade.cache.errors import BadInput
from kvcascade.model.config import ModelConfig, by_layer

_served = functools.partial(ModelConfig, weights="bfloat16", dtype="bfloat16")
_llama = functools.partial(_served, activation="swiglu", norm_eps=1e-5, tied=False)


def _gemma(period: int, others: dict[str, Any], **shape: Any) -> ModelConfig:
    """Layers that see a window, and, every so-manieth, one that sees everything and has these fields besides."""
    config = _served(activation="geglu", post_norms=True, scaled_embedding=True, **shape)
    return by_layer(config, [{} if (i + 1) % period else {"window": 0} | others for i in range(config.layers)])


KNOWN = {
    "gpt2": _served(
        layers=12, width=768, heads=12, kv_heads=12, mlp=3072, vocab=50257, context=1024, positions="learned", norm="layer", norm_eps=1e-5,
        biases="all",
    ),
    "smollm2-135m": _llama(
        layers=30, width=576, heads=9, kv_heads=3, mlp=1536, vocab=49152, context=8192, rope_base=100_000.0, tied=True,
    ),
    "llama2-7b": _llama(layers=32, width=4096, heads=32, kv_heads=32, mlp=11008, vocab=32000, context=4096),
    "llama2-70b": _llama(layers=80, width=8192, heads=64, kv_heads=8, mlp=28672, vocab=32000, context=4096),
    "llama3-8b": _llama(
        layers=32, width=4096, heads=32, kv_heads=8, mlp=14336, vocab=128256, context=8192, rope_base=500_000.0,
    ),
    "llama3-70b": _llama(
        layers=80, width=8192, heads=64, kv_heads=8, mlp=28672, vocab=128256, context=8192, rope_base=500_000.0,
    ),
    "mistral-7b": _llama(layers=32, width=4096, heads=32, kv_heads=8, mlp=14336, vocab=32000, context=32768, window=4096),
    "qwen3-0.6b": _served(
        layers=28, width=1024, heads=16, kv_heads=8, head_width=128, mlp=3072, vocab=151936, context=40960, activation="swiglu",
        rope_base=1e6, qk_norm=True,
    ),
    "qwen3-8b": _served(
        layers=36, width=4096, heads=32, kv_heads=8, head_width=128, mlp=12288, vocab=151936, context=40960, activation="swiglu",
        rope_base=1e6, qk_norm=True, tied=False,
    ),
    "gemma2-2b": _gemma(
        2, {}, layers=26, width=2304, heads=8, kv_heads=4, head_width=256, mlp=9216, vocab=256000, context=8192, window=4096,
        soft_cap=50.0, final_soft_cap=30.0,
    ),
    "gemma3-1b": _gemma(
        6, {"rope_base": 1e6}, layers=26, width=1152, heads=4, kv_heads=1, head_width=256, mlp=6912, vocab=262144, context=32768,
        window=512, qk_norm=True,
    ),
}  # fmt: skip


def stretch(config: ModelConfig, context: int) -> ModelConfig:
    """The same model with room for so many tokens: what RoPE can do at any length, and a table of learned positions cannot (BadInput)."""
    if context > config.context and config.positions == "learned":
        raise BadInput(f"a context of {context} tokens is longer than the model's {config.context} learned positions")
    return dataclasses.replace(config, context=max(context, config.context))
