"""The counter-based generator: known answers, JAX's own bits, and what of them decides which elements dropout keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.kernels import threefry

pytestmark = pytest.mark.usefixtures("optimised")

words = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers(counter, key, answer) -> None:
    """The three of Random123 for threefry2x32 with 20 rounds: zeros, ones, digits of pi."""
    found = threefry.threefry2x32(*map(jnp.uint32, key), *map(jnp.uint32, counter))
    assert tuple(int(word) for word in found) == answer


@given(seed=words, size=st.integers(1, 300))
def test_bits_of_jax(seed: int, size: int) -> None:
    """One word per counter is `jax.random.bits`, both words are its 64-bit draws, for any key."""
    key = jax.random.wrap_key_data(jnp.asarray([seed, seed ^ 0x9E3779B9], jnp.uint32))
    key0, key1 = threefry.key_words(key)
    high, low = threefry.threefry2x32(key0, key1, jnp.uint32(0), jnp.arange(size, dtype=jnp.uint32))
    np.testing.assert_array_equal(high ^ low, jax.random.bits(key, (size,)))
    with jax.enable_x64(True):
        wide = np.asarray(jax.random.bits(key, (size,), jnp.uint64))
    np.testing.assert_array_equal((np.asarray(high, np.uint64) << np.uint64(32)) | np.asarray(low), wide)


@pytest.mark.slow
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), rate=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_mask_is_16_bits_of_jax_an_element(rows: int, columns: int, rate: float, seed: int) -> None:
    """Quarter d of the columns has bits 16 d and up of the 64-bit draws; the last quarter may be short."""
    key, Q = jax.random.key(seed), threefry.quarter(rows, columns)
    with jax.enable_x64(True):
        wide = np.asarray(jax.random.bits(key, (rows, Q), jnp.uint64))
    draws = np.concatenate([(wide >> np.uint64(16 * d)) & np.uint64(0xFFFF) for d in range(4)], -1)[:, :columns]
    found = threefry.mask(threefry.key_words(key), rate, rows, columns)
    np.testing.assert_array_equal(found, draws < threefry.threshold(rate))


@given(st.floats(0, 1, exclude_max=True))
def test_the_share_that_is_kept(rate: float) -> None:
    """At most 2^-16 from what was asked for."""
    assert abs(threefry.threshold(rate) / 2**16 - (1 - rate)) <= 2**-16
    assert 0 <= threefry.threshold(rate) < 2**16, "shifted up by 16 bits it is one word"


def test_draws_are_uniform_and_independent() -> None:
    """Shares of a large mask by row, column and quarter, and pairs of neighbours, within five standard errors."""
    rate, shape = 0.3, (1024, 1024)
    kept = np.asarray(threefry.mask(threefry.key_words(jax.random.key(7)), rate, *shape), np.float64) - (1 - rate)
    deviation = (rate * (1 - rate)) ** 0.5
    for axis in (0, 1):
        assert np.abs(kept.mean(axis)).max() < 5 * deviation / 32
    assert np.abs(kept.reshape(1024, 4, 256).mean((0, 2))).max() < 5 * deviation / 512
    for shift in ((0, 1), (1, 0), (0, 256), (0, 512)):
        assert abs((kept * np.roll(kept, shift, (0, 1))).mean()) < 5 * deviation**2 / 1024


def test_what_it_cannot_draw_from() -> None:
    """A key of another generator, and more elements than the counter has numbers for."""
    with pytest.raises(ValueError, match="threefry2x32; the key is one of rbg"):
        threefry.key_words(jax.random.key(0, impl="rbg"))
    with pytest.raises(ValueError, match="2.32 counters"):
        threefry.quarter(2**20, 2**14 + 4)
    assert threefry.quarter(2**20, 2**14) == 2**12
