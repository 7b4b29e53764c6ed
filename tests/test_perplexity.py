"""Scores through a cache agree with independent computations of the same quantity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.quality.perplexity import score
from kvcascade.model import attention, gpt
from kvcascade.model.config import ModelConfig

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=61, context=24)


@pytest.fixture(scope="module")
def params():
    # Ten times the usual spread, so that attention is far from uniform and a wrong mask would show.
    return jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, gpt.init(CONFIG, 0))


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, 61, (3, 24)).astype(np.int32)


def test_full_cache_equals_the_uncached_loss(params, rows):
    """One token at a time through a float32 cache gives the loss of one forward pass; a ragged last batch changes nothing."""
    expected = np.asarray(jax.jit(functools.partial(gpt.nll, CONFIG))(params, jnp.asarray(rows)))
    scores = score(CONFIG, params, parse("full@f32"), rows, batch=2)
    np.testing.assert_allclose(scores.nll_BT, expected, atol=2e-4)
    assert scores.traces == 1


@pytest.mark.parametrize(("sinks", "window"), [(2, 6), (1, 9)])
def test_sinks_and_window_equal_a_masked_forward_pass(params, rows, monkeypatch, sinks, window):
    """`sink s | recent w` sees the first s positions and the last w, itself included: dense attention under that mask."""
    i, j = np.arange(23)[:, None], np.arange(23)
    mask = (j <= i) & ((j < sinks) | (j > i - window))
    masked = lambda q, k, v, window: jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[None, None])
    monkeypatch.setattr(attention, "causal_attention", masked)
    expected = np.asarray(jax.jit(functools.partial(gpt.nll, CONFIG))(params, jnp.asarray(rows)))
    monkeypatch.undo()
    scores = score(CONFIG, params, parse(f"sink {sinks}@f32 | recent {window}@f32"), rows, batch=3)
    np.testing.assert_allclose(scores.nll_BT, expected, atol=2e-4)


def test_prefix_scores_only_what_follows(params, rows):
    """With a full cache, tokens after a prefilled prefix score as without it."""
    whole = score(CONFIG, params, parse("full@f32"), rows, batch=3)
    after = score(CONFIG, params, parse("full@f32"), rows, batch=3, prefix=10)
    assert after.nll_BT.shape == (3, 14)
    np.testing.assert_allclose(after.nll_BT, whole.nll_BT[:, 9:], atol=2e-4)


@pytest.mark.parametrize("prefix", [-1, 24])
def test_a_prefix_that_leaves_nothing_is_refused(params, rows, prefix):
    """A prefix must leave something to score."""
    with pytest.raises(BadInput, match="prefix"):
        score(CONFIG, params, parse("full"), rows, batch=3, prefix=prefix)


def test_a_context_longer_than_the_models_is_refused(params):
    """Rows may not be longer than the model's context."""
    with pytest.raises(BadInput, match="longer than the model's 24"):
        score(CONFIG, params, parse("full"), np.zeros((1, 25), np.int32), batch=1)


@pytest.mark.parametrize("prefix", [0, 10])
def test_logits_that_are_not_numbers_are_refused(params, rows, prefix):
    """A mean of them would be none either."""
    broken = params | {"norm": {"scale": params["norm"]["scale"].at[0].set(jnp.nan)}}
    with pytest.raises(BadInput, match=f"for position {max(prefix, 1)} of row 0 are not numbers"):
        score(CONFIG, broken, parse("full"), rows, batch=3, prefix=prefix)
