"""Floating-point operations of training by arithmetic, and how many a card can do."""

from collections.abc import Sequence

import jax

from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig

# Dense products in 16 bits per second, by the name that JAX gives the card (`device_kind`); from the makers' data sheets.
PEAK = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA RTX A6000": 155e12,
    "NVIDIA L4": 121e12,
    "Tesla V100-SXM2-16GB": 125e12,
}


def per_token(config: ModelConfig) -> int:
    """Operations to train on one token: 6 per weight of a matrix, and 12 per channel of the heads and token seen (PaLM, Chowdhery et al. 2022, App. B).

    As there, a causal mask is not taken off, nor is what is computed twice to save memory added; embeddings that are only looked up are free.
    """
    params = gpt.graph(config)[1]
    looked_up = jax.tree.leaves([params.get("position", {}), {} if config.tied else params["embed"]])
    weights = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1) - sum(leaf.size for leaf in looked_up)
    attention = sum(
        heads.queries * heads.width * min(heads.window or config.context, config.context)
        for heads in config.layer_heads
    )
    return 6 * weights + 12 * attention


def peak(kinds: Sequence[str]) -> float | None:
    """Operations per second that devices of these kinds can do together, in 16 bits; None where one is not known, as of a CPU."""
    return sum(PEAK[kind] for kind in kinds) if PEAK.keys() >= {*kinds} else None
