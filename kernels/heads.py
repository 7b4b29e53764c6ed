"""What an attention layer is, as one value: its heads, how wide they are, and which keys a query sees how strongly."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def capped(logits: Float[Array, "..."], soft_cap: float) -> Float[Array, "..."]:
    """cap · tanh(logits / cap) (Gemma 2, 2024, §2); a cap of 0 leaves them as they are."""
    return soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn queries and keys: pair h by position · base^(-2h/H) / factors[h] radians (RoFormer, Su et al. 2021, eq. 34)."""

    base: float = 10_000.0
    factors: tuple[float, ...] = ()
    """A number per pair (Llama 3's way to longer contexts); empty: all 1."""
    long_factors: tuple[float, ...] = ()
    """In their place in contexts of more than `short_context` tokens (LongRoPE, Ding et al. 2024, §3.2); empty: the same."""
    short_context: int = 0
    scale: float = 1.0
    """What turned channels are multiplied by (YaRN, Peng et al. 2023, §3.3: the square of it is a temperature)."""
    width: int = 0
    """Channels that are turned, W, half of them the first of each half of a head, with W in place of H above; 0: all."""

    def at(self, context: int) -> "Rope":
        """How positions turn in a context of so many tokens, of which a cache keeps to the one that it was made for."""
        factors = self.long_factors if self.long_factors and context > self.short_context else self.factors
        return dataclasses.replace(self, factors=factors, long_factors=(), short_context=0)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of one layer, as its model defines them: every kernel and every cache of the layer takes this value."""

    queries: int
    """Query heads, N."""
    kv: int
    """KV heads, K: = queries is MHA, 1 is MQA, between them GQA."""
    width: int
    """Width of a query and of a key, H."""
    value_width: int = 0
    """Width of a value; 0: that of a key."""
    scale: float = 0.0
    """What the product of a query and a key is multiplied by; 0: 1 / sqrt(H)."""
    soft_cap: float = 0.0
    """Logits become cap · tanh(logit / cap) (Gemma 2, 2024, §2); 0: they stay."""
    window: int = 0
    """Positions that a query sees, its own included (Longformer, Beltagy et al. 2020, §3.1); 0: all before it."""
    rope: Rope | None = None
    """None: queries and keys are not turned."""

    def __post_init__(self):
        object.__setattr__(self, "value_width", self.value_width or self.width)
        object.__setattr__(self, "scale", self.scale or self.width**-0.5)

    def part(self, kv: int) -> "Heads":
        """So many of the KV heads, with the query heads that read them."""
        return dataclasses.replace(self, kv=kv, queries=self.queries // self.kv * kv)

    def sees(self, age: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether a query sees a key that is so many positions older than itself."""
        return (age >= 0) & (age < self.window) if self.window else age >= 0

    def capped(self, logits: Float[Array, "..."]) -> Float[Array, "..."]:
        """Scaled products as the softmax takes them."""
        return capped(logits, self.soft_cap)
