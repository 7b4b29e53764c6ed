import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.policies import POLICIES, PositionAware, Random, text
from kvcascade.cache.policy import Policy
from kvcascade.kernels.heads import Heads


def lots(policy: Random, heads: int, positions: int, layer: int = 0) -> np.ndarray:
    pos = jnp.broadcast_to(jnp.arange(positions), (1, heads, positions))
    read = tuple(
        each.init(1, Heads(heads, heads, 8), range(layer * heads, (layer + 1) * heads)) for each in policy.reads()
    )
    return np.asarray(policy.priority(pos, read, jnp.full((1, 1, 1), positions)))[0]


def test_random_keeps_every_position_about_equally_often() -> None:
    """Over 4096 draws of 16 positions of 64, each is kept a quarter of the time, within five standard deviations."""
    kept = np.zeros(64)
    for seed in range(128):
        kept += (lots(Random(seed), 32, 64).argsort(-1).argsort(-1) >= 48).sum(0)
    assert (np.abs(kept - 1024) < 5 * np.sqrt(4096 * 0.25 * 0.75)).all()


def test_random_is_independent_between_heads_seeds_and_neighbouring_positions() -> None:
    """The lots of different heads, layers and seeds, and of one position and the next do not correlate."""
    draws = np.concatenate([lots(Random(seed), 4, 1000, layer) for seed, layer in ((0, 0), (1, 0), (2**31, 0), (0, 1))])
    correlation = np.corrcoef(np.concatenate([draws[:, 1:], draws[:, :-1]]))
    assert np.abs(correlation - np.eye(32)).max() < 5 / 1000**0.5
    assert (np.diff(np.sort(draws)) > 0).all()


def test_random_gives_the_first_position_of_the_first_head_a_lot_too() -> None:
    """The first token, which most attention goes to, is not the first to go by construction."""
    assert lots(Random(), 1, 64)[0].argmin() != 0


def test_position_aware_is_its_formula() -> None:
    """mass·m/max(m) + recency·pos/now + sink·[pos < sinks], the maximum being over each head's tokens that are there."""
    random = np.random.default_rng(0)
    pos = random.permuted(np.broadcast_to(np.arange(-2, 10), (2, 3, 12)), axis=2).clip(-1).astype(np.int32)
    score, now = random.random((2, 3, 12), np.float32) * np.where(pos < 0, 100, 1), np.array([9, 20]).reshape(2, 1, 1)
    got = PositionAware(0.5, 0.25, 0.125, sinks=2).priority(
        jnp.asarray(pos), (jnp.asarray(score, jnp.float32),), jnp.asarray(now)
    )
    most = np.where(pos < 0, 0, score).max(-1, keepdims=True)
    want = 0.5 * score / most + 0.25 * pos / now + 0.125 * (pos < 2)
    np.testing.assert_allclose(np.asarray(got)[pos >= 0], want[pos >= 0], rtol=1e-5)


def test_position_aware_needs_no_attention_and_no_time() -> None:
    """At the first token, before any attention, the formula is finite."""
    zeros = jnp.zeros((1, 1, 2))
    got = PositionAware().priority(jnp.array([[[0, -1]]]), (zeros,), jnp.zeros((1, 1, 1), jnp.int32))
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    "policy, written",
    [(cls(), name) for name, cls in POLICIES.items()]
    + [(Random(7), "random[seed=7]"), (PositionAware(sinks=4, mass=0.5), "position-aware[mass=0.5,sinks=4]")],
)
def test_text_is_the_name_and_what_differs_from_the_defaults(policy: Policy, written: str) -> None:
    """A policy is written as short as it can be."""
    assert text(policy) == written
