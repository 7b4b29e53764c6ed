"""A fixed number of slots with a policy and a codec for keys and for values."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvcascade.cache.basis import Bases
from kvcascade.cache.codec import bf16
from kvcascade.cache.errors import BadInput
from kvcascade.cache.policies import Full, Heavy, Pending, PositionAware, Random, Recent, Sink, text
from kvcascade.cache.policy import Policy
from kvcascade.cache.statistic import Memory, Statistic
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.slots import Codec, Codecs, Entry, Slots
from kvcascade.kernels.write import exchange

PLACES = ("rows", "blocks")
BLOCK = 16
"""Tokens of a block, where nobody says another number."""


@dataclasses.dataclass(frozen=True)
class Tier:
    """What a tier is: its policy, its slots per KV head (a number, or a share of the context such as `25%`), its codec or codecs."""

    policy: Policy
    count: int | str
    codec: Codec | Codecs = bf16
    """One for keys and values, or one each."""
    place: str = "rows"
    """Where its slots are: each row's own, or in blocks of a pool, which rows of the same tokens can share."""

    def __post_init__(self):
        if self.place not in PLACES:
            raise BadInput(f"there is no place {self.place!r}; there are {', '.join(PLACES)}")
        if self.place == "blocks" and not self.policy.append_only:
            raise BadInput(
                f"{text(self.policy)} lets go of what later tokens do not need, and blocks are shared by rows whose later tokens differ"
            )
        if isinstance(self.count, str):
            if isinstance(self.policy, Pending):
                raise BadInput(f"how many tokens wait is a number, not {self.count}")
            if not re.fullmatch(r"\d+(\.\d+)?%", self.count) or not 0 < float(self.count[:-1]) <= 100:
                raise BadInput(f"{self.count!r} is not a share of the context between 0% and 100%")
        elif self.count < 1:
            raise BadInput(f"a tier needs at least 1 slot, not {self.count}")
        if isinstance(self.policy, Full) and self.count != "100%":
            raise BadInput("full keeps the whole context and takes no number of slots")
        if self.codecs.k == self.codecs.v:
            object.__setattr__(self, "codec", self.codecs.k)

    @property
    def codecs(self) -> Codecs:
        """How keys are stored, and how values."""
        return self.codec if isinstance(self.codec, Codecs) else Codecs(self.codec, self.codec)

    def slots(self, context: int, window: int = 0) -> int:
        """Slots per KV head for a context of so many tokens; a share is rounded, to at least one.

        A layer whose queries see only a `window` needs no more than so many, but for those that wait.
        """
        count = self.count
        if isinstance(count, str):
            count = max(1, round(context * float(count[:-1]) / 100))
        return min(count, window) if window and not isinstance(self.policy, Pending) else count

    def nbytes(self, context: int, heads: Heads, numbers: int) -> int:
        """Predicted bytes per row, layer and KV head: codes and scales of K and V, an int32 position, each float32 number carried; of blocks all
        slots, which have neither positions nor numbers."""
        slots = self.blocks(context) * BLOCK if self.place == "blocks" else self.slots(context, heads.window)
        return slots * self.slot_bytes(heads, numbers)

    def slot_bytes(self, heads: Heads, numbers: int) -> int:
        """The same of one slot."""
        vectors = self.codecs.k.nbytes(heads.width) + self.codecs.v.nbytes(heads.value_width)
        return vectors if self.place == "blocks" else vectors + 4 + 4 * numbers

    def blocks(self, context: int) -> int:
        """Blocks of a row of so many tokens; a layer's window does not make them fewer."""
        return -(-self.slots(context) // BLOCK)

    def __str__(self) -> str:
        count = "" if isinstance(self.policy, Full) else f" {self.count}"
        place = "" if self.place == "rows" else f" on {self.place}"
        return text(self.policy) + count + ("" if self.codec == bf16 else f"@{self.codecs}") + place


full = Tier(Full(), "100%")
sink = functools.partial(Tier, Sink())
recent = functools.partial(Tier, Recent())
heavy = functools.partial(Tier, Heavy())
random = functools.partial(Tier, Random())
pending = functools.partial(Tier, Pending())
position_aware = functools.partial(Tier, PositionAware())


def empty(tier: Tier, batch: int, heads: Heads, context: int, numbers: int) -> Slots:
    """Slots that hold nothing, for tokens that carry so many numbers."""
    shape = (batch, heads.kv, tier.slots(context, heads.window))
    encode = lambda codec, width: codec.encode(jnp.zeros((*shape, width), jnp.float32))
    k, v = encode(tier.codecs.k, heads.width), encode(tier.codecs.v, heads.value_width)
    pos_BKS = jnp.full(shape, -1, jnp.int32)
    return Slots(k, v, pos_BKS, tuple(jnp.zeros(shape, jnp.float32) for _ in range(numbers)))


@jax.named_scope("priority")
def take_in(
    tier: Tier,
    slots: Slots,
    entry: Entry,
    kept: Sequence[Statistic],
    memories: dict[Memory, Any],
    now_B11: Int[Array, "B 1 1"],
    window: int,
    last: bool,
    newest: bool,
    bases: Bases | None = None,
) -> tuple[Slots, Entry | None]:
    """Offer T tokens to a tier; return its slots after it kept the S best of S + T, and the T tokens that it did not keep.

    Slots and tokens carry the numbers of the statistics that are `kept`, in that order. An empty slot always loses, and so does a token
    that no query sees any more. The `last` tier forgets what it does not keep (None), and if it must it keeps the `newest`, at position `now`.
    """
    both = lambda held, new: jnp.concatenate([held, new], -1)
    pos = both(slots.pos_BKS, entry.pos_BKT)
    number = lambda each: both(slots.numbers[kept.index(each)], entry.numbers[kept.index(each)])
    read = tuple(memories[each] if isinstance(each, Memory) else number(each) for each in tier.policy.reads())
    priority = jnp.maximum(tier.policy.priority(pos, read, now_B11), jnp.finfo(jnp.float32).min)
    gone = (pos < 0) | (pos <= now_B11 - window) if window else pos < 0
    priority = jnp.where(gone, -jnp.inf, priority)
    if last and newest:
        priority = jnp.where((pos >= 0) & (pos == now_B11), jnp.inf, priority)
    slots, left = exchange(slots, bases.into(entry) if bases else entry, priority, tier.codecs, forget=last)
    return slots, bases.back(left, entry) if bases and left is not None else left
