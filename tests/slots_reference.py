"""Slots at random, attention over them in float64, and the exchange of one: what the tests of the kernels compare with."""

import jax
import jax.numpy as jnp
import numpy as np

from kvcascade.cache.codec import CODECS
from kvcascade.kernels.slots import Entry, Slots
from kvcascade.kernels.write import exchange


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


def offered(rng: np.random.Generator, batch: int, kv_heads: int, slots: int, head_dim: int, scale: float):
    """A newcomer for each KV head, and priorities with many ties, without a limit on either side."""
    shape = (batch, kv_heads, 1)
    vectors = lambda: jnp.asarray(rng.normal(size=(*shape, head_dim)) * scale, jnp.float32)
    pos = jnp.asarray(rng.integers(0, 99, shape), jnp.int32)
    entry = Entry(vectors(), vectors(), pos, jnp.asarray(rng.random(shape), jnp.float32))
    return entry, jnp.asarray(rng.choice([-np.inf, 0, 1, 2, np.inf], (batch, kv_heads, slots + 1)), jnp.float32)


def check_exchange(implementation, rng, codec, batch, kv_heads, slots, head_dim, scored, forget, scale):
    """The exchange against the reference: bit for bit, but for what is turned, whose sums may come in another order."""
    before = held(rng, codec.name, batch, kv_heads, slots, head_dim)
    if not scored:
        before = Slots(before.k, before.v, before.pos_BKS, None)
    entry, priority = offered(rng, batch, kv_heads, slots, head_dim, scale)
    both = jax.jit(
        lambda slots, entry, priority: [
            exchange(slots, entry, priority, codec, forget, by) for by in (implementation, "xla")
        ],
        compiler_options={"xla_backend_optimization_level": 0},  # compiled in half the time
    )
    (ours, ours_left), (theirs, theirs_left) = both(before, entry, priority)
    turned = {"codes": 17, "values": 0, "scale": 0.02, "low": 0.05}
    for a, b in ((ours.k, theirs.k), (ours.v, theirs.v)):
        for name in a:
            tolerance = turned[name] if codec.turned else 0
            np.testing.assert_allclose(a[name].astype("float32"), b[name].astype("float32"), atol=tolerance)
    np.testing.assert_array_equal(ours.pos_BKS, theirs.pos_BKS)
    assert (ours.score_BKS is None) == (not scored)
    assert (ours_left is None) == forget
    if scored:
        np.testing.assert_array_equal(ours.score_BKS, theirs.score_BKS)
    for a, b in zip(jax.tree.leaves(ours_left), jax.tree.leaves(theirs_left), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
