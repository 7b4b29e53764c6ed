"""The attention that a prompt's keys receive, on a GPU (Triton): softmax's normalisers by blocks of queries, then sums by blocks of keys.

cuDNN and `jax.nn` have no such sums, and round the normalisers that they return to the 16 bits of the output.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from kvcascade.kernels.decode_triton import capped, sees
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.launch import launch

BLOCK = 64  # queries, and keys


def mass(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    length_B: Int[Array, " B"],
    heads: Heads,
    last: int,
    interpret: bool,
) -> Float[Array, "B K T"]:
    """The mass that `prefill.observed_attention` returns; the logits are computed twice, so that no two blocks add to one sum."""
    B, T, N, H = q_BTNH.shape
    K, counted = k_BTKH.shape[2], min(last or T, T)
    constants = {"T": T, "N": N, "K": K, "H": H, "COUNTED": counted, "BLOCK": BLOCK}
    constants |= {"WINDOW": heads.window, "SCALE": heads.scale, "CAP": heads.soft_cap}
    constants["WIDTH"] = max(16, triton.next_power_of_2(H))
    float32 = lambda *shape: [jax.ShapeDtypeStruct(shape, jnp.float32)]
    arrays, length_B = [q_BTNH, k_BTKH], length_B.astype(jnp.int32)
    per_query = (triton.cdiv(counted, BLOCK), N, B)
    lse = launch(_lse, per_query, [*arrays, length_B], float32(B, N, counted), interpret=interpret, **constants)
    per_key = (triton.cdiv(T, BLOCK), K, B)
    return launch(_mass, per_key, [*arrays, length_B, *lse], float32(B, K, T), interpret=interpret, **constants)[0]


@triton.jit
@no_type_check
def _lse(
    q, k, length, lse,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, COUNTED: tl.constexpr, WINDOW: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """log Σ exp(logit) of a block of the queries that count, of one head."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens = tl.load(length + batch)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.maximum(tokens - COUNTED, 0) + tl.program_id(0) * BLOCK
    t = begin + tl.arange(0, BLOCK)
    query = _vectors(q, (batch * T + t) * N + head, t < tokens, H, WIDTH)
    largest = tl.full((BLOCK,), -1e30, tl.float32)  # partial.NEVER
    total = tl.zeros((BLOCK,), tl.float32)
    first = 0
    if WINDOW:
        first = tl.maximum(begin - WINDOW + 1, 0)
    for start in range(first, tl.minimum(begin + BLOCK, tokens), BLOCK):
        s = start + tl.arange(0, BLOCK)
        key = _vectors(k, (batch * T + s) * K + head // (N // K), s < tokens, H, WIDTH)
        logit = _logits(query, key, t[:, None] - s[None, :], WINDOW, SCALE, CAP)
        larger = tl.maximum(largest, tl.max(logit, 1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logit - larger[:, None]), 1)
        largest = larger
    # A query sees itself, so its total is 1 at least; where there is none it is 0, and not stored.
    tl.store(lse + (batch * N + head) * COUNTED + index, largest + tl.log(tl.maximum(total, 1.0)), mask=t < tokens)


@triton.jit
@no_type_check
def _mass(
    q, k, length, lse, mass,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, COUNTED: tl.constexpr, WINDOW: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Σ exp(logit - lse) over the queries that count and the group, for a block of the keys of one KV head."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens = tl.load(length + batch)
    begin = tl.maximum(tokens - COUNTED, 0)
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = _vectors(k, (batch * T + s) * K + head, s < tokens, H, WIDTH)
    end = tokens
    if WINDOW:
        end = tl.minimum(tokens, tl.program_id(0) * BLOCK + BLOCK + WINDOW - 1)
    received = tl.zeros((BLOCK,), tl.float32)
    for n in range(head * (N // K), (head + 1) * (N // K)):
        for start in range(tl.maximum(begin, tl.program_id(0) * BLOCK), end, BLOCK):
            t = start + tl.arange(0, BLOCK)
            query = _vectors(q, (batch * T + t) * N + n, t < tokens, H, WIDTH)
            # No key gets anything from a query that is not there: exp(logit - inf) is 0.
            normaliser = tl.load(lse + (batch * N + n) * COUNTED + t - begin, mask=t < tokens, other=float("inf"))
            logit = _logits(key, query, t[None, :] - s[:, None], WINDOW, SCALE, CAP)
            received += tl.sum(tl.exp(logit - normaliser[None, :]), 1)
    tl.store(mass + (batch * K + head) * T + s, received, mask=s < T)


@triton.jit
@no_type_check
def _vectors(x, row, mask, H: tl.constexpr, WIDTH: tl.constexpr):
    h = tl.arange(0, WIDTH)
    return tl.load(x + row[:, None] * H + h[None, :], mask=mask[:, None] & (h < H)[None, :], other=0)


@triton.jit
@no_type_check
def _logits(x, y, age, WINDOW: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Products of all x with all y, -inf where the query is `age` too early or too late for the key."""
    logits = capped(tl.dot(x, tl.trans(y), input_precision="ieee") * SCALE, CAP)
    return tl.where(sees(age, WINDOW), logits, float("-inf"))
