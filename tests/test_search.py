"""The search: curves that say what a cache costs, options and rivals that fit; of a whole search test_cli has one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvcascade.cache.layer import LayerCache
from kvcascade.cache.spec import parse
from kvcascade.eval.quality.windows import Windows
from kvcascade.eval.search import curves, options, tune
from kvcascade.kernels.heads import Heads
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig

CONFIG = ModelConfig(vocab=64, context=48, layers=2, width=32, heads=4, kv_heads=2, mlp=48)
PARAMS = gpt.init(CONFIG, 3)
ROWS = np.random.default_rng(0).integers(0, 64, (3, 33)).astype(np.int32)


def test_a_slope_is_the_derivative_of_the_loss() -> None:
    """A small push to what attention gives changes the nats by the slope times it."""
    (layers,) = curves.record(CONFIG, PARAMS, ROWS)
    rng = np.random.default_rng(1)
    for layer, found in enumerate(layers):
        push = found.slope_BTNW + jnp.asarray(rng.standard_normal(found.out_BTNW.shape), jnp.float32) * 1e-3
        push *= 0.1 / (push * found.slope_BTNW).sum()
        nats = []
        for sign in (1, -1):
            taps = [jnp.zeros_like(each.out_BTNW) for each in layers]
            taps[layer] = sign * push
            nats.append(float(_nats(tuple(taps))))
        assert (nats[0] - nats[1]) / 2 == pytest.approx(float((push * found.slope_BTNW).sum()), rel=5e-2)


def _nats(taps):
    """The loss with something added to what attention gives, written out."""
    model = nnx.merge(gpt.graph(CONFIG)[0], PARAMS)
    tokens, targets = jnp.asarray(ROWS[:, :-1]), jnp.asarray(ROWS[:, 1:])
    positions = jnp.broadcast_to(jnp.arange(32), (3, 32))
    x, _ = model.hidden(tokens, positions, curves.Tapped(CONFIG.layer_heads, 32, taps=taps), fresh=True)
    logits = model.logits(x)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jnp.log(jnp.exp(logits).sum(-1)) - chosen).sum()


def test_errors_are_those_of_the_cache_and_none_of_a_full_one() -> None:
    recorded = curves.record(CONFIG, PARAMS, ROWS)
    none = curves.errors(CONFIG, parse("full@f32"), recorded)
    assert none.nats_LK.shape == (2, 2) and none.nats_LK.max() < 1e-8 and none.squares_LK.max() < 1e-8
    spec = parse("sink 1 | recent 4 | heavy 5")
    found = curves.errors(CONFIG, spec, recorded)
    for layer, (group, part) in enumerate(zip(spec.groups(CONFIG.layer_heads), recorded[0], strict=True)):
        cache, vectors = LayerCache.empty(group.cascade, 3, group.of, 32, group.ids), part.vectors
        missed = []
        for t in range(32):
            some = jax.tree.map(lambda x, t=t: x[:, t : t + 1], vectors)
            q, k, v, written = some
            out, cache = cache.step(q, k, v, jnp.full((3, 1), t), written_BTK=written)
            missed.append(np.asarray(out)[:, 0] - np.asarray(part.out_BTNW)[:, t])
        missed, slope = np.stack(missed, 1), np.asarray(part.slope_BTNW)
        by_head = lambda x: x.reshape(3, 32, 2, -1)
        first = by_head((missed * slope).sum(-1)).sum(-1)
        np.testing.assert_allclose(found.nats_LK[layer], 0.5 * (first**2).mean((0, 1)), rtol=1e-3)
        squares = (slope**2).mean() * by_head((missed**2).sum(-1)).sum(-1).mean((0, 1))
        np.testing.assert_allclose(found.squares_LK[layer], squares, rtol=1e-3)


HEADS = (Heads(6, 3, 64),) * 4


@pytest.mark.parametrize("part", [0.5, 0.33, 0.1])
def test_rivals_fit_and_leave_little_room(part: float) -> None:
    """Every method, preset and mixture is as large as fits."""
    budget = int(part * 4 * 3 * 512 * 256)
    found = options.rivals(HEADS, 512, budget, "")
    assert len(found) > 20 and {"method: random", "preset: streaming"} <= {*found}
    for name, spec in found.items():
        size = spec.nbytes(HEADS, 512)
        assert size <= budget
        assert size > 0.9 * budget or name.startswith("codec") or "then" in str(spec), name


def test_what_may_be_chosen_is_of_the_kinds_that_are_allowed() -> None:
    every = {str(each) for each in options.options(512, "", True, True)}
    slots = {str(each) for each in options.options(512, "", True, False)}
    bits = {str(each) for each in options.options(512, "", False, True)}
    assert all("@" not in each for each in slots) and "sink 4 | recent 12 | observed 128" in slots
    assert all("full" in each for each in bits) and "sink 4 | full@int4h" in bits
    assert "sink 4 | recent 12 | expected 41@lloyd2h" in every and "full" in every
    calibrated = options.options(512, "some.safetensors")
    assert all(
        (each.calibration != "") == ("m" in str(each).partition("@")[2].partition(" ")[0]) for each in calibrated
    )


def test_no_document_is_tuned_on_and_held_out() -> None:
    rows = np.arange(60).reshape(10, 6).astype(np.int32)
    documents = np.array([3, 0, 1, 1, 2, 3, 0, 2, 1, 1])
    tuning, held = tune.halves(Windows(rows, documents, "x", "y", "spread", 0, False))
    assert not {*tuning.documents_B} & {*held.documents_B} and len(tuning.rows_BT) + len(held.rows_BT) == 10
    one = dataclasses.replace(held, rows_BT=rows, documents_B=np.zeros(10, int))
    assert [len(each.rows_BT) for each in tune.halves(one)] == [5, 5]
