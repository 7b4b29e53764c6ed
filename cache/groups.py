"""KV heads of a layer that share a cascade: each group holds slots of its own, so what a head does not keep takes no bytes."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvcascade.cache.cascade import Cascade
from kvcascade.kernels.heads import Heads


class Group(NamedTuple):
    """Some KV heads of one of a model's layers, and the cascade of each of them."""

    layer: int
    chosen: tuple[int, ...]
    """Which of the layer's KV heads."""
    cascade: Cascade
    of: Heads
    """All of the layer's heads."""

    @property
    def heads(self) -> Heads:
        """The group's heads, with the query heads that read them."""
        return self.of.part(len(self.chosen))

    @property
    def ids(self) -> tuple[int, ...]:
        """Their numbers among the KV heads of all layers."""
        return tuple(self.layer * self.of.kv + head for head in self.chosen)

    @property
    def whole(self) -> bool:
        """Whether these are all heads of their layer."""
        return len(self.chosen) == self.of.kv

    def nbytes(self, context: int) -> int:
        """Predicted bytes of one row."""
        return self.cascade.nbytes(context, self.heads)


class Share(NamedTuple):
    """Which of a cache's parts holds which KV heads of a layer."""

    place: int
    chosen: tuple[int, ...]


class Vectors(NamedTuple):
    """What a layer's attention is about: queries, keys, values, and what those write to the residual stream."""

    q_BTNH: Float[Array, "B T N H"]
    k_BTKH: Float[Array, "B T K H"]
    v_BTKW: Float[Array, "B T K W"]
    written_BTK: Float[Array, "B T K"] | None

    def of(self, chosen: Sequence[int]) -> "Vectors":
        """Those of some KV heads and of the query heads that read them."""
        B, T, N, H = self.q_BTNH.shape
        K = self.k_BTKH.shape[2]
        if [*chosen] == [*range(K)]:
            return self
        index = np.asarray(chosen)
        q_BTNH = self.q_BTNH.reshape(B, T, K, N // K, H)[:, :, index].reshape(B, T, -1, H)
        written_BTK = None if self.written_BTK is None else self.written_BTK[:, :, index]
        return Vectors(q_BTNH, self.k_BTKH[:, :, index], self.v_BTKW[:, :, index], written_BTK)


def joined(shares: Sequence[Share], outs: Sequence[Float[Array, "B T _ W"]]) -> Float[Array, "B T N W"]:
    """What all query heads of a layer get, from what those of its parts do."""
    if len(outs) == 1:
        return outs[0]
    chosen = [head for share in shares for head in share.chosen]
    by_head = [
        x.reshape(*x.shape[:2], len(share.chosen), -1, x.shape[3]) for share, x in zip(shares, outs, strict=True)
    ]
    whole = jnp.concatenate(by_head, 2)[:, :, np.argsort(chosen)]
    return whole.reshape(*whole.shape[:2], -1, whole.shape[4])
