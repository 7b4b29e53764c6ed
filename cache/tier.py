"""A fixed number of slots with a policy and a codec."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvcascade.cache.codec import Codec, bf16
from kvcascade.cache.errors import BadInput
from kvcascade.cache.policy import Full, Heavy, Policy, PositionAware, Random, Recent, Sink, text
from kvcascade.kernels.slots import Entry, Slots
from kvcascade.kernels.write import exchange


@dataclasses.dataclass(frozen=True)
class Tier:
    """What a tier is: its policy, its slots per KV head (a number, or a share of the context such as `25%`), its codec."""

    policy: Policy
    count: int | str
    codec: Codec = bf16

    def __post_init__(self):
        if isinstance(self.count, str):
            if not re.fullmatch(r"\d+(\.\d+)?%", self.count) or not 0 < float(self.count[:-1]) <= 100:
                raise BadInput(f"{self.count!r} is not a share of the context between 0% and 100%")
        elif self.count < 1:
            raise BadInput(f"a tier needs at least 1 slot, not {self.count}")
        if isinstance(self.policy, Full) and self.count != "100%":
            raise BadInput("full keeps the whole context and takes no number of slots")

    def slots(self, context: int) -> int:
        """Slots per KV head for a context of so many tokens; a share is rounded, to at least one."""
        if isinstance(self.count, str):
            return max(1, round(context * float(self.count[:-1]) / 100))
        return self.count

    def nbytes(self, context: int, head_dim: int, scored: bool) -> int:
        """Predicted bytes per row, layer and KV head: codes and scales of K and V, an int32 position, a float32 score if kept."""
        return self.slots(context) * (2 * self.codec.nbytes(head_dim) + 4 + 4 * scored)

    def __str__(self) -> str:
        count = "" if isinstance(self.policy, Full) else f" {self.count}"
        return text(self.policy) + count + ("" if self.codec == bf16 else f"@{self.codec.name}")


full = Tier(Full(), "100%")
sink = functools.partial(Tier, Sink())
recent = functools.partial(Tier, Recent())
heavy = functools.partial(Tier, Heavy())
random = functools.partial(Tier, Random())
position_aware = functools.partial(Tier, PositionAware())


def empty(tier: Tier, batch: int, kv_heads: int, head_dim: int, context: int, scored: bool) -> Slots:
    """Slots that hold nothing."""
    shape = (batch, kv_heads, tier.slots(context))
    encode = lambda: tier.codec.encode(jnp.zeros((*shape, head_dim)))
    return Slots(encode(), encode(), jnp.full(shape, -1, jnp.int32), jnp.zeros(shape) if scored else None)


@jax.named_scope("priority")
def take_in(
    tier: Tier, slots: Slots, entry: Entry, now_B11: Int[Array, "B 1 1"], last: bool
) -> tuple[Slots, Entry | None]:
    """Offer T tokens to a tier; return its slots after it kept the S best of S + T, and the T tokens that it did not keep.

    An empty slot always loses. The last tier cannot refuse the token at position `now`, and forgets what it does not keep (None).
    """
    pos = jnp.concatenate([slots.pos_BKS, entry.pos_BKT], -1)
    if slots.score_BKS is None:
        score = jnp.zeros(pos.shape)
    else:
        score = jnp.concatenate([slots.score_BKS, entry.score_BKT], -1)
    priority = jnp.maximum(tier.policy.priority(pos, score, now_B11), jnp.finfo(jnp.float32).min)
    priority = jnp.where(pos < 0, -jnp.inf, priority)
    if last:
        priority = jnp.where((pos >= 0) & (pos == now_B11), jnp.inf, priority)
    return exchange(slots, entry, priority, tier.codec, forget=last)
