"""The Triton kernel for the exchange of a slot, interpreted, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slots_reference import WRITTEN, check_exchange, held, offered

from kvcascade.cache.codec import CODECS
from kvcascade.cache.errors import BadInput
from kvcascade.kernels.write import exchange

pytest.importorskip("triton")
from kvcascade.kernels.traffic import counting  # noqa: E402


@pytest.mark.slow
@given(
    names=st.sampled_from([*WRITTEN, "int8/int4", "bf16/int4h"]),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    slots=st.integers(1, 40),
    head_dim=st.sampled_from([2, 8, 16, 64]),
    numbers=st.sampled_from([0, 1, 4]),
    forget=st.booleans(),
    scale=st.sampled_from([0, 1e-3, 1, 5]),
    seed=st.integers(0, 2**16),
)
def test_exchange_equals_the_reference(names, batch, kv_heads, slots, head_dim, numbers, forget, scale, seed):
    rng = np.random.default_rng(seed)
    check_exchange("triton", rng, names, batch, kv_heads, slots, head_dim, numbers, forget, scale)


@pytest.mark.parametrize("head_dim", [80, 96, 128])
@pytest.mark.parametrize("codec_name", WRITTEN)
def test_other_head_widths(codec_name, head_dim):
    try:
        CODECS[codec_name].nbytes(head_dim)
    except BadInput as refused:
        pytest.skip(str(refused))
    check_exchange("triton", np.random.default_rng(0), codec_name, 2, 4, 5, head_dim, 1, False, 5)


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("codec_name", WRITTEN)
def test_it_moves_the_priorities_the_newcomer_and_one_slot(codec_name, forget):
    """Each byte once, the positions of all slots, and nothing else; of a newcomer that is refused nothing is written."""
    rng = np.random.default_rng(0)
    slots, by = held(rng, codec_name, 1, 2, 50, 64)
    entry, _ = offered(rng, 1, 2, 50, 64, 5)
    # The first head's newcomer takes slot 7, the second one's none.
    priority = jnp.zeros((1, 2, 51)).at[0, 0, 7].set(-1).at[0, 1, 50].set(-1)
    with counting() as traffic:
        jax.block_until_ready(exchange(slots, entry, priority, by, forget, "triton"))
    newcomers = sum(x.nbytes for x in jax.tree.leaves(entry))
    one_slot = sum(x.nbytes for x in jax.tree.leaves(slots)) // 100
    all_positions = priority.nbytes + slots.pos_BKS.nbytes
    assert traffic.read.total() == all_positions + newcomers + (0 if forget else one_slot - 4)
    assert traffic.written.total() == one_slot + (0 if forget else newcomers)


def test_what_it_refuses():
    entry, priority = offered(np.random.default_rng(0), 1, 1, 4, 7, 1)
    slots, by = held(np.random.default_rng(0), "int8", 1, 1, 4, 7)
    with pytest.raises(NotImplementedError, match="triton: the head width is odd"):
        exchange(slots, entry, priority, by, False, "triton")
