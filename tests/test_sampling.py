"""Sampling keeps what it promises, and each row draws by its own settings, its own seed and its own positions alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.kernels.write import argmin
from kvcascade.model import generate, gpt
from kvcascade.model.sampling import GREEDY, NOT_A_NUMBER, Sampling, sample, settings

LOGITS = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.07, 0.03]]))


def drawn(sampling: Sampling, logits=LOGITS, seen=None, draws: int = 400) -> np.ndarray:
    """How often each token comes, in as many rows as draws."""
    V = logits.shape[-1]
    seen_BV = jnp.broadcast_to(jnp.zeros((1, V), bool) if seen is None else seen, (draws, V))
    tokens = sample(
        jnp.broadcast_to(logits, (draws, V)), jnp.zeros(draws, jnp.int32), settings(sampling, draws), seen_BV
    )
    return np.bincount(np.asarray(tokens).ravel(), minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(), [1, 0, 0, 0, 0]),
        (Sampling(1.0), [0.4, 0.3, 0.2, 0.07, 0.03]),
        (Sampling(0.5), [0.16, 0.09, 0.04, 0.0049, 0.0009]),
        (Sampling(1.0, top_k=2), [0.4, 0.3, 0, 0, 0]),
        (Sampling(1.0, top_k=99), [0.4, 0.3, 0.2, 0.07, 0.03]),
        (Sampling(1.0, top_p=0.7), [0.4, 0.3, 0, 0, 0]),
        (Sampling(1.0, top_p=0.71), [0.4, 0.3, 0.2, 0, 0]),
        (Sampling(1.0, top_p=1e-6), [1, 0, 0, 0, 0]),
        (Sampling(1.0, min_p=0.45), [0.4, 0.3, 0.2, 0, 0]),
        (Sampling(1.0, top_k=3, min_p=0.6), [0.4, 0.3, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling, shares: list[float]) -> None:
    """Shares within five standard deviations, and nothing from outside the limits."""
    want = np.asarray(shares) / sum(shares)
    got = drawn(sampling)
    np.testing.assert_array_less(np.abs(got - want), 5 * np.sqrt(want * (1 - want) / 400) + 1e-9)
    assert (got[want == 0] == 0).all()


def test_what_was_there_is_penalised() -> None:
    """Positive logits of seen tokens are divided, negative ones multiplied."""
    logits, seen = jnp.asarray([[2.0, 1.9, -1.0, -1.1]]), jnp.asarray([[True, False, False, False]])
    assert drawn(Sampling(repetition_penalty=1.2), logits, seen)[1] == 1
    assert drawn(Sampling(repetition_penalty=1.01), logits, seen)[0] == 1
    negative, seen = jnp.asarray([[-1.0, -1.1]]), jnp.asarray([[True, False]])
    assert drawn(Sampling(repetition_penalty=1.2), negative, seen)[1] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"temperature": float("nan")},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(BadInput):
        Sampling(**wrong)


PROMPTS = [[3, 1, 4], [9], [2, 7, 1, 8, 2]]
MIXED = [Sampling(1.5, seed=7), GREEDY, Sampling(2.0, top_k=40, top_p=0.9, repetition_penalty=1.3, seed=8)]


def continued(nano, prompts, sampling, count: int = 12) -> list[list[int]]:
    """What each prompt goes on with."""
    cache = generate.empty_cache(nano.config, parse("full"), len(prompts), 20)
    steps = generate.generate(nano.config, nano.params, cache, prompts, count, sampling)
    return np.concatenate([tokens_nB for tokens_nB, _ in steps]).T.tolist()


@pytest.mark.slow
def test_a_row_draws_the_same_alone_and_in_any_place(nano) -> None:
    """Of a batch of three in this and in the reverse order, each row is what it is by itself."""
    together = continued(nano, PROMPTS, MIXED)
    assert together == continued(nano, PROMPTS[::-1], MIXED[::-1])[::-1]
    assert together == [continued(nano, [prompt], [how])[0] for prompt, how in zip(PROMPTS, MIXED, strict=True)]
    assert len(set(together[0])) > 3  # what is drawn by one key at all positions would hardly change


@pytest.mark.parametrize("together", [1, 3])
def test_how_many_steps_are_dispatched_together_changes_no_draw(nano, monkeypatch, together: int) -> None:
    """A key of a dispatch, or of a step's number in it, would draw otherwise."""
    expected = continued(nano, PROMPTS, MIXED)
    monkeypatch.setattr(generate, "DISPATCH", together)
    assert continued(nano, PROMPTS, MIXED) == expected


def test_one_sampling_gives_its_rows_seeds_one_after_the_other(nano) -> None:
    """The same prompt three times is continued in three ways, the second as with the next seed alone; the last seed is followed by 0."""
    found = continued(nano, [[5, 6]] * 3, Sampling(1.0, seed=3))
    assert len(set(map(tuple, found))) == 3
    assert continued(nano, [[5, 6]], Sampling(1.0, seed=4)) == found[1:2]
    assert settings(Sampling(seed=2**32 - 1), 2).seed_B.tolist() == [2**32 - 1, 0]
    with pytest.raises(BadInput, match="settings for 1 rows, and 3"):
        continued(nano, PROMPTS, [GREEDY])


def test_one_program_for_any_mix(nano) -> None:
    """All greedy, all sampled, each otherwise: the step is traced once."""
    traces = lambda: generate.decode_steps._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    continued(nano, PROMPTS, GREEDY)
    before = traces()
    for mix in (Sampling(0.7), Sampling(1.0, top_k=3, seed=5), Sampling(1.0, top_p=0.5, min_p=0.1), MIXED):
        continued(nano, PROMPTS, mix)
    continued(nano, PROMPTS, Sampling(repetition_penalty=1.3))
    assert traces() == before


def test_a_greedy_row_next_to_one_that_samples_takes_the_likeliest() -> None:
    """And a row that samples stays within its own limit."""
    by = settings([GREEDY, Sampling(5.0), Sampling(5.0, top_k=2)], 3)
    logits_BV, seen_BV = jnp.broadcast_to(LOGITS, (3, 5)), jnp.zeros((3, 5), bool)
    found = np.asarray([sample(logits_BV, jnp.full(3, position), by, seen_BV) for position in range(60)])
    assert set(found[:, 0]) == {0} and set(found[:, 1]) == {0, 1, 2, 3, 4} and set(found[:, 2]) == {0, 1}


@pytest.mark.parametrize("wrong", [[jnp.nan, 1.0, 2.0], [jnp.inf, jnp.inf, jnp.inf], [-jnp.inf] * 3])
@pytest.mark.parametrize("how", [GREEDY, Sampling(1.0)], ids=["greedy", "sampled"])
def test_logits_that_are_not_numbers_give_no_token(wrong, how: Sampling) -> None:
    """And the row beside keeps its token."""
    logits_BV = jnp.asarray([wrong, [0.0, 90.0, 0.0]])
    found = sample(logits_BV, jnp.zeros(2, jnp.int32), settings(how, 2), jnp.zeros((2, 3), bool))
    assert found.tolist() == [NOT_A_NUMBER, 1]


@pytest.mark.parametrize("how", [GREEDY, Sampling(1.0)], ids=["greedy", "sampled"])
def test_a_model_that_breaks_is_refused_where_it_does(nano, how: Sampling) -> None:
    """The first token already, of the first row."""
    params = jax.tree.map(lambda x: x, nano.params)
    params["norm"]["scale"] = params["norm"]["scale"].at[0].set(jnp.nan)
    cache = generate.empty_cache(nano.config, parse("recent 4"), 3, 20)
    with pytest.raises(BadInput, match="for position 3 of row 0 are not numbers"):
        next(generate.generate(nano.config, params, cache, PROMPTS, 9, how))


def test_a_row_that_breaks_later_is_named(nano) -> None:
    """The embedding of position 12 is not a number: within a dispatch the longest prompt comes there first."""
    config = dataclasses.replace(nano.config, positions="learned")
    params = gpt.init(config, 0)
    params["position"]["embedding"] = params["position"]["embedding"].at[12].set(jnp.nan)
    steps = generate.generate(config, params, generate.empty_cache(config, parse("full"), 3, 20), PROMPTS, 12)
    next(steps)
    with pytest.raises(BadInput, match="for position 13 of row 2 are not numbers"):
        next(steps)


def test_the_least_of_what_is_not_a_number_is_an_index() -> None:
    """`argmin` of a row with a NaN stays in range."""
    assert argmin(jnp.asarray([[jnp.nan, 1.0], [2.0, 1.0], [1.0, 1.0]])).tolist() == [1, 1, 0]
