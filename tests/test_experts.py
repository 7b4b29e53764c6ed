"""Mixtures of experts: each token goes through its own, whatever the others do, in every precision of weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.model import gpt, pretrained
from kvcascade.model.config import ModelConfig
from kvcascade.model.experts import Experts


def silu(x):
    return x / (1 + np.exp(-x))


@given(st.sampled_from([1, 5]), st.sampled_from([1, 7, 300]), st.booleans(), st.integers(0, 5))
def test_experts_are_those_of_float64(E, N, normalised, seed):
    rng = np.random.default_rng(seed)
    chosen = int(rng.integers(1, E + 1))
    config = ModelConfig(
        layers=1, width=8, heads=2, kv_heads=2, mlp=6, experts=E, experts_per_token=chosen, experts_normalised=normalised, activation="swiglu"
    )  # fmt: skip
    experts = Experts(config, nnx.initializers.normal(0.5), nnx.Rngs(seed))
    x = rng.normal(size=(N, 8)).astype(np.float32)
    router, up, gate, down = (
        np.asarray(each.rows(), np.float64) for each in (experts.router, experts.up, experts.gate, experts.down)
    )
    scores = np.exp(x @ router.T)
    scores /= scores.sum(-1, keepdims=True)
    wanted = np.zeros((N, 8))
    for n in range(N):
        best = np.argsort(-scores[n])[:chosen]
        shares = scores[n, best] / (scores[n, best].sum() if normalised else 1)
        for share, e in zip(shares, best, strict=True):
            hidden = silu(gate[6 * e : 6 * e + 6] @ x[n]) * (up[6 * e : 6 * e + 6] @ x[n])
            wanted[n] += share * (down[8 * e : 8 * e + 8] @ hidden)
    np.testing.assert_allclose(jax.jit(experts)(jnp.asarray(x)[None])[0], wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_token_does_not_depend_on_its_neighbours(weights, tmp_path):
    """And the precision of weights costs what it costs elsewhere; the router stays in float32."""
    folder = str(tiny_models.write("qwen3_moe", tmp_path))
    model = pretrained.load(folder, weights=weights)
    assert model.params["layers"][0]["experts"]["router"]["weight"].dtype == jnp.float32
    tokens = jnp.asarray(tiny_models.PROMPTS, jnp.int32)
    forward = jax.jit(gpt.forward, static_argnums=0)
    whole = forward(model.config, model.params, tokens)
    if weights == "float32":
        np.testing.assert_allclose(whole[:1, :5], forward(model.config, model.params, tokens[:1, :5]), atol=2e-5)
    else:
        exact = forward(*(lambda each: (each.config, each.params))(pretrained.load(folder)), tokens)
        assert 1e-4 < float(jnp.abs(whole - exact).mean()) < 0.2 * float(jnp.abs(exact).mean())


def test_what_cannot_be_is_one_line():
    for changes, words in (
        ({"experts_per_token": 0}, "experts_per_token is 0, of 4"),
        ({"experts_per_token": 5}, "experts_per_token is 5, of 4"),
        ({"experts_per_token": 2, "activation": "gelu"}, "gated activation"),
    ):
        with pytest.raises(BadInput, match=words):
            dataclasses.replace(ModelConfig(activation="swiglu"), experts=4, **changes)
