"""Threefry-2x32, the counter-based generator of `jax.random`, in operations that a GPU kernel can hold, and the dropout masks drawn from it."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Key, UInt32

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
"""What the third word of the key schedule is the exclusive or of the key with."""

DRAWS = 4
"""Elements whose fate one counter decides, with 16 bits each."""


def threefry2x32(key0, key1, counter0, counter1) -> tuple:
    """Encrypt two 32-bit words of a counter under two of a key: uint32 arrays or scalars that broadcast.

    20 rounds of Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3: additions, exclusive ors
    and rotations alone, because a GPU kernel in Pallas has neither `jax.random` nor the upper half of a product.
    """
    schedule = (key0, key1, key0 ^ key1 ^ jnp.uint32(PARITY))
    x0, x1 = counter0 + key0, counter1 + key1
    for group in range(5):
        for distance in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << jnp.uint32(distance)) | (x1 >> jnp.uint32(32 - distance))) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + (schedule[(group + 2) % 3] + jnp.uint32(group + 1))
    return x0, x1


def key_words(key: Key[Array, ""]) -> UInt32[Array, "2"]:
    """The two words of a key of `jax.random`. Raises ValueError for a key of another generator than threefry2x32."""
    if (generator := str(jax.random.key_impl(key))) != "threefry2x32":
        raise ValueError(f"dropout draws from threefry2x32; the key is one of {generator}")
    return jax.random.key_data(key)


def quarter(rows: int, columns: int) -> int:
    """How many counters a row takes: draw c // quarter of counter c % quarter decides about column c.

    Raises ValueError where all rows take more than 2^32 counters, beyond which they would come round.
    """
    count = -(-columns // DRAWS)
    if rows * count > 2**32:
        raise ValueError(f"dropout has 2^32 counters for {DRAWS} elements each; {rows} x {columns} is more")
    return count


def threshold(rate: float) -> int:
    """The 16-bit draws below this are kept: at most 2^-16 away from 1 - rate as a share of all."""
    return min(round((1 - rate) * 2**16), 2**16 - 1)


def keep(key0, key1, counter, rate: float) -> list:
    """Which elements dropout keeps: four masks of the counters' shape, one for each quarter of the columns.

    Draw d is bits 16 d to 16 d + 15 of `jax.random.bits(key, (counters,), jnp.uint64)`, the same on every backend.
    """
    high, low = threefry2x32(key0, key1, jnp.uint32(0), counter)
    limit = jnp.uint32(threshold(rate) << 16)
    # The upper half of a word is compared where it is: one operation less than moving it down.
    return [x < limit for word in (low, high) for x in (word << jnp.uint32(16), word)]


def mask(words: UInt32[Array, "2"], rate: float, rows: int, columns: int) -> Bool[Array, "{rows} {columns}"]:
    """Which elements of a whole array dropout keeps."""
    Q = quarter(rows, columns)
    row, column = (lax.broadcasted_iota(jnp.uint32, (rows, Q), axis) for axis in (0, 1))
    return jnp.concatenate(keep(words[0], words[1], row * jnp.uint32(Q) + column, rate), -1)[:, :columns]
