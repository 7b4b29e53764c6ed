"""Slots at random, and attention over them in float64: what the tests of the kernels compare with."""

import jax.numpy as jnp
import numpy as np

from kvcascade.cache.codec import CODECS
from kvcascade.kernels.slots import Slots


def held(rng: np.random.Generator, codec_name: str, batch: int, kv_heads: int, slots: int, head_dim: int) -> Slots:
    """Slots in random order with random positions, some of them empty, an outlier among the vectors."""
    codec = CODECS[codec_name]
    vectors = lambda: codec.encode(jnp.asarray(rng.normal(size=(batch, kv_heads, slots, head_dim)) * 3, jnp.float32))
    pos = rng.permuted(np.broadcast_to(np.arange(slots) - slots // 4, (batch, kv_heads, slots)), axis=-1).clip(-1)
    score = rng.random((batch, kv_heads, slots))
    return Slots(vectors(), vectors(), jnp.asarray(pos, jnp.int32), jnp.asarray(score, jnp.float32))


def dense(q_BNH, now_B, slots, window=0):
    """The same attention in float64, over all slots at once."""
    B, N, H = q_BNH.shape
    read = lambda stored, codec: np.asarray(codec.decode(stored), np.float64)
    k = np.concatenate([read(s.k, codec) for s, codec in slots], 2)
    v = np.concatenate([read(s.v, codec) for s, codec in slots], 2)
    pos = np.concatenate([s.pos_BKS for s, _ in slots], 2)
    K = k.shape[1]
    q = np.asarray(q_BNH, np.float64).reshape(B, K, N // K, H) / H**0.5
    age = np.asarray(now_B)[:, None, None] - pos
    seen = (pos >= 0) & (age >= 0) & (age < (window or np.inf))
    logits = np.where(seen[:, :, None], np.einsum("bkgh,bksh->bkgs", q, k), -np.inf)
    top = np.where(seen.any(-1), logits.max((-2, -1), initial=-1e9, where=seen[:, :, None]), 0)
    weights = np.exp(logits - top[..., None, None])
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bkgs,bksh->bkgh", weights, v).reshape(B, N, H)
    return out, np.split(weights.sum(2), np.cumsum([s.pos_BKS.shape[-1] for s, _ in slots])[:-1], -1)
