"""What a cache relies on is told where it does not hold: in the library at once, under `jit` in checked programs."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.checks import checked
from kvcascade.cache.errors import BadInput
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.spec import parse
from kvcascade.kernels.heads import Heads

HEADS = Heads(4, 2, 8)
step = checked(LayerCache.step)
prompt = checked(functools.partial(LayerCache.step, fresh=True))


def cache(spec: str, context: int = 8, heads: Heads = HEADS) -> LayerCache:
    return LayerCache.empty(parse(spec).parts[0][2], 2, heads, context)


def tokens(positions: list[int]) -> tuple[jax.Array, ...]:
    """Queries, keys, values and positions of two rows that are alike."""
    normal = np.random.default_rng(0).standard_normal
    vectors = (jnp.asarray(normal((2, len(positions), n, 8)), jnp.float32) for n in (4, 2, 2))
    return *vectors, jnp.asarray([positions, positions], jnp.int32)


@pytest.mark.parametrize("spec", ["full", "full@int4h", "sink 2 | recent 2 | full@int8"])
@pytest.mark.parametrize("more", [[8], [6, 7, 8]])
def test_more_tokens_than_a_full_cache_was_made_for(spec: str, more: list[int]) -> None:
    """The ninth token of a cache for eight would take the place of the first."""
    _, held = step(cache(spec), *tokens([*range(6)]))
    if len(more) == 1:
        _, held = step(held, *tokens([6, 7]))
    with pytest.raises(BadInput, match="a full cache for 8 tokens is given another"):
        step(held, *tokens(more))


def test_a_prompt_longer_than_a_full_cache() -> None:
    with pytest.raises(BadInput, match="a full cache for 4 tokens is given another"):
        prompt(cache("full", 4), *tokens([0, 1, 2, 3, 4, -1]))


def test_a_window_needs_no_more_slots_than_it_has() -> None:
    """A full cache of a layer that sees four positions goes on past its context, and holds these four."""
    held = cache("full", 8, Heads(4, 2, 8, window=4))
    for position in range(20):
        _, held = step(held, *tokens([position]))
    assert sorted(held.slots[0].pos_BKS[0, 0].tolist()) == [16, 17, 18, 19]


@pytest.mark.parametrize("spec", ["recent 2 | heavy 4", "sink 2 | recent 4", "random 4 | recent 2", "full"])
def test_what_a_window_hides_gives_its_slot_away(spec: str) -> None:
    """With six slots for a window of six all that is held can be seen: the last six positions, whatever the policy."""
    held = cache(spec, 48, Heads(4, 2, 8, window=6))
    for position in range(40):
        _, held = step(held, *tokens([position]))
    pos_BKS = np.concatenate([slots.pos_BKS for slots in held.slots], -1)
    np.testing.assert_array_equal(np.sort(pos_BKS), np.broadcast_to(np.arange(34, 40), (2, 2, 6)))


@pytest.mark.parametrize("again", [[2], [5], [5, 6], [6, 6], [7, 6, 7], [3, 9]])
def test_a_position_that_is_not_new(again: list[int]) -> None:
    """Twice in a call, again, or earlier than what the row has seen, though it is not held any more."""
    _, held = step(cache("sink 1 | recent 3"), *tokens([0, 1, 2, 3, 4, 5]))
    with pytest.raises(BadInput, match="positions must be new, and higher"):
        step(held, *tokens(again))


def test_a_second_prompt() -> None:
    _, held = prompt(cache("recent 3 | heavy 3"), *tokens([0, 1, -1]))
    with pytest.raises(BadInput, match="put into a cache that is not empty"):
        prompt(held, *tokens([2, 3, -1]))


@pytest.mark.parametrize("positions", [[-1, 0, 1], [0, -1, 1], [1, 2, 3], [1, 0, 2]])
def test_a_prompt_that_is_not_padded_on_the_right(positions: list[int]) -> None:
    with pytest.raises(BadInput, match="not 0, 1, 2, … with padding after them"):
        prompt(cache("full"), *tokens(positions))


def test_a_program_that_is_not_checked_has_no_checks() -> None:
    """Elsewhere a promise is not even traced, and what is checked computes the same."""
    arguments = cache("sink 1 | heavy 2"), *tokens([0])
    assert "check" not in str(jax.make_jaxpr(LayerCache.step)(*arguments))
    plain, looked_at = jax.jit(LayerCache.step)(*arguments), step(*arguments)
    for ours, theirs in zip(jax.tree.leaves(looked_at), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("start", [2**24, 2**25, 2**30])
def test_a_window_is_one_wherever_a_row_stands(start: int) -> None:
    """Positions in float32 are not told apart from 2^24 on; ages are."""
    held, run = cache("recent 2 | heavy 4"), jax.jit(LayerCache.step)
    for position in range(start, start + 12):
        _, held = run(held, *tokens([position]))
        assert sorted(held.slots[0].pos_BKS[0, 0].tolist())[-1] == position
    assert sorted(held.slots[0].pos_BKS[1, 1].tolist()) == [start + 10, start + 11]
    assert held.slots[1].pos_BKS.min() >= start


@pytest.mark.slow
def test_with_64_bits_a_model_generates_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """JAX_ENABLE_X64 changes what arrays are made of that nobody gave a type."""
    program = (
        "import numpy as np; from kvcascade.cache.spec import parse; from kvcascade.model import generate, gpt;"
        "from kvcascade.model.config import ModelConfig;"
        "config = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=61, context=32);"
        "cache = generate.empty_cache(config, parse('sink 1 | recent 3@int8 | heavy 4@int4h | random 4'), 2, 32);"
        "found = generate.generate(config, gpt.init(config, 0), cache, [[3, 1, 4], [9]], 20);"
        "print(np.concatenate([new for new, _ in found]).tolist())"
    )

    wide = os.environ | {"JAX_ENABLE_X64": "1"}
    found = subprocess.run([sys.executable, "-c", program], env=wide, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    exec(program, {})
    assert found.stdout == capsys.readouterr().out
