"""A model that foresees its own tokens by the high plane of its cache: answers are the same, and nothing of what it tried is left."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import CONFIG, params, requests, serve, texts

from kvcascade.cache.codec import NAMES, coarse, high
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.kernels import pages
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import normalise
from kvcascade.kernels.slots import Codecs
from kvcascade.model import gpt
from kvcascade.model.sampling import Sampling
from kvcascade.serve.device import Device
from kvcascade.serve.engine import Engine
from kvcascade.serve.plan import Limits
from kvcascade.serve.propose import by_model
from kvcascade.serve.request import Request
from kvcascade.serve.rows import device_for


def engine(ahead: int, config=CONFIG, blocks: int = 60, rows: int = 3) -> Engine:
    limits = Limits(16, rows, ahead=ahead, itself=ahead > 0)
    weights = params() if config == CONFIG else gpt.init(config, 0)
    device = Device(config, weights, parse("full@planes on blocks"), blocks, limits, size=16)
    return Engine(device, propose=by_model if ahead else None)


@settings(max_examples=20)
@given(name=st.sampled_from(["planes", "planesh"]), width=st.sampled_from([8, 64]), seed=st.integers(0, 99))
def test_the_high_plane_is_half_of_the_bytes_and_within_its_bound(name: str, width: int, seed: int) -> None:
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(5, 3, width)) * 4, jnp.float32)
    stored = NAMES[name].encode(x)
    codec, kept = coarse(NAMES[name], stored)
    assert all(kept[part] is stored["codes" if part == "high" else part] for part in kept)
    assert sum(array.nbytes for array in kept.values()) == 15 * codec.nbytes(width) == 15 * (width // 2 + 4)
    assert NAMES[name].nbytes(width) == width + 4
    assert (jnp.abs(codec.read(kept) - codec.turn(x)) <= codec.bound(kept) * 1.001).all()
    # As if it had been stored so: of the same grid the high bits.
    for part, array in dataclasses.replace(high, turned=codec.turned).encode(x).items():
        np.testing.assert_array_equal(array, kept[part])


@pytest.mark.parametrize("name", ["planes", "planesh"])
def test_attention_to_the_high_plane(name: str) -> None:
    """The C++ kernel against the reference."""
    rng, heads = np.random.default_rng(0), Heads(4, 2, 16)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    codecs = Codecs(NAMES[name], NAMES[name])
    pool = pages.Pool.empty(codecs, 6, 2, 16, heads)
    pool = pages.write(pool, normal(64, 2, 16), normal(64, 2, 16), jnp.arange(64, dtype=jnp.int32), 1, codecs)
    (k, k_held), (v, v_held) = (coarse(*pair) for pair in zip(codecs, pool, strict=True))
    table, row, q_pos = jnp.asarray([[2, 0], [3, 1]]), jnp.asarray([0, 1, 1]), jnp.asarray([[30], [17], [-1]])
    q = normal(3, 1, 4, 16)
    found = [
        normalise(
            [
                pages.attend(
                    q, q_pos, row, table, pages.Pool(k_held, v_held), 1, Codecs(k, v), heads, implementation=each
                )
            ]
        )[0]
        for each in (None, "xla")
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    whole = normalise([pages.attend(q, q_pos, row, table, pool, 1, codecs, heads)])[0]
    assert 0 < jnp.abs(found[0] - whole).max() < 0.2 and not found[0][2].any()


@pytest.mark.parametrize("blocks", [60, pytest.param(6, marks=pytest.mark.slow)])
def test_what_it_foresees_changes_no_token(blocks: int) -> None:
    plain, ours = engine(0, blocks=blocks), engine(3, blocks=blocks)
    assert serve(ours, texts()) == serve(plain, texts())
    assert sum(ours.accepted) > 0.6 * ours.stats["drafted"] and sum(ours.accepted[1:])
    if blocks == 60:
        assert ours.stats["steps"] < 0.7 * plain.stats["steps"]
    else:
        assert plain.stats["stopped"]


def test_nothing_is_compiled_after_the_warm_up() -> None:
    ours = engine(2)
    assert isinstance(ours.device, Device)
    ours.device.warm()
    before = ours.device.compiled()
    serve(ours, requests())
    assert ours.device.compiled() == before and ours.stats["drafted"]


@pytest.mark.slow
def test_nothing_drifts_over_ten_thousand_tokens() -> None:
    """What was tried is written over by what is so: the last of ten thousand tokens is still that of a model that tries nothing."""
    config = dataclasses.replace(CONFIG, context=10_240)
    asked = Request([3, 1, 4], 10_000, Sampling(temperature=0.8, seed=5))
    found = [engine(ahead, config, blocks=642, rows=1) for ahead in (0, 3)]
    plain, ours = [], []
    for each, tokens in zip(found, (plain, ours), strict=True):
        each.submit(asked)
        while each.busy:
            tokens += [event.token for event in each.run_step()]
    assert ours == plain and len(ours) == 10_000
    assert found[1].stats["drafted"] > 5_000 and sum(found[1].accepted)


def test_what_has_no_high_plane_is_refused() -> None:
    limits = Limits(ahead=2, itself=True)
    for spec in ("full@int8 on blocks", "full on blocks", "pending 4 | full@planes"):
        with pytest.raises(BadInput, match="foresees by the high plane"):
            device_for(CONFIG, params(), parse(spec), 20, limits)
    with pytest.raises(BadInput, match="int8 has no plane of high bits"):
        coarse(NAMES["int8"], NAMES["int8"].encode(jnp.ones((1, 8))))
    assert jax.tree.leaves(coarse(NAMES["planes"], NAMES["planes"].encode(jnp.ones((1, 8))))[1])
