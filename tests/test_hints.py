"""What a caller asks to keep stays as long as it was asked for, and goes first where the caller said so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.policies import POLICIES
from kvcascade.cache.retention import Hint, hint
from kvcascade.cache.spec import parse
from kvcascade.cache.whole import Cache, nbytes
from kvcascade.kernels.heads import Heads

HEADS = Heads(2, 1, 4)
step = jax.jit(LayerCache.step)


def cache_of(text: str, batch: int = 1, layers: int = 1) -> Cache:
    return parse(text).init(batch, [HEADS] * layers, 64)


def held(layer: LayerCache, row: int = 0) -> set[int]:
    return {int(pos) for slots in layer.slots for pos in np.asarray(slots.pos_BKS[row, 0]) if pos >= 0}


def decoded(layer: LayerCache, positions: range, chunk: int = 1) -> LayerCache:
    """One token after the other, or so many at once, the same for all rows."""
    for first in range(positions.start, positions.stop, chunk):
        here = np.broadcast_to(
            np.arange(first, min(first + chunk, positions.stop)), (len(layer.slots[0].pos_BKS), chunk)
        )
        x = lambda heads, here=here: jnp.ones((*here.shape, heads, HEADS.width))
        _, layer = step(layer, x(2), x(1), x(1), jnp.asarray(here, jnp.int32))
    return layer


@pytest.mark.parametrize("text", ["0:200=90@500", "7:8=0", "0:1=100@0"])
def test_a_hint_is_written_as_it_is_read(text: str) -> None:
    assert str(hint(text)) == text


@pytest.mark.parametrize(
    "text, says",
    [
        ("200=90", "is no hint"),
        ("0:200", "is no hint"),
        ("5:5=90", "5:5"),
        ("9:5=90", "9:5"),
        ("0:5=101", "from 0 to 100, not 101"),
        ("0:5=-1", "is no hint"),
        ("0:99999999999=90", "99999999999"),
        ("0:5=50@99999999999", "99999999999"),
    ],
)
def test_what_is_no_hint_is_told_in_one_line(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says) as told:
        hint(text)
    assert "\n" not in str(told.value)


def replay(hints: list[Hint], slots: int, newest: int) -> set[int]:
    """What is left after each position came in turn: of the lowest priority the oldest goes, but never the newest of all."""
    kept: set[int] = set()
    for now in range(newest + 1):
        kept.add(now)
        said = lambda pos, now=now: max(
            (h.priority for h in hints if h.start <= pos < h.stop and now <= h.until), default=35
        )
        if len(kept) > slots:
            kept.remove(min(kept - {now}, key=lambda pos: (said(pos), pos)))
    return kept


@pytest.mark.parametrize(
    "texts", [["2:6=90"], ["2:6=90@10"], ["0:8=10", "10:12=50@3"], ["0:30=80@4"], ["1:4=35"], []], ids=" ".join
)
def test_tokens_stay_as_their_priority_says_and_as_long(texts: list[str]) -> None:
    """The tier is what a plain replay of the rule holds, at every position."""
    hints = [*map(hint, texts)]
    cache = cache_of("hinted 8")
    layer = (cache.hinted([hints]) if hints else cache).layers[0]
    for now in range(32):
        layer = decoded(layer, range(now, now + 1))
        assert held(layer) == replay(hints, 8, now), now


def test_a_hint_holds_in_a_prompt_that_enters_at_once_and_below_other_tiers() -> None:
    layer = cache_of("sink 1 | recent 4 | hinted 6@int8").hinted([[hint("8:12=90")]]).layers[0]
    layer = decoded(layer, range(32), chunk=32)
    assert held(layer) == {0, 28, 29, 30, 31, 8, 9, 10, 11, 26, 27}


def test_rows_have_hints_of_their_own() -> None:
    layer = cache_of("hinted 8", batch=2).hinted([[hint("2:6=90")], []]).layers[0]
    layer = decoded(layer, range(32))
    assert held(layer, 0) == {2, 3, 4, 5, 28, 29, 30, 31} and held(layer, 1) == {*range(24, 32)}


def test_hints_take_no_bytes_that_were_not_predicted_and_make_no_new_program() -> None:
    cache = cache_of("hinted[ranges=3] 8 | heavy 8", batch=2, layers=2)
    given = cache.hinted([[hint("2:6=90")], [hint("0:1=0")]])
    assert nbytes(cache) == nbytes(given) == 2 * parse("hinted[ranges=3] 8 | heavy 8").nbytes([HEADS] * 2, 64)
    types = lambda each: [*map(jax.typeof, jax.tree.leaves(each))]
    assert types(cache) == types(given) and jax.tree.structure(cache) == jax.tree.structure(given)


@pytest.mark.parametrize(
    "text, rows, says",
    [
        ("recent 8", [["0:4=90"]], "no tier of the cache reads hints"),
        ("hinted[ranges=1] 8", [["0:4=90", "4:8=80"]], "hinted.ranges=1. has room for so many hints, not for 2"),
        ("hinted 8", [["0:4=90", "3:8=80@5"]], "0:4=90 and 3:8=80@5 are about the same positions"),
        ("hinted 8", [["0:4=90"], []], "hints of 2 rows are given to a cache of 1"),
    ],
)
def test_hints_that_cannot_be_are_told_in_one_line(text: str, rows: list[list[str]], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        cache_of(text).hinted([[*map(hint, each)] for each in rows])


def test_hints_and_attention_rank_beside_each_other() -> None:
    """A tier of hints may follow one whose heads differ, and heads that hold other tokens are ranked by their own."""
    assert str(parse("heavy 4 | hinted 4")) == "heavy 4 | hinted 4"
    priority = functools.partial(POLICIES["hinted"]().priority, jnp.asarray([[[1, 5], [5, 9]]]))
    memory = jnp.zeros((1, 2, 8, 4), jnp.int32).at[:, :, 0].set(jnp.asarray([4, 6, 90, 20]))
    assert priority((memory,), jnp.full((1, 1, 1), 12)).tolist() == [[[35, 90], [90, 35]]]
    assert priority((memory,), jnp.full((1, 1, 1), 21)).tolist() == [[[35, 35], [35, 35]]]
