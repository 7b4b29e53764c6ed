"""Causal attention over a whole sequence, as training needs it."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def causal_attention(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"], window: int = 0
) -> Float[Array, "B T N H"]:
    """Attend from every token to itself and to the tokens before it, of a `window` the last ones only, scaled by 1/sqrt(H).

    Query head n reads KV head n // (N/K). On a CPU it runs block by block and never holds more than one row's logits
    (FlashAttention, Dao et al. 2022, algorithms 1 and 4); elsewhere it is `jax.nn.dot_product_attention`.
    """
    local = (window - 1, 0) if window else None
    elsewhere = functools.partial(jax.nn.dot_product_attention, is_causal=True, local_window_size=local)
    return lax.platform_dependent(q_BTNH, k_BTKH, v_BTKH, cpu=functools.partial(_blockwise, window), default=elsewhere)


product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocks(T: int):
    """Query blocks as (start, stop): 64 rows keep a block's logits in a core's cache; at most 16 keep the program short."""
    size = max(64, -(-T // 16))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _logits(q_KGTH, k_KTH, start: int, stop: int, window: int):
    """Masked logits of the query rows start…stop-1 against the keys that they may see, [K, G, stop-start, stop]."""
    logits = jnp.einsum("KGTH,KSH->KGTS", q_KGTH[:, :, start:stop], k_KTH[:, :stop], preferred_element_type=jnp.float32)
    seen_TS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
    if window:
        seen_TS &= jnp.arange(start, stop)[:, None] - jnp.arange(stop) < window
    return jnp.where(seen_TS, logits, -jnp.inf)


def _row_forward(window, qkv):
    q_KGTH, k_KTH, v_KTH = qkv
    outs, lses = [], []
    for start, stop in _blocks(q_KGTH.shape[2]):
        logits = _logits(q_KGTH, k_KTH, start, stop, window)
        top = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        out = product("KGTS,KSH->KGTH", weights.astype(v_KTH.dtype), v_KTH[:, :stop])
        outs.append(out / total)
        lses.append(top + jnp.log(total))
    return jnp.concatenate(outs, 2), jnp.concatenate(lses, 2)


def _row_backward(window, residuals):
    q_KGTH, k_KTH, v_KTH, out_KGTH, lse_KGT1, dout_KGTH = residuals
    delta = (out_KGTH * dout_KGTH).sum(-1, keepdims=True)
    # The gradients of K and V are summed up with H before T: the other way round, each block's weights would be transposed first.
    K, T, H = k_KTH.shape
    dqs, dk_KHT, dv_KHT = [], jnp.zeros((K, H, T), jnp.float32), jnp.zeros((K, H, T), jnp.float32)
    for start, stop in _blocks(T):
        q, dout = q_KGTH[:, :, start:stop], dout_KGTH[:, :, start:stop]
        weights = jnp.exp(_logits(q_KGTH, k_KTH, start, stop, window) - lse_KGT1[:, :, start:stop])
        dweights = product("KGTH,KSH->KGTS", dout.astype(v_KTH.dtype), v_KTH[:, :stop])
        dlogits = (weights * (dweights - delta[:, :, start:stop])).astype(q.dtype)
        dv_KHT = dv_KHT.at[:, :, :stop].add(product("KGTH,KGTS->KHS", dout, weights))
        dk_KHT = dk_KHT.at[:, :, :stop].add(product("KGTH,KGTS->KHS", q, dlogits))
        dqs.append(product("KGTS,KSH->KGTH", dlogits, k_KTH[:, :stop]))
    return jnp.concatenate(dqs, 2), dk_KHT, dv_KHT


# Row by row (`lax.map`): one row's blocks stay in the caches, which on two cores halved the time of the whole batch at once.
def by_row(q_BTNH, k_BTKH, v_BTKH):
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    return q, k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)


def to_tokens(x_BKGTH, like_BTNH):
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(like_BTNH.shape).astype(like_BTNH.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(window, q_BTNH, k_BTKH, v_BTKH):
    return _blockwise_forward(window, q_BTNH, k_BTKH, v_BTKH)[0]


def _blockwise_forward(window, q_BTNH, k_BTKH, v_BTKH):
    out, lse = lax.map(functools.partial(_row_forward, window), by_row(q_BTNH, k_BTKH, v_BTKH))
    return to_tokens(out, q_BTNH), (q_BTNH, k_BTKH, v_BTKH, out, lse)


def _blockwise_backward(window, residuals, dout_BTNH):
    q_BTNH, k_BTKH, v_BTKH, out, lse = residuals
    q, k, v = by_row(q_BTNH, k_BTKH, v_BTKH)
    B, T, N, H = q_BTNH.shape
    dout = dout_BTNH.reshape(B, T, k.shape[1], N // k.shape[1], H).transpose(0, 2, 3, 1, 4).astype(jnp.float32)
    dq, dk_BKHT, dv_BKHT = lax.map(functools.partial(_row_backward, window), (q, k, v, out, lse, dout))
    to_kv = lambda x_BKHT, like: x_BKHT.transpose(0, 3, 1, 2).astype(like.dtype)
    return to_tokens(dq * H**-0.5, q_BTNH), to_kv(dk_BKHT, k_BTKH), to_kv(dv_BKHT, v_BTKH)


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
