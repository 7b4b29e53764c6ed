"""Generation and training through the GPU kernels, interpreted: the same tokens and losses as by the reference."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.spec import parse
from kvcascade.kernels.backend import using
from kvcascade.kernels.traffic import counting
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.generate import empty_cache, generate
from kvcascade.train import loop
from kvcascade.train.config import RunConfig, TrainConfig

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton")
KERNELS = ["mosaic", pytest.param("triton", marks=needs_triton)]
MODEL = ModelConfig(layers=2, width=128, heads=4, kv_heads=2, mlp=256, vocab=61, context=32, activation="swiglu")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
def test_generation(implementation):
    """Prompts of two lengths, then steps in which every tier evicts into the next."""
    spec = parse("sink 4 | recent 4 | heavy 4@int8 | heavy 8@int4h")
    params = jax.tree.map(lambda weight: 4 * weight if weight.ndim > 1 else weight, gpt.init(MODEL, seed=0))
    prompts = [list(range(1, 22)), [7, 5, 3]]

    def run(each):
        tokens, held = [], []
        with using(each):
            for tokens_nB, cache in generate(
                MODEL, params, empty_cache(MODEL, spec, 2, MODEL.context), prompts, count=3
            ):
                tokens.append(tokens_nB)
                # Copies: the cache is donated to the next step.
                held = [(np.array(s.pos_BKS), *map(np.array, s.numbers)) for layer in cache.layers for s in layer.slots]
        return np.concatenate(tokens), held

    tokens, held = run("xla")
    with counting() as traffic:
        same_tokens, same_held = run(implementation)
    np.testing.assert_array_equal(same_tokens, tokens)
    for (pos, *numbers), (same_pos, *same_numbers) in zip(held, same_held, strict=True):
        np.testing.assert_array_equal(same_pos, pos)
        np.testing.assert_allclose(same_numbers, numbers, rtol=1e-3, atol=1e-4)
    names = {name for name, _ in traffic.read}
    assert names == {"mosaic"} if implementation == "mosaic" else {"_attend", "_exchange"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
def test_training(implementation):
    """Two steps with dropout: the masks are the same, and so are the losses and the parameters to rounding."""
    settings = TrainConfig(steps=2, batch_size=2, warmup=1, learning_rate=1e-3)
    config = RunConfig(model=dataclasses.replace(MODEL, dropout=0.1, biases="all"), train=settings)
    rows = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 2, 33)))

    def run(each):
        with using(each):
            step = loop.make_step(config, loop.data_mesh())
            state, losses = loop.initial_state(config, gpt.init(config.model, seed=0)), []
            for number in range(2):
                state, metrics = step(state, number, rows[number])
                losses.append(float(metrics["loss"]))
        return losses, state["params"]

    losses, params = run("xla")
    with counting() as traffic:
        same_losses, same_params = run(implementation)
    np.testing.assert_allclose(same_losses, losses, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), same_params, params)
    assert traffic.read.total()
