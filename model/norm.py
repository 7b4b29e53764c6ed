"""Norms whose results on a CPU do not depend on how many rows are normalised beside a row."""

import functools
import operator

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

FEW = 256
"""Tokens of a call up to which a row's sums have one order. Of more, as in training, XLA chooses one."""


class RMSNorm(nnx.RMSNorm):
    """nnx's, where a call has many tokens."""

    def __call__(self, x: Float[Array, "B T *more"], mask=None) -> Float[Array, "B T *more"]:
        """x over the root of its mean square, in float32."""
        if x.shape[0] * x.shape[1] > FEW:
            return super().__call__(x)
        assert self.scale is not None
        x = x.astype(jnp.float32)
        return x * (lax.rsqrt(_mean(x * x) + self.epsilon) * self.scale[...])


class LayerNorm(nnx.LayerNorm):
    """nnx's, where a call has many tokens."""

    def __call__(self, x: Float[Array, "B T *more"], *, mask=None) -> Float[Array, "B T *more"]:
        """x less its mean, over its deviation, in float32."""
        if x.shape[0] * x.shape[1] > FEW:
            return super().__call__(x)
        assert self.scale is not None and self.bias is not None
        x = x.astype(jnp.float32)
        mean = _mean(x)
        variance = jnp.maximum(_mean(x * x) - mean * mean, 0)
        return (x - mean) * (lax.rsqrt(variance + self.epsilon) * self.scale[...]) + self.bias[...]


def _mean(x: Float[Array, "*B M"]) -> Float[Array, "*B 1"]:
    """The mean of the last axis; how its numbers are added up on a CPU does not depend on how many rows there are."""
    return lax.platform_dependent(x, cpu=_by_halves, default=lambda x: x.mean(-1, keepdims=True))


def _by_halves(x: Float[Array, "*B M"]) -> Float[Array, "*B 1"]:
    """Halves added to halves: XLA's own sums go another way from eight rows on."""
    count, parts = x.shape[-1], x
    while parts.shape[-1] % 2 == 0:
        half = parts.shape[-1] // 2
        parts = parts[..., :half] + parts[..., half:]
    return functools.reduce(operator.add, [parts[..., i : i + 1] for i in range(parts.shape[-1])]) / count
