"""FlashAttention-2's forward pass for one head, as short as it can be: to be read, and to have its loads and stores counted."""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, BFloat16, Float

from kvcascade.kernels.launch import launch

KEYS = 64  # of a tile


def attention(
    q_TH: BFloat16[Array, "T H"],
    k_SH: BFloat16[Array, "S H"],
    v_SH: BFloat16[Array, "S H"],
    queries: int,
    interpret: bool,
) -> tuple[BFloat16[Array, "T H"], Float[Array, " T"]]:
    """Softmax attention from every query to every key, and log Σ exp(logit) of every query; a block takes so many `queries`.

    T is a multiple of `queries`, S of KEYS, H a power of two from 16 on (Dao 2023, algorithm 1).
    """
    (T, H), S = q_TH.shape, k_SH.shape[0]
    results = [jax.ShapeDtypeStruct(q_TH.shape, jnp.bfloat16), jax.ShapeDtypeStruct((T,), jnp.float32)]
    constants = {"S": S, "H": H, "SCALE": H**-0.5, "QUERIES": queries, "KEYS": KEYS}
    out, lse = launch(_attention, (T // queries,), [q_TH, k_SH, v_SH], results, interpret=interpret, **constants)
    return out, lse


@triton.jit
@no_type_check
def _attention(
    q, k, v, out, lse, S: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):
    t, h = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, H)
    query = tl.load(q + t[:, None] * H + h[None, :])
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)  # m
    total = tl.zeros((QUERIES,), tl.float32)  # l
    weighted = tl.zeros((QUERIES, H), tl.float32)  # o
    for start in range(0, S, KEYS):
        tile = (start + tl.arange(0, KEYS))[:, None] * H + h[None, :]
        logit = tl.dot(query, tl.trans(tl.load(k + tile))) * SCALE
        larger = tl.maximum(largest, tl.max(logit, 1))
        faded = tl.exp(largest - larger)
        weight = tl.exp(logit - larger[:, None])
        total = total * faded + tl.sum(weight, 1)
        weighted = tl.dot(weight.to(tl.bfloat16), tl.load(v + tile), weighted * faded[:, None])
        largest = larger
    tl.store(out + t[:, None] * H + h[None, :], (weighted / total[:, None]).to(tl.bfloat16))
    tl.store(lse + t, largest + tl.log(total))
