"""Causal attention over a whole sequence, as training needs it."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kvcascade.kernels.backend import capability, target
from kvcascade.kernels.heads import Heads


def causal_attention(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKW: Float[Array, "B T K W"], heads: Heads
) -> Float[Array, "B T N W"]:
    """Attend from every token to itself and to the tokens before it, as far as these heads see.

    Query head n reads KV head n // (N/K). On a CPU it runs block by block and never holds more than one row's logits
    (FlashAttention, Dao et al. 2022, algorithms 1 and 4); elsewhere it is `jax.nn.dot_product_attention`, by cuDNN where that can.
    """
    on_cpu = functools.partial(_blockwise, heads)
    if capability() and not cudnn_refuses(q_BTNH, k_BTKH, v_BTKW, heads):
        elsewhere = functools.partial(cudnn, heads=heads)
    elif heads.soft_cap or heads.value_width != heads.width:
        elsewhere = on_cpu
    else:
        elsewhere = functools.partial(_xla, heads=heads)
    return lax.platform_dependent(q_BTNH, k_BTKH, v_BTKW, cpu=on_cpu, default=elsewhere)


def _xla(q_BTNH, k_BTKH, v_BTKW, heads, implementation=None):
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKW,
        is_causal=True,
        scale=heads.scale,
        local_window_size=(heads.window - 1, 0) if heads.window else None,
        implementation=implementation,
    )


def cudnn(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKW: Float[Array, "B T K W"], heads: Heads
) -> Float[Array, "B T N W"]:
    """`causal_attention` by NVIDIA's library, in 16 bits."""
    return _xla(q_BTNH, k_BTKH, v_BTKW, heads, "cudnn")


def cudnn_refuses(q_BTNH: Array, k_BTKH: Array, v_BTKW: Array, heads: Heads) -> str | None:
    """Why cuDNN cannot, or None: it says by itself which types and head widths it takes, and whether it is installed."""
    if target.value:
        return "cuDNN cannot be asked about a GPU that is not there"
    if heads.soft_cap:
        return "cuDNN has no soft cap"
    try:
        jax.eval_shape(functools.partial(cudnn, heads=heads), q_BTNH, k_BTKH, v_BTKW)
    except (NotImplementedError, RuntimeError, ValueError) as refused:
        return f"cuDNN: {refused}"
    return None


product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


BLOCK = 64  # queries: their logits stay in a core's cache
LOOPS = (
    16  # over blocks: they keep the program short, and in each the first block multiplies few more keys than it sees
)


def _in_turn(T: int, window: int, block, carry):
    """`carry = block(carry, start, queries, first, keys)` for each block, which is so many queries and the keys that they may see."""
    seen = lambda stop, queries: min(stop, queries + window - 1) if window else stop
    blocks, rest = divmod(T, BLOCK)
    together = max(1, -(-blocks // LOOPS))
    for begin in range(0, blocks, together):
        end = min(begin + together, blocks)
        keys = seen(end * BLOCK, BLOCK)

        def one(index, carry, keys=keys):
            return block(carry, index * BLOCK, BLOCK, jnp.maximum(0, (index + 1) * BLOCK - keys), keys)

        # Each loop takes what the one before has made, so that XLA does not hold the weights of several at the same time.
        carry = lax.fori_loop(begin, end, one, carry)
    keys = seen(T, rest)
    return block(carry, T - rest, rest, T - keys, keys) if rest else carry


def _cut(x, start, size):
    """So many tokens of [..., T, H]."""
    return lax.dynamic_slice_in_dim(x, start, size, -2)


def _put(x, start, part):
    return lax.dynamic_update_slice_in_dim(x, part, start, -2)


def _logits(heads: Heads, q_KGTH, k_KSH, start, first):
    """Masked logits of the queries from the `start`-th on and the keys from the `first`-th on, [K, G, T, S]."""
    logits = jnp.einsum("KGTH,KSH->KGTS", q_KGTH, k_KSH, preferred_element_type=jnp.float32)
    age_TS = (start + jnp.arange(q_KGTH.shape[2]))[:, None] - (first + jnp.arange(k_KSH.shape[1]))
    return jnp.where(heads.sees(age_TS), heads.capped(logits), -jnp.inf)


def _row_forward(heads, qkv):
    q_KGTH, k_KTH, v_KTW = qkv

    def block(carry, start, size, first, keys):
        out_KGTW, lse_KGT1 = carry
        logits = _logits(heads, _cut(q_KGTH, start, size), _cut(k_KTH, first, keys), start, first)
        top = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        out = product("KGTS,KSW->KGTW", weights.astype(v_KTW.dtype), _cut(v_KTW, first, keys))
        return _put(out_KGTW, start, out / total), _put(lse_KGT1, start, top + jnp.log(total))

    wide = lambda width: jnp.zeros((*q_KGTH.shape[:-1], width), jnp.float32)
    return _in_turn(q_KGTH.shape[2], heads.window, block, (wide(v_KTW.shape[-1]), wide(1)))


def _row_backward(heads, residuals):
    q_KGTH, k_KTH, v_KTW, out_KGTW, lse_KGT1, dout_KGTW = residuals
    delta_KGT1 = (out_KGTW * dout_KGTW).sum(-1, keepdims=True)

    def block(carry, start, size, first, keys):
        dq_KGTH, dk_KHT, dv_KWT = carry
        q, dout = _cut(q_KGTH, start, size), _cut(dout_KGTW, start, size)
        k, v = _cut(k_KTH, first, keys), _cut(v_KTW, first, keys)
        logits = _logits(heads, q, k, start, first)
        weights = jnp.exp(logits - _cut(lse_KGT1, start, size))
        dweights = product("KGTW,KSW->KGTS", dout.astype(v.dtype), v)
        dlogits = weights * (dweights - _cut(delta_KGT1, start, size))
        if heads.soft_cap:  # tanh' = 1 - tanh²; what is not seen is -inf
            dlogits = jnp.where(weights > 0, dlogits * (1 - (logits / heads.soft_cap) ** 2), 0)
        dlogits = dlogits.astype(q.dtype)
        return (
            _put(dq_KGTH, start, product("KGTS,KSH->KGTH", dlogits, k)),
            _add(dk_KHT, first, product("KGTH,KGTS->KHS", q, dlogits)),
            _add(dv_KWT, first, product("KGTW,KGTS->KWS", dout, weights)),
        )

    # The gradients of K and V are summed up with H before T: the other way round, each block's weights would be transposed first.
    zeros = lambda shape: jnp.zeros(shape, jnp.float32)
    turned = lambda x_KTH: zeros((x_KTH.shape[0], x_KTH.shape[2], x_KTH.shape[1]))
    return _in_turn(q_KGTH.shape[2], heads.window, block, (zeros(q_KGTH.shape), turned(k_KTH), turned(v_KTW)))


def _add(x_KHT, first, part):
    here = lax.dynamic_slice_in_dim(x_KHT, first, part.shape[-1], -1)
    return lax.dynamic_update_slice_in_dim(x_KHT, here + part, first, -1)


# Row by row (`lax.map`): one row's blocks stay in the caches, which on two cores halved the time of the whole batch at once.
def by_row(heads: Heads, q_BTNH, k_BTKH, v_BTKW):
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q = (q_BTNH * heads.scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    return q, k_BTKH.transpose(0, 2, 1, 3), v_BTKW.transpose(0, 2, 1, 3)


def to_tokens(x_BKGTW, like_BTNH):
    return x_BKGTW.transpose(0, 3, 1, 2, 4).reshape(*like_BTNH.shape[:3], -1).astype(like_BTNH.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(heads, q_BTNH, k_BTKH, v_BTKW):
    return _blockwise_forward(heads, q_BTNH, k_BTKH, v_BTKW)[0]


def _blockwise_forward(heads, q_BTNH, k_BTKH, v_BTKW):
    out, lse = lax.map(functools.partial(_row_forward, heads), by_row(heads, q_BTNH, k_BTKH, v_BTKW))
    return to_tokens(out, q_BTNH), (q_BTNH, k_BTKH, v_BTKW, out, lse)


def _blockwise_backward(heads, residuals, dout_BTNW):
    q_BTNH, k_BTKH, v_BTKW, out, lse = residuals
    q, k, v = by_row(heads, q_BTNH, k_BTKH, v_BTKW)
    B, T, N, H = q_BTNH.shape
    dout = dout_BTNW.reshape(B, T, k.shape[1], N // k.shape[1], -1).transpose(0, 2, 3, 1, 4).astype(jnp.float32)
    dq, dk_BKHT, dv_BKWT = lax.map(functools.partial(_row_backward, heads), (q, k, v, out, lse, dout))
    to_kv = lambda x_BKHT, like: x_BKHT.transpose(0, 3, 1, 2).astype(like.dtype)
    return to_tokens(dq * heads.scale, q_BTNH), to_kv(dk_BKHT, k_BTKH), to_kv(dv_BKWT, v_BTKW)


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
