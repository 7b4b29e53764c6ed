"""Tokens in the order of their positions: in segments, and beside their neighbours."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


@dataclasses.dataclass(frozen=True)
class Segments:
    """A head's tokens in the order of their positions, after the first few in segments of so many."""

    order: Int[Array, "B K S"]
    count: Int[Array, "B K 1"]
    """Tokens that are there."""
    size: int
    skip: int

    @classmethod
    def of(cls, pos_BKS: Int[Array, "B K S"], size: int, skip: int = 0) -> "Segments":
        """Segments of the tokens at these positions; empty slots come last."""
        last = jnp.where(pos_BKS < 0, jnp.iinfo(jnp.int32).max, pos_BKS)
        return cls(jnp.argsort(last, -1), (pos_BKS >= 0).sum(-1, keepdims=True), size, skip)

    @property
    def number(self) -> int:
        """Segments that there is room for."""
        return -(-max(self.order.shape[-1] - self.skip, 1) // self.size)

    @property
    def there(self) -> Bool[Array, "B K segments size"]:
        """Where a segment has a token."""
        places = jnp.arange(self.number * self.size).reshape(self.number, self.size)
        return places + self.skip < self.count[..., None]

    def whole(self, following: int) -> Bool[Array, "B K segments 1"]:
        """Whether a segment and so many after it have all their tokens."""
        return (jnp.arange(self.number)[:, None] + following + 1) * self.size + self.skip <= self.count[..., None]

    def sorted(self, x: Shaped[Array, "B K S ..."]) -> Shaped[Array, "B K S ..."]:
        """Something of each slot in the order of positions."""
        return jnp.take_along_axis(x, self.order.reshape(*self.order.shape, *(1,) * (x.ndim - 3)), 2)

    def unsorted(self, x_BKS: Float[Array, "B K S"]) -> Float[Array, "B K S"]:
        """A number of each token in the order of slots."""
        return jnp.take_along_axis(x_BKS, jnp.argsort(self.order, -1), 2)

    def cut(self, x: Float[Array, "B K S H"]) -> Float[Array, "B K segments size H"]:
        """Vectors in segments; there are zeros where no slots are left."""
        x = self.sorted(x)[:, :, self.skip :]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.number * self.size - x.shape[2]), (0, 0)))
        return x.reshape(*x.shape[:2], self.number, self.size, -1)

    def put(self, x: Float[Array, "B K segments size"], before: float) -> Float[Array, "B K S"]:
        """A number of each place in a segment in the order of slots, and one for those before the first segment."""
        S = self.order.shape[-1]
        flat = x.reshape(*x.shape[:2], -1)[:, :, : max(S - self.skip, 0)]
        first = jnp.full((*flat.shape[:2], S - flat.shape[2]), before, flat.dtype)
        return self.unsorted(jnp.concatenate([first, flat], -1))


def neighbours(x_BKS: Float[Array, "B K S"], pos_BKS: Int[Array, "B K S"], kernel: int) -> Float[Array, "B K S"]:
    """The mean of a number over `kernel` tokens in the order of positions, the token in their middle; where none is, there is nothing to add."""
    S = x_BKS.shape[-1]
    if min(S, kernel) == 1:
        return x_BKS
    segments = Segments.of(pos_BKS, 1)
    x = segments.sorted(jnp.where(pos_BKS >= 0, x_BKS, 0))
    wide = jnp.pad(x, ((0, 0), (0, 0), (kernel // 2, kernel - 1 - kernel // 2)))
    return segments.unsorted(sum((wide[..., i : i + S] for i in range(kernel)), jnp.zeros_like(x)) / kernel)
