"""Attention over a prompt that an empty cache is to take in, with what its policies ask of it: the mass that each key received."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.kernels import launch
from kvcascade.kernels.backend import Implementation, Kernel, capability, run
from kvcascade.kernels.causal import by_row, causal_attention, cudnn, cudnn_refuses, to_tokens
from kvcascade.kernels.heads import Heads

type Result = tuple[Float[Array, "B T N W"], Float[Array, "B K T"]]


def observed_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKW: Float[Array, "B T K W"],
    length_B: Int[Array, " B"],
    heads: Heads,
    last: int = 0,
    implementation: Implementation | None = None,
) -> Result:
    """`causal_attention`, and the attention that each key received from its row's queries, summed over them and over their group.

    A row has `length` tokens; what is on their right is padding, which counts for nothing, and whose output means nothing.
    With `last` only the row's last so many queries count: SnapKV's score of a prompt's keys before it is pooled (Li et al. 2024,
    §4.1, with an observation window of `last`). Never holds more than a block of queries' weights: memory is linear in T.
    `xla` runs everywhere, in float32; `triton` is for a GPU: cuDNN's attention, and a kernel of ours for the mass.
    """
    reference, on_gpu = (functools.partial(each, heads, last) for each in (_blockwise, _triton))
    kernels = {"triton": Kernel(on_gpu, functools.partial(_triton_refuses, heads))}
    return run(implementation, reference, kernels, q_BTNH, k_BTKH, v_BTKW, length_B, axes="B_K B_K B_K B -> B_K BK")


def _blockwise(heads, last, q_BTNH, k_BTKH, v_BTKW, length_B) -> Result:
    rows = by_row(heads, *(x.astype(jnp.float32) for x in (q_BTNH, k_BTKH, v_BTKW)))
    out, mass_BKT = lax.map(functools.partial(_row, heads, last), (*rows, length_B))
    return to_tokens(out, q_BTNH), mass_BKT


def _row(heads, last, row):
    q_KGTH, k_KTH, v_KTH, length = row
    K, G, T, H = q_KGTH.shape
    size = min(T, 64)
    blocks = -(-T // size)
    q_KGTH = jnp.pad(q_KGTH, [(0, 0), (0, 0), (0, blocks * size - T), (0, 0)])
    q = q_KGTH.reshape(K, G, blocks, size, H).transpose(2, 0, 1, 3, 4)
    outs, mass_KT = [], jnp.zeros((K, T))
    # At most eight scans, so that few blocks see many more keys than they need. A scan takes the mass from the one before,
    # which makes XLA run them in turn: blocks that do not wait for each other hold their weights all at the same time.
    together = -(-blocks // 8)
    for first in range(0, blocks, together):
        some = slice(first, first + together)
        block = functools.partial(
            _block, heads, last, length, k_KTH[:, : some.stop * size], v_KTH[:, : some.stop * size]
        )
        mass_KT, out = lax.scan(block, mass_KT, (q[some], jnp.arange(blocks)[some] * size))
        outs.append(out)
    out_KGTW = jnp.concatenate(outs).transpose(1, 2, 0, 3, 4).reshape(K, G, blocks * size, -1)
    return out_KGTW[:, :, :T], mass_KT


def _block(heads, last, length, k_KSH, v_KSH, mass_KT, block):
    """Attention from a block of queries, the first of which is the `start`-th; adds to the mass of all keys."""
    q_KGTH, start = block
    tokens, S = mass_KT.shape[1], k_KSH.shape[1]
    index_T = start + jnp.arange(q_KGTH.shape[2])
    # What fills the last block up sees what the last query sees: with nothing to see its weights would be NaN.
    age_TS = jnp.minimum(index_T, tokens - 1)[:, None] - jnp.arange(S)
    logits = heads.capped(jnp.einsum("KGTH,KSH->KGTS", q_KGTH, k_KSH))
    logits = jnp.where(heads.sees(age_TS), logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    counts_T1 = ((index_T < length) & (index_T >= length - (last or tokens)))[:, None]
    mass_KT = mass_KT.at[:, :S].add(jnp.einsum("KGTS,KGTX->KS", weights, counts_T1 / total))
    return mass_KT, jnp.einsum("KGTS,KSH->KGTH", weights, v_KSH) / total


def _triton(heads, last, q_BTNH, k_BTKH, v_BTKW, length_B, interpret) -> Result:
    from kvcascade.kernels import prefill_triton

    attention = causal_attention if interpret else cudnn
    mass_BKT = prefill_triton.mass(q_BTNH, k_BTKH, length_B, heads, last, interpret)
    return attention(q_BTNH, k_BTKH, v_BTKW, heads), mass_BKT


def _triton_refuses(heads, q_BTNH, k_BTKH, v_BTKW, length_B) -> str | None:
    return launch.refuses() or (cudnn_refuses(q_BTNH, k_BTKH, v_BTKW, heads) if capability() else None)
