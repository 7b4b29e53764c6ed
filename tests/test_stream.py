"""Decoding on and on: one trace, a bounded cache does not grow, and logits that are not finite end it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.report import figures
from kvcascade.eval.speed import stream
from kvcascade.model import tokenizer
from kvcascade.model.pretrained import Model


@pytest.fixture
def model(nano) -> Model:
    return Model("nano", nano.config, nano.params, tokenizer.bytes_encoding())


def test_a_bounded_cache_goes_on_past_the_models_context(model) -> None:
    spec = parse("sink 1 | recent 3 | heavy 2@int8")
    (found,) = stream.job(model, spec, batch=2, tokens=3 * 1024).run()
    assert [1024, 2048, 3072] == [done for done, *_ in found.points]
    assert found.finite and found.traces == 1 and model.config.context < 1024
    assert found.kv_bytes == spec.nbytes(model.config.layer_heads, 3 * 1024)
    sizes = [size for *_, size in found.points]
    assert max(sizes) - sizes[0] < 2**22  # a list of every step's result, or a cache that is not donated, takes more
    _, columns, ((*_, late, process, logits, traces),) = stream.table([found])
    assert columns[5:8] == ["…1,024", "…2,048", "…3,072"]
    assert float(late) == pytest.approx(found.points[-1][1], abs=0.01) and process.endswith(f"{sizes[0] / 2**20:,.0f}")
    assert (logits, traces) == ("finite", "1")
    assert "<svg" in figures.stream([found])


def test_logits_that_are_not_finite_end_it(model) -> None:
    """One weight is not a number: every later token's logits are not either, whatever token is drawn."""
    params = jax.tree.map(lambda x: x, model.params)
    params["norm"]["scale"] = params["norm"]["scale"].at[0].set(jnp.nan)
    broken = dataclasses.replace(model, params=params)
    with pytest.raises(BadInput, match="not numbers within its first 64 tokens"):
        stream.stream(broken, parse("recent 4"), 1, 1024)


def test_learned_positions_end(model) -> None:
    learned = dataclasses.replace(model, config=dataclasses.replace(model.config, positions="learned"))
    with pytest.raises(BadInput, match="learned positions"):
        stream.stream(learned, parse("recent 4"), 1, 1024)
