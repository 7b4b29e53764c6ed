"""Causal attention over a whole sequence, as training needs it."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kvcascade.kernels.backend import capability, target


def causal_attention(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"], window: int = 0
) -> Float[Array, "B T N H"]:
    """Attend from every token to itself and to the tokens before it, of a `window` the last ones only, scaled by 1/sqrt(H).

    Query head n reads KV head n // (N/K). On a CPU it runs row by row and block by block, in memory linear in T, and leaves out what
    a window hides (FlashAttention, Dao et al. 2022, algorithms 1 and 4); elsewhere it is `jax.nn.dot_product_attention`, by cuDNN
    where that can.
    """
    elsewhere = cudnn if capability() and not cudnn_refuses(q_BTNH, k_BTKH, v_BTKH) else _xla
    on_cpu, elsewhere = functools.partial(_blockwise, window), functools.partial(elsewhere, window)
    return lax.platform_dependent(q_BTNH, k_BTKH, v_BTKH, cpu=on_cpu, default=elsewhere)


def _xla(window, q_BTNH, k_BTKH, v_BTKH, implementation=None):
    local = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, local_window_size=local, implementation=implementation
    )


def cudnn(
    window: int, q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """`causal_attention` by NVIDIA's library, in 16 bits."""
    return _xla(window, q_BTNH, k_BTKH, v_BTKH, "cudnn")


def cudnn_refuses(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> str | None:
    """Why cuDNN cannot, or None: it says by itself which types and head widths it takes, and whether it is installed."""
    if target.value:
        return "cuDNN cannot be asked about a GPU that is not there"
    try:
        jax.eval_shape(functools.partial(cudnn, 0), q_BTNH, k_BTKH, v_BTKH)
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


def _logits(q_KGTH, k_KSH, start, first, window: int):
    """Masked logits of the queries from the `start`-th on and the keys from the `first`-th on, [K, G, T, S]."""
    logits = jnp.einsum("KGTH,KSH->KGTS", q_KGTH, k_KSH, preferred_element_type=jnp.float32)
    age_TS = (start + jnp.arange(q_KGTH.shape[2]))[:, None] - (first + jnp.arange(k_KSH.shape[1]))
    return jnp.where((age_TS >= 0) & (age_TS < window) if window else age_TS >= 0, logits, -jnp.inf)


def _row_forward(window, qkv):
    q_KGTH, k_KTH, v_KTH = qkv

    def block(carry, start, size, first, keys):
        out_KGTH, lse_KGT1 = carry
        logits = _logits(_cut(q_KGTH, start, size), _cut(k_KTH, first, keys), start, first, window)
        top = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        out = product("KGTS,KSH->KGTH", weights.astype(v_KTH.dtype), _cut(v_KTH, first, keys))
        return _put(out_KGTH, start, out / total), _put(lse_KGT1, start, top + jnp.log(total))

    start = jnp.zeros(q_KGTH.shape, jnp.float32), jnp.zeros((*q_KGTH.shape[:-1], 1), jnp.float32)
    return _in_turn(q_KGTH.shape[2], window, block, start)


def _row_backward(window, residuals):
    q_KGTH, k_KTH, v_KTH, out_KGTH, lse_KGT1, dout_KGTH = residuals
    delta_KGT1 = (out_KGTH * dout_KGTH).sum(-1, keepdims=True)

    def block(carry, start, size, first, keys):
        dq_KGTH, dk_KHT, dv_KHT = carry
        q, dout = _cut(q_KGTH, start, size), _cut(dout_KGTH, start, size)
        k, v = _cut(k_KTH, first, keys), _cut(v_KTH, first, keys)
        weights = jnp.exp(_logits(q, k, start, first, window) - _cut(lse_KGT1, start, size))
        dweights = product("KGTH,KSH->KGTS", dout.astype(v.dtype), v)
        dlogits = (weights * (dweights - _cut(delta_KGT1, start, size))).astype(q.dtype)
        return (
            _put(dq_KGTH, start, product("KGTS,KSH->KGTH", dlogits, k)),
            _add(dk_KHT, first, product("KGTH,KGTS->KHS", q, dlogits)),
            _add(dv_KHT, first, product("KGTH,KGTS->KHS", dout, weights)),
        )

    # The gradients of K and V are summed up with H before T: the other way round, each block's weights would be transposed first.
    zeros = lambda shape: jnp.zeros(shape, jnp.float32)
    turned = lambda x_KTH: zeros((x_KTH.shape[0], x_KTH.shape[2], x_KTH.shape[1]))
    return _in_turn(q_KGTH.shape[2], window, block, (zeros(q_KGTH.shape), turned(k_KTH), turned(v_KTH)))


def _add(x_KHT, first, part):
    here = lax.dynamic_slice_in_dim(x_KHT, first, part.shape[-1], -1)
    return lax.dynamic_update_slice_in_dim(x_KHT, here + part, first, -1)


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
