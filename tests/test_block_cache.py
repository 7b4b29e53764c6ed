"""Caches with tiers on blocks: against the same tiers in rows, against themselves however tokens are grouped, shared, and byte for byte."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcascade.cache.block_cache import BlockCache
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.cache.whole import Cache, nbytes
from kvcascade.kernels import backend
from kvcascade.kernels.heads import Heads
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig

HEADS = (Heads(4, 2, 16), Heads(4, 2, 16), Heads(6, 1, 32, window=7))
B, CONTEXT = 2, 40


def calls(rng, groups: list[int]):
    """A text in calls of so many tokens, as positions; the second row is three tokens behind."""
    start = 0
    for count in groups:
        positions = np.stack([np.arange(start, start + count), np.arange(start, start + count) - 3])
        yield jnp.asarray(np.maximum(positions, -1), jnp.int32)
        start += count


def vectors(rng_seed: int, layer: int, heads: Heads, positions_BT):
    """Queries, keys and values that follow from row, layer and position alone."""
    rows = []
    for row, line in enumerate(np.asarray(positions_BT)):
        each = [
            np.random.default_rng([rng_seed, row, layer, max(p, 0)]).normal(
                size=(heads.queries + 2 * heads.kv, heads.width)
            )
            for p in line
        ]
        rows.append(np.stack(each))
    q, k, v = np.split(np.stack(rows).astype(np.float32), [heads.queries, heads.queries + heads.kv], 2)
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


@functools.partial(jax.jit, static_argnames="index")
def stepped(cache, index: int, q, k, v, positions):
    return cache.step(index, q, k, v, positions)


def run(cache: Cache, groups: list[int], heads=HEADS):
    """The attention of all layers to each token that is there, in the order of positions, and the cache."""
    outs = []
    for positions in calls(None, groups):
        found = []
        for index, each in enumerate(heads):
            out, cache = stepped(cache, index, *vectors(0, index, each, positions), positions)
            found.append(np.where((positions >= 0)[..., None], np.asarray(out).reshape(*positions.shape, -1), 0))
        outs.append(np.concatenate(found, -1))
    return np.concatenate(outs, 1), cache


@pytest.mark.parametrize(
    "own, limit, implementation",
    [
        ("", 0, "native"),
        ("", 0, "xla"),
        (" | recent 5", 16, "native"),
        (" | sink 2 | recent 4", 1, "xla"),
        (" | recent 3 | heavy 4@int8", 20, "native"),
        (" | tova 6", 16, "xla"),
        (" | random 5", 20, "native"),
    ],
)
@given(groups=st.lists(st.sampled_from([1, 1, 1, 9]), min_size=1, max_size=12).filter(lambda x: sum(x) <= CONTEXT))
@settings(max_examples=8)
def test_blocks_hold_what_rows_would(own: str, limit: int, groups: list[int], implementation) -> None:
    """In float32 nothing tells one from the other, whatever stands behind them. In rows, sinks that a window hides make room."""
    heads = HEADS[1:2] if own else HEADS[1:]
    head = f"sink {limit}@f32" if own else "full@f32"
    with backend.using(implementation):
        ours, _ = run(parse(f"{head} on blocks{own}").init(B, heads, CONTEXT), groups, heads)
        theirs, _ = run(parse(head + own).init(B, heads, CONTEXT), groups, heads)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4h", "int8/int4", "fp8"])
@given(groups=st.permutations([1, 1, 3, 3, 12, 12]))
@settings(max_examples=5)
def test_content_does_not_depend_on_how_tokens_came(codec: str, groups: list[int]) -> None:
    """Attended to as stored, whatever came together: what a later token sees is the same, and so are the bits in the pool."""
    spec = parse(f"full@{codec} on blocks")
    ours, mine = run(spec.init(B, HEADS, CONTEXT), groups)
    wanted, its = run(spec.init(B, HEADS, CONTEXT), [1] * 32)
    np.testing.assert_allclose(ours, wanted, atol=2e-5)
    assert isinstance(mine, BlockCache) and isinstance(its, BlockCache)
    for bits, others in zip(jax.tree.leaves(mine.pools), jax.tree.leaves(its.pools), strict=True):
        np.testing.assert_array_equal(bits, others)


@pytest.mark.parametrize("codec", ["f32", "int8", "int4h"])
def test_rows_that_begin_alike_share_blocks(codec: str) -> None:
    """Two rows over the same first block, in a pool whose blocks are in no order: as if each had its own."""
    spec = parse(f"full@{codec} on blocks")
    cache = BlockCache.empty(spec.groups(HEADS), 2, CONTEXT, blocks=9)
    cache = dataclasses.replace(cache, table_RW=jnp.asarray([[5, 2, -1], [5, 7, -1]], jnp.int32))
    alone = spec.init(1, HEADS, CONTEXT)
    lines = dataclasses.replace(cache, row_B=jnp.asarray([0], jnp.int32))

    def one(cache, row: int, seed: int, start: int, stop: int):
        positions, found = jnp.arange(start, stop, dtype=jnp.int32)[None], []
        for index, heads in enumerate(HEADS):
            out, cache = stepped(cache, index, *vectors(seed, index, heads, positions), positions)
            found.append(np.asarray(out).reshape(1, stop - start, -1))
        return np.concatenate(found, -1), cache

    _, lines = one(lines, 0, 1, 0, 16)  # the common prefix, by the first row
    _, prefix = one(alone, 0, 1, 0, 16)
    for row, seed in ((0, 2), (1, 3)):
        mine = dataclasses.replace(lines, row_B=jnp.asarray([row], jnp.int32))
        ours, mine = one(mine, row, seed, 16, 27)
        wanted, _ = one(prefix, 0, seed, 16, 27)
        np.testing.assert_allclose(ours, wanted, atol=2e-5)
        lines = dataclasses.replace(lines, pools=mine.pools)
    # The first row's tokens are what they were, with the second one's in another block.
    again = dataclasses.replace(lines, row_B=jnp.asarray([0], jnp.int32))
    ours, _ = one(again, 0, 4, 27, 28)
    wanted, _ = one(one(prefix, 0, 2, 16, 27)[1], 0, 4, 27, 28)
    np.testing.assert_allclose(ours, wanted, atol=2e-5)


@pytest.mark.parametrize(
    "text",
    [
        "full on blocks",
        "full@int8/int4h on blocks",
        "sink 20@int8 on blocks | recent 5 | heavy 4@int4h",
        "layers[0:1]: sink 9 on blocks | heavy 3 ; layers[1:]: sink 9@int4 on blocks | recent 3",
        "layers[0:2]: recent 4 | heavy 3 ; layers[2:]: full@f32 on blocks",
    ],
)
@pytest.mark.parametrize("context", [16, 33, CONTEXT])
def test_predicted_bytes_are_those_of_the_buffers(text: str, context: int) -> None:
    cache = parse(text).init(B, HEADS, context)
    assert nbytes(cache) == B * parse(text).nbytes(HEADS, context)
    assert isinstance(cache, BlockCache)


def test_bytes_by_hand() -> None:
    heads = (Heads(2, 2, 8),) * 3
    assert parse("full@int8 on blocks").nbytes(heads, 33) == 3 * 2 * 48 * 2 * (8 + 2) + 3 * 4
    assert parse("sink 4 on blocks | recent 2").nbytes(heads, 33) == 3 * 2 * (16 * 32 + 2 * (32 + 4)) + 4


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            "recent 4 on blocks",
            "recent lets go of what later tokens do not need, and blocks are shared by rows whose later tokens differ",
        ),
        ("heavy 4 on blocks", "heavy lets go"),
        ("random 4 on blocks", "random lets go"),
        ("position-aware 4 on blocks", "position-aware lets go"),
        ("recent 4 | full on blocks", "full on blocks must be the first tier"),
        ("recent 4 | sink 4 on blocks", "sink 4 on blocks must be the first tier"),
        ("sink 4 on blocks | sink 4 on blocks", "the only one on blocks"),
        ("full on blocks then recent 4", "must be the first tier"),
        ("full on disc", "there is no place 'disc'; there are rows, blocks"),
        ("full on", "a tier is written POLICY"),
    ],
)
def test_what_cannot_be_shared_is_refused(text: str, reason: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(text)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_layers_have_equally_many_tokens_on_blocks() -> None:
    spec = parse("layers[0:1]: full on blocks ; layers[1:]: sink 17@int4 on blocks")
    for call in (lambda: spec.init(B, HEADS, CONTEXT), lambda: spec.nbytes(HEADS, CONTEXT)):
        with pytest.raises(
            BadInput, match="full on blocks and sink 17@int4 on blocks are for unlike numbers of tokens"
        ):
            call()


def test_a_prompt_that_is_read_twice_is_refused() -> None:
    spec = parse("layers[0:1]: kvzip 4 ; layers[1:]: full on blocks")
    with pytest.raises(BadInput, match="reads its prompt twice"):
        spec.init(B, HEADS, CONTEXT)


@pytest.mark.parametrize(
    "text", ["full@int8 on blocks", "sink 20 on blocks | recent 4", "full on blocks", "sink 25%@int8/int4 on blocks"]
)
def test_text_and_value(text: str) -> None:
    assert str(parse(text)) == text and parse(str(parse(text))) == parse(text)
    assert str(parse("full on rows")) == "full"


@pytest.mark.parametrize("text", ["full@f32 on blocks", "sink 16@f32 on blocks | recent 40@f32"])
def test_generation_is_that_of_rows(text: str) -> None:
    """Prompts of unequal lengths, and tokens one by one, in one program."""
    config = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=64, context=64)
    params = gpt.init(config, 0)
    prompts = [[1, 2, 3, 4, 5] * 4, [7, 8, 9]]

    def tokens(spec):
        cache = generate.empty_cache(config, parse(spec), 2, 60)
        return np.concatenate([new for new, _ in generate.generate(config, params, cache, prompts, 20)])

    np.testing.assert_array_equal(tokens(text), tokens("full@f32"))


def test_a_draft_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no draft"):
        parse("full on blocks").init(1, HEADS, CONTEXT).draft()
