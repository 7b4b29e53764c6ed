"""Slots at random, attention over them in float64, and the exchange of one: what the tests of the kernels compare with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvcascade.cache.codec import CODECS
from kvcascade.cache.errors import BadInput
from kvcascade.kernels.decode import decode
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import normalise
from kvcascade.kernels.slots import Codec, Codecs, Entry, Held, Slots, Stored
from kvcascade.kernels.write import exchange


def codecs(names: str) -> Codecs:
    """`int8`, or one for keys and one for values, `int8/int4`."""
    k, _, v = names.partition("/")
    return Codecs(CODECS[k], CODECS[v or k])


WRITTEN = ("bf16", "f32", "fp8", "int4", "int4h", "int8", "nvfp4")
"""What the Triton kernel for an exchange writes; slots in other codecs go through XLA."""


def fits(names: str, width: int) -> bool:
    """Whether vectors of that width fill whole bytes."""
    try:
        for codec in codecs(names):
            codec.nbytes(width)
    except BadInput:
        return False
    return True


# Compiled whole: one by one the operations of a codec are as many programs.
@functools.partial(jax.jit, static_argnums=0)
def encoded(by: Codecs, k, v):
    return by.k.encode(k), by.v.encode(v)


@functools.partial(jax.jit, static_argnums=0)
def decoded(by: Codecs, k, v):
    return by.k.decode(k), by.v.decode(v)


def held(rng, names: str, batch: int, kv_heads: int, slots: int, width: int, numbers: int = 1) -> Held:
    """Slots in random order with random positions, some of them empty, an outlier among the vectors."""
    by = codecs(names)
    shape = (batch, kv_heads, slots)
    vectors = lambda: jnp.asarray(rng.normal(size=(*shape, width)) * 3, jnp.float32)
    pos = rng.permuted(np.broadcast_to(np.arange(slots) - slots // 4, shape), axis=-1).clip(-1)
    carried = tuple(jnp.asarray(rng.random(shape), jnp.float32) for _ in range(numbers))
    k, v = encoded(by, vectors(), vectors())
    return Slots(k, v, jnp.asarray(pos, jnp.int32), carried), by


def heads_of(q_BNH, slots: list[Held], **more) -> Heads:
    """The heads that queries and slots are of; `more` says how they see."""
    return Heads(q_BNH.shape[1], slots[0][0].pos_BKS.shape[1], q_BNH.shape[2], **more)


def attended(q_BNH, now_B, slots: list[Held], observed: bool, implementation, **more):
    """Normalised attention through `decode`, [B, N, H], and each tier's mass, [B, K, S]."""
    found = decode(q_BNH, now_B, slots, heads_of(q_BNH, slots, **more), observed, implementation)
    out_BTNH, masses = normalise([found])
    return out_BTNH[:, 0], [mass[:, :, 0] for mass in masses]


def dense(q_BNH, now_B, slots: list[Held], window=0, scale=None, soft_cap=0.0):
    """The same attention in float64, over all slots at once."""
    B, N, H = q_BNH.shape
    tiers = [decoded(by, s.k, s.v) for s, by in slots]
    k, v = (np.concatenate([np.asarray(x, np.float64) for x in each], 2) for each in zip(*tiers, strict=True))
    pos = np.concatenate([s.pos_BKS for s, _ in slots], 2)
    K = k.shape[1]
    q = np.asarray(q_BNH, np.float64).reshape(B, K, N // K, H) * (scale or H**-0.5)
    age = np.asarray(now_B)[:, None, None] - pos
    seen = (pos >= 0) & (age >= 0) & (age < (window or np.inf))
    logits = np.einsum("bkgh,bksh->bkgs", q, k)
    logits = soft_cap * np.tanh(logits / soft_cap) if soft_cap else logits
    logits = np.where(seen[:, :, None], logits, -np.inf)
    top = np.where(seen.any(-1), logits.max((-2, -1), initial=-1e9, where=seen[:, :, None]), 0)
    weights = np.exp(logits - top[..., None, None])
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bkgs,bksw->bkgw", weights, v).reshape(B, N, -1)
    return out, np.split(weights.sum(2), np.cumsum([s.pos_BKS.shape[-1] for s, _ in slots])[:-1], -1)


def offered(rng, batch: int, kv_heads: int, slots: int, width: int, scale: float, numbers: int = 1, newcomers: int = 1):
    """Newcomers for each KV head, and priorities with many ties, without a limit on either side."""
    shape = (batch, kv_heads, newcomers)
    vectors = lambda: jnp.asarray(rng.normal(size=(*shape, width)) * scale, jnp.float32)
    pos = jnp.asarray(rng.integers(0, 99, shape), jnp.int32)
    carried = tuple(jnp.asarray(rng.random(shape), jnp.float32) for _ in range(numbers))
    entry = Entry(vectors(), vectors(), pos, carried)
    return entry, jnp.asarray(rng.choice([-np.inf, 0, 1, 2, np.inf], (batch, kv_heads, slots + newcomers)), jnp.float32)


def assert_same_stored(codec: Codec, ours: Stored, theirs: Stored) -> None:
    """Bit for bit; of turned vectors what they stand for, to a step, since their sums may come in another order."""
    for name in ours:
        a, b = ours[name].astype("float32"), theirs[name].astype("float32")
        if not codec.turned:
            np.testing.assert_array_equal(a, b)
        elif name in ("scale", "low"):
            np.testing.assert_allclose(a, b, rtol=0.01, atol=0.05)
    if codec.turned:
        gap = max(np.diff(codec.levels)) if codec.levels else 1.0
        step = 1.02 * gap * theirs["scale"].astype("float32") + 1e-2 * jnp.abs(codec.read(theirs))
        assert (jnp.abs(codec.read(ours) - codec.read(theirs)) <= step).all()


def check_exchange(implementation, rng, names, batch, kv_heads, slots, width, numbers, forget, scale, newcomers=1):
    """The exchange against the reference: bit for bit, but for what is turned, whose sums may come in another order."""
    before, by = held(rng, names, batch, kv_heads, slots, width, numbers)
    entry, priority = offered(rng, batch, kv_heads, slots, width, scale, numbers, newcomers)
    both = jax.jit(
        lambda slots, entry, priority: [
            exchange(slots, entry, priority, by, forget, one) for one in (implementation, "xla")
        ],
        compiler_options={"xla_backend_optimization_level": 0},  # compiled in half the time
    )
    (ours, ours_left), (theirs, theirs_left) = both(before, entry, priority)
    for codec, a, b in ((by.k, ours.k, theirs.k), (by.v, ours.v, theirs.v)):
        assert_same_stored(codec, a, b)
    np.testing.assert_array_equal(ours.pos_BKS, theirs.pos_BKS)
    assert len(ours.numbers) == len(theirs.numbers) == numbers
    for a, b in zip(ours.numbers, theirs.numbers, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (ours_left is None) == forget
    for a, b in zip(jax.tree.leaves(ours_left), jax.tree.leaves(theirs_left), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
