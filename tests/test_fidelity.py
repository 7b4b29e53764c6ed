"""Distributions behind a cache against those of the full one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.quality.fidelity import fidelity
from kvcascade.model import gpt


def test_divergence_equals_that_of_a_model_with_a_window(nano):
    """`recent 5` against `full` is the windowed model against the unwindowed, by its formula in float64."""
    rows = np.random.default_rng(0).integers(0, 61, (3, 20)).astype(np.int32)
    logits = lambda window: np.asarray(
        gpt.forward(dataclasses.replace(nano.config, window=window), nano.params, jnp.asarray(rows[:, :-1])), np.float64
    )
    exact, short = logits(0), logits(5)
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (exact, short))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    progress = []
    same, found = fidelity(
        nano.config,
        nano.params,
        [parse("full"), parse("recent 5@f32")],
        rows,
        2,
        lambda done, of: progress.append((done, of)),
    )
    np.testing.assert_allclose(found.kl_BT, kl, atol=3e-2, rtol=3e-2)  # `full` is bf16
    assert (found.kl_BT[:, 6:] > 0).all() and kl.max() > 0.1
    assert (found.same_BT == (exact.argmax(-1) == short.argmax(-1))).mean() > 0.95
    assert not same.kl_BT.any() and same.same_BT.all()
    assert progress[-1][1] == 2 * 19


def test_logits_that_are_not_numbers_are_refused(nano):
    """Which of them is likeliest means nothing."""
    broken = nano.params | {"norm": {"scale": nano.params["norm"]["scale"].at[0].set(jnp.nan)}}
    with pytest.raises(BadInput, match="for position 1 of row 0 are not numbers"):
        fidelity(nano.config, broken, [parse("recent 4")], np.zeros((1, 3), np.int32), 1)
