"""The cross-entropy of a language model's head, without ever holding all logits."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.kernels.heads import capped

ROWS = 512  # tokens at once: their logits fit a core's share of the last-level cache for a small vocabulary


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_nll(
    x_TM: Float[Array, "T M"], head_VM: Float[Array, "V M"], target_T: Int[Array, " T"], soft_cap: float = 0.0
) -> Float[Array, " T"]:
    """The negative log-likelihood in nats of each target under softmax(x · headᵀ), float32; `soft_cap` as in `heads.capped`.

    Logits are made for a block of tokens at a time and made again in the backward pass, so T x V numbers are never held
    (Cut Cross-Entropy, Wijmans et al. 2024, §4); nothing is scattered and no large array transposed.
    """
    return _forward(x_TM, head_VM, target_T, soft_cap)[0]


def _logits(x_TM, head_VM, soft_cap):
    return capped(jnp.einsum("TM,VM->TV", x_TM, head_VM, preferred_element_type=jnp.float32), soft_cap)


def _hit(logits_TV, target_T):
    return jnp.arange(logits_TV.shape[1]) == target_T[:, None]


def _blocks(*arrays):
    """Each array cut along its first axis into as few equal blocks of at most ROWS as there can be, the last one filled up with zeros.

    What fills it up gives no loss to anyone, and takes no gradient: its x and its dnll are 0.
    """
    T = arrays[0].shape[0]
    count = -(-T // ROWS)
    rows = -(-T // count)
    filled = (jnp.pad(x, [(0, count * rows - T)] + [(0, 0)] * (x.ndim - 1)) for x in arrays)
    return tuple(x.reshape(count, rows, *x.shape[1:]) for x in filled)


def _forward(x_TM, head_VM, target_T, soft_cap):
    def block(xs):
        x, target = xs
        logits = _logits(x, head_VM, soft_cap)
        lse = jax.nn.logsumexp(logits, -1)
        return lse, lse - jnp.where(_hit(logits, target), logits, 0).sum(-1)

    lse_T, nll_T = (x.reshape(-1)[: len(target_T)] for x in lax.map(block, _blocks(x_TM, target_T)))
    return nll_T, (x_TM, head_VM, target_T, lse_T)


def _backward(soft_cap, residuals, dnll_T):
    x_TM, head_VM, target_T, lse_T = residuals

    def block(dhead_MV, xs):
        x, target, lse, dnll = xs
        logits = _logits(x, head_VM, soft_cap)
        dlogits = (jnp.exp(logits - lse[:, None]) - _hit(logits, target)) * dnll[:, None]
        if soft_cap:
            dlogits = dlogits * (1 - (logits / soft_cap) ** 2)
        dlogits = dlogits.astype(x.dtype)
        dhead_MV += jnp.einsum("TM,TV->MV", x, dlogits, preferred_element_type=jnp.float32)
        return dhead_MV, jnp.einsum("TV,VM->TM", dlogits, head_VM, preferred_element_type=jnp.float32)

    start = jnp.zeros(head_VM.shape[::-1], jnp.float32)
    dhead_MV, dx = lax.scan(block, start, _blocks(x_TM, target_T, lse_T, dnll_T))
    return dx.reshape(-1, x_TM.shape[1])[: len(x_TM)].astype(x_TM.dtype), dhead_MV.T.astype(head_VM.dtype), None


token_nll.defvjp(_forward, _backward)
