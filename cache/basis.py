"""The basis that vectors are stored in: what their codec sees is what is left of them there."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import Partial, Weights, joined
from kvcascade.kernels.slots import Entry, Held


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["shift_KH", "scale_KH", "matrix_KHH", "inverse_KHH"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Basis:
    """y = ((x − shift) · scale) A, of each KV head its own; what is None is not done. A codec that turns vectors does so after it."""

    shift_KH: Float[Array, "K H"] | None = None
    scale_KH: Float[Array, "K H"] | None = None
    matrix_KHH: Float[Array, "K H H"] | None = None
    inverse_KHH: Float[Array, "K H H"] | None = None

    def of(self, chosen: Sequence[int]) -> "Basis":
        """That of these KV heads alone."""
        return jax.tree.map(lambda x: x[np.asarray(chosen)], self)

    def into(self, x_BKTH: Float[Array, "B K T H"]) -> Float[Array, "B K T H"]:
        """Vectors in the basis."""
        if self.shift_KH is not None:
            x_BKTH = x_BKTH - self.shift_KH[:, None]
        if self.scale_KH is not None:
            x_BKTH = x_BKTH * self.scale_KH[:, None]
        return x_BKTH if self.matrix_KHH is None else _product(x_BKTH, self.matrix_KHH)

    def back(self, y_BKTH: Float[Array, "B K T H"]) -> Float[Array, "B K T H"]:
        """The inverse of that."""
        x_BKTH = y_BKTH if self.inverse_KHH is None else _product(y_BKTH, self.inverse_KHH)
        if self.scale_KH is not None:
            x_BKTH = x_BKTH / self.scale_KH[:, None]
        return x_BKTH if self.shift_KH is None else x_BKTH + self.shift_KH[:, None]

    def asks(self, q_BKTH: Float[Array, "B K T H"]) -> tuple[Float[Array, "B K T H"], Float[Array, "B K T"] | None]:
        """Queries by which products with vectors in the basis are those with the vectors, but for a number of each query's own, or None: the
        one that the shift adds to all of them."""
        more_BKT = None if self.shift_KH is None else _dot(q_BKTH, self.shift_KH)
        if self.scale_KH is not None:
            q_BKTH = q_BKTH / self.scale_KH[:, None]
        if self.inverse_KHH is not None:
            q_BKTH = _product(q_BKTH, self.inverse_KHH.swapaxes(1, 2))
        return q_BKTH, more_BKT

    def out(self, out_BKTH: Float[Array, "B K T H"], sum_BKT1: Float[Array, "B K T 1"]) -> Float[Array, "B K T H"]:
        """Sums of vectors in the basis as sums of the vectors, given the sum of the weights."""
        plain = dataclasses.replace(self, shift_KH=None).back(out_BKTH)
        return plain if self.shift_KH is None else plain + sum_BKT1 * self.shift_KH[:, None]


class Bases(NamedTuple):
    """Those of a tier's keys and of its values."""

    k: Basis = Basis()
    v: Basis = Basis()

    def of(self, chosen: Sequence[int]) -> "Bases":
        """Those of these KV heads alone."""
        return Bases(*(each.of(chosen) for each in self))

    def into(self, entry: Entry) -> Entry:
        """Tokens as the tier stores them."""
        return dataclasses.replace(entry, k=self.k.into(entry.k), v=self.v.into(entry.v))

    def back(self, left: Entry, offered: Entry) -> Entry:
        """Those that a tier left over, in the model's basis; those that were offered are as they came."""
        same = (left.pos_BKT == offered.pos_BKT)[..., None]
        pick = lambda basis, x, y: jnp.where(same, y, basis.back(x))
        return dataclasses.replace(left, k=pick(self.k, left.k, offered.k), v=pick(self.v, left.v, offered.v))


type Attend = Callable[[Float[Array, "B T N H"], list[Held]], tuple[Partial, list[Weights]]]
"""Attention of queries to slots, all of them in the basis that the queries are in."""


def attend_in(
    bases: Sequence[Bases | None], q_BTNH: Float[Array, "B T N H"], held: Sequence[Held], heads: Heads, attend: Attend
) -> tuple[Partial, list[Weights]]:
    """Attention to tiers that are stored in these bases, one call for those in the same; the weights are in the tiers' order."""
    names = [(codecs.k.basis, codecs.v.basis) for _, codecs in held]
    found, order = [], []
    for name in dict.fromkeys(names):
        mine = [index for index, each in enumerate(names) if each == name]
        some = [held[index] for index in mine]
        each = bases[mine[0]] if any(name) else None
        found.append(inside(each, q_BTNH, heads, lambda q, some=some: attend(q, some)))
        order += mine
    whole, weights = joined(found)
    by_tier = dict(zip(order, weights, strict=False))
    return whole, [by_tier[index] for index in sorted(by_tier)]


def inside(
    bases: Bases | None,
    q_BTNH: Float[Array, "B T N H"],
    heads: Heads,
    attend: Callable[[Float[Array, "B T N H"]], tuple[Partial, list[Weights]]],
) -> tuple[Partial, list[Weights]]:
    """Attention to what is stored in these bases, given that of queries in them."""
    if bases is None:
        return attend(q_BTNH)
    (B, T, N, _), K = q_BTNH.shape, heads.kv
    by_head = lambda x: x.reshape(B, T, K, N // K, -1).transpose(0, 2, 1, 3, 4).reshape(B, K, T * (N // K), -1)
    of_queries = lambda x: x.reshape(B, K, T, N // K, -1).transpose(0, 2, 1, 3, 4).reshape(B, T, N, -1)
    q_BKTH, more_BKT = bases.k.asks(by_head(q_BTNH))
    part, weights = attend(of_queries(q_BKTH))
    out = bases.v.out(by_head(part.out_BTNW), by_head(part.sum_BTN[..., None]))
    top_BTN = part.max_BTN if more_BKT is None else part.max_BTN + heads.scale * of_queries(more_BKT)[..., 0]
    return part._replace(out_BTNW=of_queries(out), max_BTN=top_BTN), weights


def _product(x_BKTH, matrix_KHH):
    return jnp.einsum("BKTH,KHJ->BKTJ", x_BKTH.astype(jnp.float32), matrix_KHH, precision="highest")


def _dot(x_BKTH, y_KH):
    return jnp.einsum("BKTH,KH->BKT", x_BKTH.astype(jnp.float32), y_KH, precision="highest")
