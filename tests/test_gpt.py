"""The GPT: its shapes, its start, its parts, and what depends on what."""

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kvcascade.cache.errors import BadInput
from kvcascade.kernels import backend
from kvcascade.kernels.activation import activate
from kvcascade.kernels.heads import Rope
from kvcascade.kernels.nonlinear import ACTIVATIONS
from kvcascade.kernels.resources import equations
from kvcascade.kernels.rotation import rotation, turn
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.train import config

TINY = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=64, context=32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)))


forward = jax.jit(gpt.forward, static_argnums=0)


def logits(shape: ModelConfig, params: gpt.Params, tokens=TOKENS, key=None) -> np.ndarray:
    return np.asarray(forward(shape, params, tokens, key))


def count(shape: ModelConfig) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(gpt.graph(shape)[1]))


@pytest.mark.parametrize("preset", config.PRESETS)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_parameters_are_those_of_the_shape(preset: str, activation: str, kv_heads: int | None) -> None:
    """Their number by the formula, all float32, the embedding counted once."""
    shape = config.PRESETS[preset].model
    shape = dataclasses.replace(shape, activation=activation, kv_heads=kv_heads or shape.heads)
    M, F, V, KH = shape.width, shape.mlp, shape.vocab, shape.kv_heads * shape.head_dim
    matrices = 2 if activation == "gelu" else 3
    assert count(shape) == V * M + shape.layers * (2 * M * M + 2 * M * KH + matrices * M * F + 2 * M) + M
    assert {x.dtype for x in jax.tree.leaves(gpt.graph(shape)[1])} == {jnp.dtype("float32")}


def test_the_sizes_of_the_presets() -> None:
    """small is GPT-2 small without its table of positions; toy is a few million."""
    assert count(config.PRESETS["small"].model) == pytest.approx(124e6, rel=0.01)
    assert 3e6 < count(config.PRESETS["toy"].model) < 5e6


def test_what_is_drawn_has_the_shapes_of_the_graph() -> None:
    """`init` gives the tree of `graph`; matrices are wide by out and in, those of keys and values by their heads."""
    params = gpt.init(TINY, 0)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(params) == shapes(gpt.graph(TINY)[1])
    attention = params["layers"][1]["attention"]
    assert {name: attention[name]["weight"].shape for name in "qkvo"} == {
        "q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32),
    }  # fmt: skip


def test_a_start_is_a_function_of_the_seed() -> None:
    """Same seed, same parameters; and their spreads are those of GPT-2."""
    first, again, other = gpt.init(TINY, 0), gpt.init(TINY, 0), gpt.init(TINY, 1)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))
    assert (first["embed"]["weight"] != other["embed"]["weight"]).any()
    layer = first["layers"][0]
    for matrix, spread in ((layer["up"], 0.02), (layer["attention"]["q"], 0.02), (layer["down"], 0.01)):
        assert float(matrix["weight"].std()) == pytest.approx(spread, rel=0.15)
    assert (layer["attention_norm"]["scale"] == 1).all()


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_a_fresh_model_knows_nothing(activation: str) -> None:
    """The first loss is ln V, whatever the activation; the logits depend on it."""
    shape = dataclasses.replace(TINY, activation=activation)
    params = gpt.init(shape, 0)
    found = logits(shape, params)
    loss = optax.softmax_cross_entropy_with_integer_labels(found[:, :-1], TOKENS[:, 1:]).mean()
    assert float(loss) == pytest.approx(math.log(64), abs=0.1)
    assert ("gate" in params["layers"][0]) == (activation == "swiglu")
    if activation == "relu":
        assert (logits(dataclasses.replace(shape, activation="gelu"), params) != found).any()


def test_logits_depend_on_the_past_alone() -> None:
    """Another token at place 9 changes nothing before it, and something at it and after it."""
    params = gpt.init(TINY, 0)
    changed = TOKENS.at[:, 9].set((TOKENS[:, 9] + 1) % 64)
    before, after = logits(TINY, params), logits(TINY, params, changed)
    np.testing.assert_allclose(after[:, :9], before[:, :9], atol=1e-6)
    assert (np.abs(after[:, 9:] - before[:, 9:]).max(-1) > 1e-4).all()


def test_kv_heads_shared_by_groups_are_repeated_heads() -> None:
    """GQA equals MHA whose heads of a group have the same keys and values (Ainslie et al. 2023, §2.2)."""
    params = gpt.init(TINY, 0)
    repeat = lambda matrix: jnp.repeat(matrix.reshape(2, 8, 32), 2, 0).reshape(32, 32)
    wide = jax.tree.map_with_path(
        lambda path, x: repeat(x) if any(getattr(key, "key", None) in ("k", "v") for key in path) else x, params
    )
    np.testing.assert_allclose(
        logits(dataclasses.replace(TINY, kv_heads=4), wide), logits(TINY, params), rtol=1e-5, atol=1e-6
    )


def test_rope_turns_pairs_by_their_position() -> None:
    """By hand: the pair (h, h + H/2) of a vector at position p is turned by p · base^(-2h/H)."""
    x = np.random.default_rng(0).standard_normal((1, 5, 1, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 7, 100]])
    turned = np.asarray(turn(jnp.asarray(x), rotation(jnp.asarray(positions), x.shape[-1], Rope(100.0))))
    for t, p in enumerate(positions[0]):
        for h in range(4):
            a, b = x[0, t, 0, h], x[0, t, 0, h + 4]
            angle = p * 100.0 ** (-2 * h / 8)
            assert turned[0, t, 0, h] == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-4)
            assert turned[0, t, 0, h + 4] == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-4)


def test_rope_is_relative() -> None:
    """The product of a query and a key depends on their distance alone."""
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))
    at = lambda x, p: turn(x, rotation(jnp.array([[p]]), x.shape[-1], Rope())).ravel()
    product = lambda m, n: float(at(q, m) @ at(k, n))
    for distance in (0, 1, 17):
        for start in (0, 5, 300):
            assert product(start + distance, start) == pytest.approx(product(distance, 0), abs=1e-4)
    assert abs(product(17, 0) - product(0, 17)) > 1e-2


@pytest.mark.parametrize("position", [8_191, 131_071, 1_048_575, 2**24 + 1, 2**30 + 7])
def test_rope_is_as_exact_far_away(position: int) -> None:
    """Cosines and sines of every pair agree with float64 to a millionth of a radian, where float32 angles are off by up to a turn."""
    rope = Rope(500_000.0, tuple(np.linspace(1, 8, 64)))
    cos, sin = rotation(jnp.asarray([[position, -1]]), 128, rope)
    angle = position * 500_000.0 ** (-np.arange(0, 128, 2) / 128) / np.asarray(rope.factors)
    np.testing.assert_allclose(cos[0, 0, 0, 0], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0, 0], [-np.sin(angle), np.sin(angle)], atol=1e-6)


def test_attention_is_relative(nano) -> None:
    """All positions moved alike change nothing; stretched ones do."""
    model = nnx.merge(gpt.graph(nano.config)[0], nano.params)
    tokens, positions = TOKENS % nano.config.vocab, jnp.broadcast_to(jnp.arange(16), (2, 16))
    hidden = jax.jit(lambda positions_BT: model.hidden(tokens, positions_BT, None, None)[0])
    np.testing.assert_allclose(hidden(positions + 7), hidden(positions), rtol=1e-3, atol=1e-3)
    assert np.abs(hidden(positions * 3) - hidden(positions)).max() > 0.1


def test_layers_drop_different_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block has a key of its own, made from the step's."""
    keys = []

    def listening(up, gate, kind, rate, key, *biases):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return activate(up, gate, kind, rate, key, *biases)

    monkeypatch.setattr(gpt, "activate", listening)
    shape = dataclasses.replace(TINY, layers=3, dropout=0.5)
    gpt.forward(shape, gpt.init(shape, 0), TOKENS, jax.random.key(0))
    assert len(set(keys)) == 3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_on_a_gpu_takes_the_kernels(activation: str) -> None:
    """One launch per layer and pass, with the bias inside: nothing of an MLP's width is added to before."""
    shape = dataclasses.replace(TINY, layers=2, mlp=256, dropout=0.1, biases="all", activation=activation)
    rows, params = jnp.zeros((2, 17), jnp.int32), gpt.init(shape, 0)
    loss = lambda params: gpt.nll(shape, params, rows, jax.random.key(0)).mean()
    with backend.target((9, 0)):
        program = jax.jit(jax.grad(loss)).trace(params).lojax.jaxpr
    launched = Counter(each.params["name"] for each in equations(program) if each.primitive.name == "mpmd_map")
    assert launched == {"activation_forward": 2, "activation_backward": 2}


def test_dropout_only_with_a_key() -> None:
    """A key drops some activations, another key others, and without a key the rate does not matter."""
    shape = dataclasses.replace(TINY, dropout=0.5)
    params = gpt.init(TINY, 0)
    np.testing.assert_array_equal(logits(shape, params), logits(TINY, params))
    first = logits(shape, params, key=jax.random.key(0))
    np.testing.assert_array_equal(logits(shape, params, key=jax.random.key(0)), first)
    assert (logits(shape, params, key=jax.random.key(1)) != first).any()
    assert (logits(TINY, params, key=jax.random.key(0)) == logits(TINY, params)).all()


def test_bf16_computes_in_bf16() -> None:
    """Logits come in the type that products are computed in, close to those in float32; the parameters are the same."""
    shape = dataclasses.replace(TINY, dtype="bfloat16")
    params = gpt.init(shape, 0)
    found = forward(shape, params, TOKENS)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), logits(TINY, params), atol=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 0},
        {"width": 30},
        {"width": 36},
        {"heads": 3},
        {"kv_heads": 3},
        {"activation": "tanh"},
        {"dtype": "float16"},
        {"dropout": 1.0},
    ],
    ids=str,
)
def test_shapes_that_cannot_be_are_refused(changes: dict) -> None:
    """BadInput naming the setting as the command line does."""
    with pytest.raises(BadInput, match=f"model.(width|{next(iter(changes)).replace('_', '.')})"):
        dataclasses.replace(TINY, **changes)
