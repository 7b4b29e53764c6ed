"""Models whose layers are not alike: other heads, other widths of keys and values, other windows, behind a cache of their own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.cache.whole import nbytes
from kvcascade.eval.quality import perplexity
from kvcascade.kernels.backend import using
from kvcascade.kernels.decode import decode
from kvcascade.kernels.heads import Heads, Rope
from kvcascade.model import convert, generate, gpt, pretrained, shapes
from kvcascade.model.config import ModelConfig, by_layer
from kvcascade.scripts import cli
from kvcascade.train import config as settings

ONE = ModelConfig(layers=4, width=32, heads=4, kv_heads=2, mlp=64, vocab=61, context=32)
LAYERS = by_layer(
    ONE,
    [
        {},
        {"kv_heads": 4, "window": 5, "rope_base": 100.0},
        {"heads": 2, "kv_heads": 1, "head_width": 20, "soft_cap": 3.0, "attention_scale": 1.0},
        {"heads": 6, "kv_heads": 3, "head_width": 8, "positions": "learned"},
    ],
)
"""Other numbers of heads, widths, windows, scales and turns in each layer."""
WIDE = dataclasses.replace(
    ONE, layers=2, unlike=(*ONE.layer_heads[:1], Heads(4, 2, 8, value_width=12, soft_cap=2.0, rope=Rope()))
)
"""A layer whose values are wider than its keys."""
MIXED = (
    "layers[0:2]: full@f32 ; layers[2:3]: sink 1 | recent 6 | heavy 3@int8/int4 ; layers[3:]: recent 4 | heavy 4@int8"
)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 16)).astype(np.int32)


forward = jax.jit(gpt.forward, static_argnums=0)


def drawn(config: ModelConfig) -> gpt.Params:
    """Weights large enough for attention to be peaked."""
    return jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, gpt.init(config, 0))


def decoded(config: ModelConfig, params: gpt.Params, chunk: int, prefill: int = 0) -> np.ndarray:
    """Logits of all positions through a full cache, the first ones in one prefill of a padded row, the others in chunks."""
    B, T = TOKENS.shape
    cache, found = generate.empty_cache(config, parse("full@f32"), B, T), []
    step = jax.jit(lambda cache, tokens, positions: gpt.step(config, params, cache, tokens, positions))
    if prefill:
        positions = np.broadcast_to(np.where(np.arange(T) < prefill, np.arange(T), -1), (B, T))
        logits_BV, cache = generate.prefill(config, params, cache, jnp.asarray(TOKENS), jnp.asarray(positions))
        found.append(np.asarray(logits_BV)[:, None])
    for start in range(prefill, T, chunk):
        positions = np.broadcast_to(np.arange(start, start + chunk), (B, chunk))
        logits, cache = step(cache, TOKENS[:, start : start + chunk], positions)
        found.append(np.asarray(logits))
    return np.concatenate(found, 1)


@pytest.mark.slow
@pytest.mark.parametrize("config", [LAYERS, WIDE], ids=["heads", "values"])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_decoding_through_a_cache_equals_forward(config, implementation) -> None:
    """Law 1: token by token, in chunks, and after a prefill, with the kernel that takes it and with the reference."""
    params = drawn(config)
    want = np.asarray(forward(config, params, jnp.asarray(TOKENS)))
    with using(implementation):
        for chunk, prefill in ((1, 0), (4, 0), (1, 9)):
            found = decoded(config, params, chunk, prefill)
            np.testing.assert_allclose(found, want[:, max(prefill - 1, 0) :], atol=2e-5, rtol=2e-5)


def test_each_layer_has_the_heads_that_it_is_given() -> None:
    """The matrices' shapes, and logits that change with any layer's window, cap or turn."""
    params = drawn(LAYERS)
    shape = lambda index, name: params["layers"][index]["attention"][name]["weight"].shape
    assert [[shape(index, name)[0] for name in "qkv"] for index in range(4)] == [
        [32, 16, 16], [32, 32, 32], [40, 20, 20], [48, 24, 24],
    ]  # fmt: skip
    assert shape(2, "o") == (32, 40) and gpt.init(WIDE, 0)["layers"][1]["attention"]["v"]["weight"].shape == (24, 32)
    want = forward(LAYERS, params, jnp.asarray(TOKENS))
    for index, change in ((1, {"window": 6}), (1, {"rope": Rope()}), (2, {"soft_cap": 0.0}), (3, {"rope": Rope()})):
        heads = list(LAYERS.unlike)
        heads[index] = dataclasses.replace(heads[index], **change)
        other = forward(dataclasses.replace(LAYERS, unlike=tuple(heads)), params, jnp.asarray(TOKENS))
        assert float(jnp.abs(other - want).max()) > 1e-3


def test_the_cpp_kernel_refuses_values_of_another_width() -> None:
    """Asked for, it says why; not asked for, it leaves the step to XLA."""
    heads = WIDE.unlike[1]
    layer = generate.empty_cache(WIDE, parse("full"), 1, 8).layers[1]
    with pytest.raises(NotImplementedError, match="native: .*keys of 8 and values of 12 numbers"):
        decode(jnp.ones((1, 4, 8)), jnp.zeros(1, int), layer.held, heads, False, implementation="native")
    assert decode(jnp.ones((1, 4, 8)), jnp.zeros(1, int), layer.held, heads, False)[0].out_BTNW.shape == (1, 1, 4, 12)


@pytest.mark.parametrize("spec", ["full", "full@int8/int4", MIXED])
@pytest.mark.parametrize("config", [LAYERS, dataclasses.replace(WIDE, layers=4, unlike=WIDE.unlike * 2)])
def test_predicted_bytes_are_those_of_the_buffers(config, spec) -> None:
    """Law 5: of layers with heads, widths, windows and cascades of their own, and of what scoring reports."""
    cache = generate.empty_cache(config, parse(spec), 2, 16)
    real = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert 2 * parse(spec).nbytes(config.layer_heads, 16) == nbytes(cache) == real


def test_the_loss_has_the_heads_soft_cap() -> None:
    """Values and gradients of the blockwise loss are those of the logits that `forward` gives."""
    config = dataclasses.replace(ONE, layers=1, final_soft_cap=1.5)
    params, tokens = drawn(config), jnp.asarray(TOKENS)

    def plain(params):
        logits = forward(config, params, tokens)[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).mean()

    ours = jax.jit(jax.value_and_grad(lambda params: gpt.nll(config, params, tokens).mean()))(params)
    assert float(jnp.abs(forward(config, params, tokens)).max()) > 1.2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
        ours,
        jax.jit(jax.value_and_grad(plain))(params),
    )


def test_what_cannot_be_is_told_in_one_line() -> None:
    """Heads that are too few, or do not divide; heads that would have to be pooled to one number."""
    for unlike in (LAYERS.unlike[:3], LAYERS.unlike[::-1], (*LAYERS.unlike[:3], Heads(4, 3, 8))):
        with pytest.raises(BadInput, match="model.unlike has") as caught:
            dataclasses.replace(LAYERS, unlike=unlike)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="heads of several kinds"):
        convert.convert(LAYERS, gpt.init(LAYERS, 0), 1)


def test_a_run_of_such_a_model_is_described_by_its_file() -> None:
    """Law 7: the configuration after JSON and back is the same; what the file leaves out of a layer is told."""
    wanted = settings.RunConfig(LAYERS)
    content = json.loads(json.dumps(settings.as_dict(wanted)))
    assert settings.from_dict(content, "x") == wanted
    del content["model"]["unlike"][2]["kv"]
    with pytest.raises(BadInput, match="x: model.unlike is incomplete: .*'kv'"):
        settings.from_dict(content, "x")


# Gemma, end to end

GEMMA = "layers[0:1]: full ; layers[1:2]: sink 4 | recent 8 | heavy 8@int8/int4 ; layers[2:3]: full ; layers[3:]: sink 4 | recent 8 | heavy 8@int8/int4"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> str:
    return str(tiny_models.write("gemma2", tmp_path_factory.mktemp("gemma") / "gemma2"))


@pytest.mark.slow
def test_layers_have_the_cache_that_suits_them(gemma, tmp_path, capfd) -> None:
    """`evaluate`: layers that see a window full, those that see everything a cascade: bytes as predicted, by hand too; a full cache scores as
    no cache."""
    text, out = tmp_path / "text.txt", tmp_path / "found.jsonl"
    text.write_text("Some layers see a window, and some see everything there is. " * 4)
    arguments = [
        "evaluate",
        "--model",
        gemma,
        "--data",
        f"file:{text}",
        "--context",
        "48",
        "--sequences",
        "2",
        "--windows",
        "first",
    ]
    cli.main([*arguments, "--cache", "full@f32", "--cache", GEMMA, "--out", str(out)])
    full, mixed = map(json.loads, out.read_text().splitlines())
    for record in (full, mixed):
        assert record["kv_bytes"] == record["kv_bytes_predicted"]
    window, at_bf16, at_int84 = 6, 2 * 16 * 2 + 4, 16 + 2 + 8 + 4 + 4
    wide = 4 * at_bf16 + 8 * (at_bf16 + 4) + 8 * (at_int84 + 4)
    assert mixed["kv_bytes"] == 2 * 2 * (window * at_bf16 + wide)
    assert full["kv_bytes_full"] == 2 * 2 * (window + 48) * 2 * 16 * 2
    model = pretrained.load(gemma)
    rows = jnp.asarray([list(text.read_bytes())[start : start + 48] for start in (0, 48)])
    tokens = jnp.asarray([model.encoding.encode(bytes(row.tolist()).decode()) for row in rows])
    assert full["nll"] == pytest.approx(float(gpt.nll(model.config, model.params, tokens).mean()), abs=1e-4)
    assert mixed["nll"] != full["nll"]
    assert "layers[1:2]" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_it_generates(gemma, capfd) -> None:
    """`generate` through the mixed cache prints the prompt and what the same cache gives token by token."""
    prompt = "Some layers see a window, and some"
    cli.main(["generate", "--model", gemma, "--cache", GEMMA, "--prompt", prompt, "--tokens", "5"])
    printed = capfd.readouterr()
    model = pretrained.load(gemma)
    tokens = model.encoding.encode(prompt)
    cache = generate.empty_cache(model.config, parse(GEMMA), 1, len(tokens) + 5)
    new = np.concatenate([n for n, _ in generate.generate(model.config, model.params, cache, [tokens], 5)])[:, 0]
    assert printed.out.startswith(prompt)
    assert "holds 20 of 38 tokens" in printed.err
    raw = b"".join(map(model.encoding.decode_single_token_bytes, new.tolist()))
    assert raw.decode(errors="replace")[:1] in printed.out[len(prompt) :]


def test_scores_of_a_window_are_those_of_a_full_cache(gemma) -> None:
    """A layer that sees 6 positions loses nothing by a cascade of the 6 newest."""
    model = pretrained.load(gemma)
    rows = np.asarray(tiny_models.PROMPTS, np.int32)
    full = perplexity.score(model.config, model.params, parse("full@f32"), rows, 2)
    same = "layers[0:1]: recent 6@f32 ; layers[1:2]: full@f32 ; layers[2:3]: recent 6@f32 ; layers[3:]: full@f32"
    found = perplexity.score(model.config, model.params, parse(same), rows, 2)
    np.testing.assert_allclose(found.nll_BT, full.nll_BT, atol=1e-5)


def test_newer_and_older_configurations_tell_the_same_shape() -> None:
    """Patterns or types of layers; RoPE in one dict by type of layer, or in fields of its own."""
    for name, ropes in (
        ("gemma2", {"rope_theta": 10000.0, "rope_type": "default"}),
        (
            "gemma3",
            {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        ),
    ):
        old = tiny_models.CONFIGS[name]
        other = ("sliding_window_pattern", "rope_theta", "rope_local_base_freq", "rope_scaling")
        new = {key: value for key, value in old.items() if key not in other} | {"rope_parameters": ropes}
        period = {"gemma2": 2, "gemma3": 3}[name]
        new["layer_types"] = [("full" if (i + 1) % period == 0 else "sliding") + "_attention" for i in range(4)]
        assert shapes.from_hub(new, name) == shapes.from_hub(old, name)
        first = shapes.from_hub(new | {"layer_types": ["full_attention", *new["layer_types"][1:]]}, name)
        assert first.window == 0 and first.layer_heads[1].window == (6 if period == 3 else 0)
        for change, word in (
            ({"layer_types": ["full_attention"]}, "layer_types has 1 texts, not 4"),
            ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
            ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
            ({"hidden_activation": "gelu"}, "the activation gelu"),
            ({"model_type": "gemma3"}, "'gemma3'"),
        ):
            with pytest.raises(BadInput, match=word):
                shapes.from_hub(new | change, name)
