"""Slots in the blocks of a pool, written and attended to through a table, against float64 over the rows that they make."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slots_reference import assert_same_stored, codecs, decoded, dense, held

from kvcascade.kernels import native, pages
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.pages import Pool
from kvcascade.kernels.partial import normalise
from kvcascade.kernels.slots import Codecs, Slots

needs_compiler = pytest.mark.skipif(not native.ready(), reason="no C++ compiler")
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")
LAYERS, LAYER = 3, 1


def pool_of(rng, by: Codecs, blocks: int, size: int, heads: Heads) -> Pool:
    """A pool in which every slot of every layer holds something."""
    vectors = lambda width: jnp.asarray(rng.normal(size=(blocks, LAYERS, heads.kv, size, width)) * 3, jnp.float32)
    return Pool(by.k.encode(vectors(heads.width)), by.v.encode(vectors(heads.value_width)))


def row_of(pool: Pool, by: Codecs, line, limit: int) -> Slots:
    """What a line of the table names, as the float32 slots of one row."""

    def joined(codec, stored):
        found = codec.decode(jax.tree.map(lambda x: x[np.maximum(line, 0), LAYER], stored))  # [W, K, Z, H]
        return jnp.moveaxis(found, 1, 0).reshape(1, found.shape[1], -1, found.shape[-1])[:, :, :limit]

    k, v = joined(by.k, pool.k), joined(by.v, pool.v)
    pos = np.where(np.repeat(line >= 0, pool.size)[:limit], np.arange(min(limit, len(line) * pool.size)), -1)
    return Slots({"values": k}, {"values": v}, jnp.broadcast_to(jnp.asarray(pos, jnp.int32), k.shape[:3]))


def check(rng, by, size, width, rows, heads, queries, limit, beside, implementation, observed=False):
    """Attention of queries [(row, position), …] over blocks, some of them shared and some missing, and over slots of the rows' own."""
    blocks = rows * width + 1
    pool = pool_of(rng, by, blocks, size, heads)
    table = rng.integers(-1, blocks, (rows, width))
    own = [held(rng, names, rows, heads.kv, slots, heads.width, 0) for names, slots in beside]
    row, pos = (np.asarray(each, np.int32) for each in zip(*queries, strict=True))
    q = jnp.asarray(rng.normal(size=(len(queries), heads.queries, heads.width)), jnp.float32)
    call = jax.jit(
        lambda q, pool, own: pages.attend(
            q[:, None], jnp.asarray(pos)[:, None], jnp.asarray(row), jnp.asarray(table, jnp.int32), pool, LAYER, by, heads, limit,
            list(zip(own, [each for _, each in own_held], strict=True)), observed, implementation,
        )
    )  # fmt: skip
    own_held = own
    out, mass = normalise([call(q, pool, tuple(slots for slots, _ in own))])
    expected, masses = [], []
    for index, (line, position) in enumerate(queries):
        mine = [(row_of(pool, by, table[max(line, 0)], limit or size * width), codecs("f32"))]
        mine += [(jax.tree.map(lambda x, line=line: x[max(line, 0)][None], slots), each) for slots, each in own]
        sight = {"window": heads.window, "soft_cap": heads.soft_cap, "scale": heads.scale}
        found, given_to = dense(q[index : index + 1], np.asarray([position]), mine, **sight)
        expected.append(found)
        masses.append(given_to[1:])
    np.testing.assert_allclose(out[:, 0], np.concatenate(expected), atol=2e-5)
    assert len(mass) == (len(own) if observed else 0)
    for tier, found in enumerate(mass):
        np.testing.assert_allclose(found[:, :, 0], np.concatenate([each[tier] for each in masses]), atol=2e-5)


def flat(rng, rows: int, most: int) -> list[tuple[int, int]]:
    """Tokens as a step has them: of some rows one, of others many in a row, and padding behind them."""
    found = []
    for row in rng.permutation(rows):
        start, count = int(rng.integers(0, most)), int(rng.choice([1, 1, 5, 40]))
        found += [(int(row), position) for position in range(start, min(start + count, most))]
    return [*found, *[(-1, -1)] * int(rng.integers(0, 4))]


@pytest.mark.slow
@needs_compiler
@given(
    names=st.sampled_from(["f32", "bf16", "int8", "int4", "int4h", "int8/int4", "bf16/int4h"]),
    size=st.sampled_from([16, 32, 64]),
    width=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([8, 16, 64, 80]),
    window=st.sampled_from([0, 1, 23]),
    soft_cap=st.sampled_from([0.0, 5.0]),
    limit=st.sampled_from([None, 1, 17, 40]),
    beside=st.lists(st.tuples(st.sampled_from(["bf16", "int4h"]), st.integers(1, 40)), max_size=2),
    seed=st.integers(0, 2**16),
)
def test_native_equals_float64(names, size, width, kv_heads, group, head_dim, window, soft_cap, limit, beside, seed):
    if "h" in names + "".join(name for name, _ in beside) and head_dim == 80:
        head_dim = 64
    rng = np.random.default_rng(seed)
    heads = Heads(kv_heads * group, kv_heads, head_dim, window=window, soft_cap=soft_cap)
    queries = flat(rng, 3, size * width)
    check(rng, codecs(names), size, width, 3, heads, queries, limit, beside, "native", observed=bool(seed % 2))


@pytest.mark.parametrize("implementation", ["xla", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(
    "names, size, width, window, limit, beside",
    [
        ("bf16", 16, 4, 0, None, []),
        ("int8", 100, 2, 30, 130, [("bf16", 9)]),
        ("fp8", 4, 3, 0, None, []),
        ("int4", 5, 9, 0, 33, [("int8", 70), ("int4", 3)]),
        ("int4h", 64, 1, 0, None, []),
        ("nvfp4", 32, 3, 9, None, [("nvfp4", 5)]),
    ],
)
def test_others_say_the_same(names, size, width, window, limit, beside, implementation):
    rng = np.random.default_rng(size)
    queries = [(0, size * width - 1), (1, 3), (1, 4), (-1, -1), (0, size)]
    heads = Heads(6, 2, 32, window=window)
    check(rng, codecs(names), size, width, 2, heads, queries, limit, beside, implementation, observed=True)


def test_keys_and_values_of_unlike_widths():
    rng = np.random.default_rng(0)
    heads = Heads(6, 2, 32, value_width=16)
    check(rng, codecs("int8"), 16, 3, 2, heads, [(0, 40), (1, 7)], None, [], None)


@needs_compiler
def test_long_rows_are_divided_among_threads():
    rng = np.random.default_rng(0)
    heads = Heads(4, 1, 64)
    for queries in ([(0, 1500)], [(0, position) for position in range(1100, 1150)]):
        check(rng, codecs("int4h"), 16, 100, 1, heads, queries, None, [("bf16", 300)], "native", observed=True)


@pytest.mark.parametrize("names", ["f32", "bf16", "int8", "int4", "int4h", "int8/int4h", "fp8", "nvfp4"])
@pytest.mark.parametrize("implementation", ["xla", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_what_is_written_stands_where_it_belongs(names, implementation, size):
    if implementation == "native" and names in ("fp8", "nvfp4"):
        pytest.skip("not read by C++")
    rng, by, heads = np.random.default_rng(0), codecs(names), Heads(2, 2, 32)
    pool = pool_of(rng, by, 7, size, heads)
    slot = jnp.asarray([3 * size, -1, 6 * size + size - 1, 0, -1], jnp.int32)
    k, v = (jnp.asarray(rng.normal(size=(5, 2, 32)), jnp.float32) for _ in range(2))
    after = jax.jit(lambda pool, k, v: pages.write(pool, k, v, slot, LAYER, by, implementation))(pool, k, v)
    for codec, x, old, new in ((by.k, k, pool.k, after.k), (by.v, v, pool.v, after.v)):
        wanted = {name: np.array(array) for name, array in old.items()}
        for token, place in enumerate(np.asarray(slot)):
            for name, array in codec.encode(x[token]).items():
                if place >= 0:
                    wanted[name][place // size, LAYER, :, place % size] = array
        assert_same_stored(codec, new, {name: jnp.asarray(array) for name, array in wanted.items()})


@needs_compiler
def test_a_pool_is_written_in_place():
    by, heads = codecs("int8"), Heads(2, 2, 32)
    leaves, tree = jax.tree.flatten(Pool.empty(by, 8, LAYERS, 16, heads))

    def step(leaves, x):
        pool = pages.write(tree.unflatten(leaves), x, x, jnp.asarray([17], jnp.int32), 0, by, "native")
        return jax.tree.leaves(pool)

    compiled = jax.jit(step, donate_argnums=0).lower(leaves, jnp.ones((1, 2, 32))).compile()
    memory, program = compiled.memory_analysis(), compiled.as_text()
    assert memory and program
    size = sum(x.nbytes for x in leaves)
    assert memory.temp_size_in_bytes < size / 8
    assert " copy(" not in "".join(line for line in program.splitlines() if "s8[8," in line)


@needs_compiler
@pytest.mark.parametrize("size", [1, 4, 8, 48])
def test_blocks_of_other_sizes_are_refused_by_name_and_go_through_xla(size):
    rng = np.random.default_rng(0)
    heads, queries = Heads(2, 1, 16), [(0, 2 * size - 1), (0, 0)]
    with pytest.raises(NotImplementedError, match=f"native: made for blocks of 16, 32, 64, … tokens, not of {size}"):
        check(rng, codecs("bf16"), size, 2, 1, heads, queries, None, [], "native")
    check(rng, codecs("bf16"), size, 2, 1, heads, queries, None, [], None)


def test_decoded_pools_are_what_was_written():
    """The reference of this file reads through the codecs' own decode."""
    rng, by = np.random.default_rng(0), codecs("int8")
    x = jnp.asarray(rng.normal(size=(2, 3, 32)), jnp.float32)
    k, _ = decoded(by, by.k.encode(x), by.v.encode(x))
    np.testing.assert_allclose(k, x, atol=0.05)
