"""The activation of an MLP, with its gate and its dropout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

ACTIVATIONS = ("relu", "gelu", "swiglu")


def activate(
    up: Float[Array, "*B F"],
    gate: Float[Array, "*B F"] | None,
    kind: str,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "*B F"]:
    """Apply `relu`, `gelu` (tanh form) or `swiglu` (silu(gate) * up, Shazeer 2020), then dropout at `rate` if a key is given."""
    match kind:
        case "relu":
            hidden = jax.nn.relu(up)
        case "gelu":
            hidden = jax.nn.gelu(up)
        case "swiglu" if gate is not None:
            hidden = jax.nn.silu(gate) * up
        case _:
            raise ValueError(f"no activation {kind!r}; choose from {', '.join(ACTIVATIONS)}")
    if key is None or rate == 0.0:
        return hidden
    return jnp.where(jax.random.bernoulli(key, 1 - rate, hidden.shape), hidden / (1 - rate), 0)
