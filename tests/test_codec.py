import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.codec import CODECS, Banded, Codec, Packed, int4, int4h, int8, kvtc2, kvtc3, kvtc4
from kvcascade.cache.errors import BadInput

pytestmark = pytest.mark.usefixtures("optimised")


EVERY = CODECS | {codec.name: codec for codec in (kvtc4, kvtc3, kvtc2)}


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("width", [2, 16, 64])
def test_claimed_bytes_of_a_vector_are_those_of_its_arrays(codec: Codec, width: int) -> None:
    """Codes, scale and low end of one vector, as they are stored; a width that is refused fills no whole bytes."""
    narrow = isinstance(codec, Banded) and width < 32
    if narrow or isinstance(codec, Packed) and width < 8 // min(codec.bits, codec.fine or 8):
        with pytest.raises(BadInput, match="needs a head width"):
            codec.nbytes(width)
        return
    assert codec.nbytes(width) == sum(leaf.nbytes for leaf in jax.tree.leaves(codec.encode(normal(1, width))))


def test_bounds_are_half_a_step_and_no_more() -> None:
    """A step is the largest number over 127, or the range over 15; only bf16's rounding of scale and low end comes on top."""
    x = np.asarray(normal(100, 16))
    bound8 = np.asarray(int8.bound(int8.encode(jnp.asarray(x))))[:, 0]
    bound4 = np.asarray(int4.bound(int4.encode(jnp.asarray(x))))[:, 0]
    assert (bound8 < 0.51 * np.abs(x).max(-1) / 127).all()
    assert (bound4 < 0.52 * np.ptp(x, axis=-1) / 15 + 0.005 * np.abs(x.min(-1))).all()


def test_int8_uses_all_its_codes() -> None:
    """The largest number of a vector gets the code 126 or 127, and its sign."""
    codes = np.abs(np.asarray(int8.encode(normal(100, 16))["codes"]).astype(int)).max(-1)
    assert set(codes) <= {126, 127}


@pytest.mark.parametrize("codec", [int8, int4, int4h], ids=["int8", "int4", "int4h"])
def test_a_step_is_never_zero(codec: Codec) -> None:
    """Vectors of zeros and of equal numbers have no width to divide into steps, and no code may come from dividing by it."""
    assert (codec.encode(jnp.asarray([[0.0] * 8, [3.0] * 8, [-3.0] * 8]))["scale"] > 0).all()


def test_int4_packs_channel_j_with_channel_j_plus_half() -> None:
    """The low nibble is the first half's code, the high one the second half's."""
    stored = int4.encode(jnp.arange(16.0)[None])
    codes = np.asarray(stored["codes"])[0]
    np.testing.assert_array_equal(codes & 15, np.arange(8))
    np.testing.assert_array_equal(codes >> 4, np.arange(8, 16))


def test_a_rotation_spreads_an_outlier() -> None:
    """With one channel a hundred times as large as the others, four rotated bits miss by far less than plain ones."""
    x = normal(200, 64).at[:, 3].multiply(100)
    error = {
        codec.name: float(jnp.abs(codec.decode(codec.encode(x)) - x).at[:, 3].set(0).mean()) for codec in (int4, int4h)
    }
    assert error["int4h"] < 0.5 * error["int4"]


@pytest.mark.parametrize(
    "codec, width, need", [(int4h, 24, "a power of two"), (int4, 7, "even"), (kvtc2, 48, "a multiple of 32")]
)
def test_a_head_width_that_does_not_fit_is_told(codec: Codec, width: int, need: str) -> None:
    """A Walsh-Hadamard matrix has a power of two of rows, and two codes share a byte."""
    with pytest.raises(BadInput, match=f"{codec.name} needs a head width that is {need}, not {width}"):
        codec.nbytes(width)


@pytest.mark.parametrize("codec", [kvtc4, kvtc3, kvtc2], ids=lambda codec: codec.name)
@pytest.mark.parametrize("channel", [0, 15, 16, 63])
def test_bits_by_channel_miss_by_less_than_they_say(codec: Banded, channel: int) -> None:
    """Of plain vectors, of one that is in one channel, and of nothing, which stays nothing."""
    x = normal(50, 64).at[1].set(0).at[2].set(0).at[2, channel].set(3e4)
    stored = codec.encode(x)
    assert (jnp.abs(codec.decode(stored) - x) <= codec.bound(stored)).all()
    assert not codec.decode(stored)[1].any()


def test_bits_by_channel_are_where_channels_count() -> None:
    """The mean square errors of Max 1960, table I, of five bits to one."""
    x = normal(4000, 64)
    error = lambda codec: np.asarray(jnp.square(codec.decode(codec.encode(x)) - x).mean(0))
    for codec, wanted in ((kvtc4, (0.0025, 0.0095, 0.0345)), (kvtc2, (0.0345, 0.1175, 0.3634))):
        for some, each in zip((slice(16), slice(16, 48), slice(48, 64)), wanted, strict=True):
            np.testing.assert_allclose(error(codec)[some], each, rtol=0.2)


@pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)
def test_bf16_vectors_are_coded_like_the_same_numbers_in_f32(codec: Codec) -> None:
    """What a model computes in does not change what a codec stores."""
    x = normal(20, 64).astype(jnp.bfloat16)
    np.testing.assert_array_equal(codec.decode(codec.encode(x)), codec.decode(codec.encode(x.astype(jnp.float32))))
