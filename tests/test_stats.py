"""Intervals that cover what they say: simulated on values with heavy tails, in documents of unequal lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.eval import stats

DRAWN = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "heavy on both sides": (lambda rng, n: rng.standard_t(3, size=n), 0.0),
    "skewed": (lambda rng, n: np.exp(0.5 * rng.normal(size=n)), np.exp(0.125)),
    "very skewed": (lambda rng, n: np.exp(rng.normal(size=n)), np.exp(0.5)),
}


@pytest.mark.parametrize(("documents", "least"), [(8, 0.89), (30, 0.93), (60, 0.93)])
@pytest.mark.parametrize("kind", DRAWN)
def test_coverage(kind, documents, least):
    """95 % are 93 to 97 % from 30 documents on, within what 400 draws can tell; with eight, little less."""
    rng, (draw, mean), hits, draws = np.random.default_rng(documents), DRAWN[kind], 0, 400
    for _ in range(draws):
        clusters = np.repeat(np.arange(documents), rng.integers(1, 4, documents))
        low, high = stats.interval(0.5 * draw(rng, documents)[clusters] + 0.5 * draw(rng, len(clusters)), clusters)
        hits += low <= mean <= high
    noise = 2 * np.sqrt(0.05 * 0.95 / draws)
    assert least - noise < hits / draws < 0.97 + noise


def test_windows_of_one_document_are_not_so_many_samples():
    """Eight documents whose windows are all alike say no more than eight windows; taken for 80 they would seem three times as sure."""
    each = np.random.default_rng(0).normal(size=8)
    windows, documents = np.repeat(each, 10), np.repeat(np.arange(8), 10)
    width = lambda pair: pair[1] - pair[0]
    assert width(stats.interval(windows, documents)) == pytest.approx(width(stats.interval(each)))
    assert width(stats.interval(windows)) < 0.35 * width(stats.interval(each))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.floats(-1e6, 1e6), st.floats(1e-3, 1e3))
def test_the_mean_lies_within_and_units_do_not_matter(values, shift, scale):
    low, high = stats.interval(values)
    room = 1e-9 * (1 + max(map(abs, values)))
    assert low - room <= np.mean(values) <= high + room
    moved = stats.interval(np.asarray(values) * scale + shift)
    np.testing.assert_allclose(
        moved,
        np.asarray([low, high]) * scale + shift,
        rtol=1e-3,
        atol=1e-6 * scale * (1 + max(map(abs, values))) + 1e-6 * abs(shift),
    )


def test_what_cannot_be_said_is_not_a_number():
    assert np.isnan(stats.interval([1.0])).all()
    assert np.isnan(stats.interval([1.0, 2.0, 3.0], [4, 4, 4])).all()
    assert np.isnan(stats.interval([1.0, np.inf])).all()
    assert stats.interval([0.25] * 5) == (0.25, 0.25)


@pytest.mark.parametrize("kind", DRAWN)
def test_what_is_not_there_is_seldom_decided(kind):
    """Of ten differences that are none, in at most 5 % of cases one is taken for one, within what 200 draws can tell; in 20 % of very skewed data."""
    rng, (draw, mean), wrong, draws = np.random.default_rng(0), DRAWN[kind], 0, 200
    for _ in range(draws):
        wrong += any(stats.decided([stats.p_value(draw(rng, 40) - mean) for _ in range(10)]))
    assert wrong / draws < (0.25 if kind == "very skewed" else 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / draws))


def test_decisions():
    """Holm's steps: the least by 5 % over all, the next by 5 % over the others; after the first that is not, none is."""
    assert stats.decided([0.01, 0.02, 0.03]) == [True, True, True]
    assert stats.decided([0.02, 0.03, 0.001]) == [True, True, True]
    assert stats.decided([0.03, 0.04, 0.001]) == [False, False, True]
    assert stats.decided([0.02, float("nan")]) == [True, False] and stats.decided([]) == []


def test_p_values_go_with_intervals():
    """A mean whose interval has 0 in it has more than 5 %, one that is far from 0 next to nothing, one that is 0 all."""
    values = np.random.default_rng(0).normal(size=40)
    low, high = stats.interval(values)
    assert stats.p_value(values - (high + 0.05)) < 0.05 < stats.p_value(values - (low + high) / 2)
    assert stats.p_value([0.0] * 4) == 1 and stats.p_value([0.5] * 4) == 0 and np.isnan(stats.p_value([0.5]))
    assert stats.standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)
