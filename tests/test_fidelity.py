"""Distributions behind a cache against those of the full one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.quality import perplexity
from kvcascade.model import gpt


@pytest.mark.slow
def test_divergence_equals_that_of_a_model_with_a_window(nano):
    """`recent 5` against `full` is the windowed model against the unwindowed, by its formula in float64."""
    rows = np.random.default_rng(0).integers(0, 61, (3, 20)).astype(np.int32)
    logits = lambda window: np.asarray(
        gpt.forward(dataclasses.replace(nano.config, window=window), nano.params, jnp.asarray(rows[:, :-1])), np.float64
    )
    exact, short = logits(0), logits(5)
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (exact, short))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    score = lambda cache, prefix=0: perplexity.score(
        nano.config, nano.params, parse(cache), rows, 2, prefix, parse("full")
    )
    found = score("recent 5@f32")
    assert found.kl_BT is not None and found.same_BT is not None
    np.testing.assert_allclose(found.kl_BT, kl, atol=3e-2, rtol=3e-2)  # `full` is bf16
    assert (found.kl_BT[:, 6:] > 0).all() and kl.max() > 0.1
    assert (found.same_BT == (exact.argmax(-1) == short.argmax(-1))).mean() > 0.95
    alone = perplexity.score(nano.config, nano.params, parse("recent 5@f32"), rows, 2)
    np.testing.assert_array_equal(found.nll_BT, alone.nll_BT)
    assert found.kv_bytes == alone.kv_bytes
    same = score("full")
    assert same.kl_BT is not None and same.same_BT is not None and not same.kl_BT.any() and same.same_BT.all()
    after = score("recent 16@f32", 12)
    assert after.kl_BT is not None and after.kl_BT.shape == after.nll_BT.shape == (3, 8)


def test_logits_that_are_not_numbers_are_refused(nano):
    """Which of them is likeliest means nothing."""
    broken = nano.params | {"norm": {"scale": nano.params["norm"]["scale"].at[0].set(jnp.nan)}}
    with pytest.raises(BadInput, match="for position 1 of row 0 are not numbers"):
        perplexity.score(nano.config, broken, parse("recent 4"), np.zeros((1, 3), np.int32), 1, 0, parse("full"))
