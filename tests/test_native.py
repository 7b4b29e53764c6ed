"""The C++ kernels: attention against float64, the exchange against the reference, bit for bit where nothing is summed."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from slots_reference import attended, check_exchange, codecs, dense, fits, held

from kvcascade.cache.codec import CODECS
from kvcascade.cache.tier import empty, heavy, recent
from kvcascade.kernels import native
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.slots import Entry, Slots
from kvcascade.kernels.write import exchange

# What C++ does not read goes through XLA.
FORMATS = sorted(set(CODECS) - {"fp8", "nvfp4"})
PAIRS = [*FORMATS, "int8/int4", "bf16/int4h", "int4h/f32"]
needs_compiler = pytest.mark.skipif(not native.ready(), reason="no C++ compiler")


def check_decode(q, now, slots, **sight):
    """Attention with masses and without, in one program; the output must be the same to the last bit."""
    tiers, by = zip(*slots, strict=True)

    @jax.jit
    def both(q, now, tiers):
        given = list(zip(tiers, by, strict=True))
        return [attended(q, now, given, observed, "native", **sight) for observed in (True, False)]

    results, (only_out, none) = both(q, now, tiers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results, dense(q, now, slots, **sight))
    np.testing.assert_array_equal(only_out, results[0])
    assert none == []


@needs_compiler
@given(
    tiers=st.lists(st.tuples(st.sampled_from(PAIRS), st.integers(1, 70)), min_size=1, max_size=3),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([2, 8, 16, 32, 64, 128]),
    window=st.sampled_from([0, 1, 25]),
    soft_cap=st.sampled_from([0.0, 0.7, 50.0]),
    scale=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_decode_equals_float64(tiers, batch, kv_heads, group, head_dim, window, soft_cap, scale, seed):
    assume(all(fits(name, head_dim) for name, _ in tiers))
    rng = np.random.default_rng(seed)
    slots = [held(rng, name, batch, kv_heads, count, head_dim) for name, count in tiers]
    q = jnp.asarray(rng.normal(size=(batch, kv_heads * group, head_dim)), jnp.float32)
    # Some queries see nothing, some only a part, some everything.
    now = jnp.asarray(rng.integers(-1, 60, batch), jnp.int32)
    check_decode(q, now, slots, window=window, soft_cap=soft_cap, scale=scale)


@needs_compiler
@pytest.mark.parametrize("counts", [(1500,), (700, 3, 900), (256,)])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_decode_of_long_tiers_divided_among_threads(counts, head_dim):
    """One row, one head: its slots are shared out, and the shares merged; a query sees all of them, a part, one, none."""
    rng = np.random.default_rng(0)
    formats = ["int4" if head_dim == 72 else "int4h", "bf16", "int8"]
    slots = [held(rng, name, 1, 1, count, head_dim) for name, count in zip(formats, counts, strict=False)]
    q = jnp.asarray(rng.normal(size=(1, 4, head_dim)), jnp.float32)
    for now in (10_000, 30, 0, -1):
        check_decode(q, jnp.asarray([now], jnp.int32), slots)
    check_decode(q, jnp.asarray([800], jnp.int32), slots, window=300)


@needs_compiler
@pytest.mark.parametrize("head_dim", [80, 96])
@pytest.mark.parametrize("codec_name", ["bf16", "int8", "int4"])
def test_decode_at_head_widths_that_are_no_power_of_two(codec_name, head_dim):
    rng = np.random.default_rng(0)
    slots = [held(rng, codec_name, 2, 2, 33, head_dim)]
    q, now = jnp.asarray(rng.normal(size=(2, 6, head_dim)), jnp.float32), jnp.asarray([40, 3], jnp.int32)
    check_decode(q, now, slots)


@needs_compiler
def test_decode_in_many_threads():
    rng = np.random.default_rng(0)
    slots = [held(rng, "bf16", 8, 8, 1024, 64)]
    q, now = jnp.asarray(rng.normal(size=(8, 8, 64)), jnp.float32), jnp.full(8, 2000, jnp.int32)
    check_decode(q, now, slots)


@needs_compiler
def test_what_a_query_does_not_see_is_not_read():
    slots = empty(recent(20), 1, Heads(2, 1, 8), 32, 0)
    poison = lambda stored: {name: jnp.full_like(x, jnp.nan) for name, x in stored.items()}
    slots = Slots(poison(slots.k), poison(slots.v), slots.pos_BKS.at[..., 5].set(7))
    unseen, _ = attended(jnp.ones((1, 2, 8)), jnp.asarray([3]), [(slots, codecs("bf16"))], False, "native")
    np.testing.assert_array_equal(unseen, 0)


@needs_compiler
@given(
    names=st.sampled_from(PAIRS),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    slots=st.integers(1, 40),
    head_dim=st.sampled_from([2, 16, 64]),
    numbers=st.integers(0, 3),
    forget=st.booleans(),
    scale=st.sampled_from([0, 5]),
    newcomers=st.sampled_from([1, 2, 16]),
    seed=st.integers(0, 2**16),
)
def test_exchange_equals_the_reference(
    names, batch, kv_heads, slots, head_dim, numbers, forget, scale, newcomers, seed
):
    assume(fits(names, head_dim))
    rng = np.random.default_rng(seed)
    check_exchange("native", rng, names, batch, kv_heads, slots, head_dim, numbers, forget, scale, newcomers)


@needs_compiler
def test_gradients_are_those_of_the_reference():
    rng = np.random.default_rng(0)
    slots = [held(rng, "f32", 2, 2, 9, 8)]
    q, now = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32), jnp.asarray([5, 20], jnp.int32)
    loss = lambda q, each: (attended(q, now, slots, True, each)[0] ** 2).sum()
    np.testing.assert_allclose(jax.grad(loss)(q, "native"), jax.grad(loss)(q, "xla"), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_slots_are_written_in_place():
    tier = heavy(64)
    slots = empty(tier, 2, Heads(2, 2, 8), 64, 2)
    one = jnp.ones((2, 2, 1))
    entry = Entry(jnp.ones((2, 2, 1, 8)), jnp.ones((2, 2, 1, 8)), jnp.zeros((2, 2, 1), jnp.int32), (one, one))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2, 3))
    def step(k, v, pos, numbers):
        slots, _ = exchange(Slots(k, v, pos, numbers), entry, jnp.zeros((2, 2, 65)), tier.codecs, True, "native")
        return slots.k, slots.v, slots.pos_BKS, slots.numbers

    compiled = step.lower(slots.k, slots.v, slots.pos_BKS, slots.numbers).compile()
    memory, program = compiled.memory_analysis(), compiled.as_text()
    assert memory and memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(slots))
    assert program and " copy(" not in program


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_xla_does_the_work(compiler, tmp_path):
    program = (
        "import jax.numpy as jnp; from kvcascade.kernels.decode import decode; from kvcascade.kernels.heads import Heads;"
        "from kvcascade.cache.tier import empty, recent;"
        "heads = Heads(1, 1, 8); held = [(empty(recent(4), 1, heads, 4, 0), recent(4).codecs)];"
        "print(decode(jnp.ones((1, 1, 8)), jnp.zeros(1, int), held, heads, False)[0].out_BTNW.sum());"
        "decode(jnp.ones((1, 1, 8)), jnp.zeros(1, int), held, heads, False, implementation='native')"
    )
    environment = os.environ | {"CXX": compiler, "KVCASCADE_CACHE": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert found.stdout == "0.0\n"
    assert found.stderr.startswith("no C++ kernels, decoding goes through XLA and is slower: ")
    assert "NotImplementedError: native: the C++ kernels could not be compiled on this machine" in found.stderr
    assert not list(tmp_path.iterdir())
