"""What changes a model's mathematics is read or refused; every wrong value is one line that names the file and the key."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.heads import Rope
from kvcascade.model import rope, shapes
from kvcascade.model.metadata import Metadata

LLAMA = tiny_models.CONFIGS["llama"]
FIELDS = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 64, "llama.embedding_length": 32,
    "llama.feed_forward_length": 48, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
TENSORS = {"token_embd.weight": (270, 32)}
KEYS = json.loads(
    Path(__file__).with_name("golden_config_keys.json").read_text("utf-8")
)  # as transformers 5.24 writes them


def of_gguf(**changes):
    return shapes.from_gguf(FIELDS | {f"llama.{key}": value for key, value in changes.items()}, TENSORS, "x.gguf")


def stretched(**said):
    return rope.stretch(Metadata(said, "config.json"), 100.0, 8, 64)


def test_yarn_is_that_of_transformers():
    found = stretched(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    frequency = 100.0 ** (-np.arange(0, 8, 2) / 8) / found.factors
    np.testing.assert_allclose(
        frequency, [1.0, 0.07905694097280502, 0.02500000037252903, 0.007905694656074047], rtol=1e-6
    )
    assert found.scale == pytest.approx(1.138629436111989)
    assert stretched(rope_type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=1.0).scale == 1
    assert stretched(rope_type="yarn", factor=4.0, attention_factor=3.0).scale == 3


def test_longrope_is_that_of_transformers():
    said = {"rope_type": "longrope", "short_factor": [1, 1.5, 2, 2.5], "long_factor": [2, 3, 4, 5]}
    found = stretched(**said, original_max_position_embeddings=16)
    assert (found.factors, found.long_factors, found.short_context) == ((1, 1.5, 2, 2.5), (2, 3, 4, 5), 16)
    assert found.scale == pytest.approx(1.224744871391589)
    turns = Rope(100.0, found.factors, found.long_factors, found.short_context)
    assert turns.at(16) == Rope(100.0, found.factors) and turns.at(17) == Rope(100.0, found.long_factors)
    with pytest.raises(BadInput, match="short_factor has 1 finite numbers.*, not 4"):
        stretched(**{**said, "short_factor": [1]})


@pytest.mark.parametrize(
    "said, words",
    [
        ({"factor": 2.0}, "factor stands without a rope_type"),
        ({"type": "linear"}, "lacks (rope_scaling.)?factor"),
        ({"type": "linear", "factor": None}, "lacks (rope_scaling.)?factor"),
        ({"type": "linear", "factor": "4"}, "factor must be a finite number above 0, not '4'"),
        ({"type": "linear", "factor": float("nan")}, "factor must be a finite number"),
        ({"rope_type": "llama3", "factor": 8.0}, "lacks (rope_scaling.)?low_freq_factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "high_freq_factor must be"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is dynamic"),
        ({"rope_type": 3}, "rope_type must be a text"),
        ({"rope_type": "longrope"}, "lacks (rope_scaling.)?short_factor"),
    ],
)  # fmt: skip
def test_a_wrong_stretch_is_one_line(said, words):
    with pytest.raises(BadInput, match=words):
        stretched(**said)
    with pytest.raises(BadInput, match=words):
        shapes.from_hub(LLAMA | {"rope_scaling": said}, "m")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_attention_heads": 0}, "m/config.json: num_attention_heads must be a whole number from 1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"rope_theta": "1e4"}, "rope_theta must be a finite number"),
        ({"rms_norm_eps": []}, "rms_norm_eps must be"),
        ({"rope_scaling": [1]}, "rope_scaling must be a table"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which is not implemented"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"layer_types": ["linear_attention"] * 2}, "linear_attention"),
        ({"model_type": ["llama"]}, "architecture .*llama"),
    ],
)
def test_a_wrong_config_is_one_line(changes, words):
    with pytest.raises(BadInput, match=words):
        shapes.from_hub(LLAMA | changes, "m")


def test_windows_by_layer():
    qwen = tiny_models.CONFIGS["qwen2"] | {"num_hidden_layers": 4, "sliding_window": 8}
    windows = lambda **more: [each.window for each in shapes.from_hub(qwen | more, "m").layer_heads]
    assert windows() == [0] * 4
    assert windows(use_sliding_window=True, max_window_layers=3) == [0, 0, 0, 8]
    types = ["sliding_attention", "full_attention"] * 2
    assert windows(use_sliding_window=True, layer_types=types) == [8, 0, 8, 0]
    mistral = tiny_models.CONFIGS["mistral"]
    assert shapes.from_hub(mistral | {"sliding_window": None}, "m").window == 0


def test_gguf_arrays_and_old_keys():
    plain = of_gguf()
    alike = {"attention.head_count_kv": [2, 2], "feed_forward_length": [48, 48], "attention.head_count": [4, 4]}
    assert of_gguf(**alike) == plain
    for key in alike:
        with pytest.raises(BadInput, match=f"x.gguf: llama.{key} is .*layers that differ"):
            of_gguf(**{key: [4, 2]})
    assert of_gguf(**{"rope.scaling.factor": 4.0}).rope_factors == (4.0,) * 4
    assert of_gguf(**{"rope.scale_linear": 4.0}).rope_factors == (4.0,) * 4
    assert of_gguf(**{"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}).rope_factors == ()
    yarn = of_gguf(
        **{"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    )
    assert yarn.rope_scale == pytest.approx(0.1 * math.log(4) + 1)
    with pytest.raises(BadInput, match="lacks rope_factors_long.weight"):
        of_gguf(**{"rope.scaling.type": "longrope"})
    with pytest.raises(BadInput, match="rope_type is ntk"):
        of_gguf(**{"rope.scaling.type": "ntk"})
    with pytest.raises(BadInput, match="llama.block_count must be a whole number"):
        of_gguf(block_count="2")


def test_unknown_keys_are_named_in_one_line(caplog):
    with caplog.at_level(logging.WARNING, "kvcascade"):
        shapes.from_hub(LLAMA, "m")
        of_gguf()
        assert not caplog.records
        shapes.from_hub(LLAMA | {"logit_scale": 0.5, "rope_scaling": {"rope_type": "default", "spread": 1}}, "m")
        of_gguf(residual_scale=2.0)
    assert [record.getMessage() for record in caplog.records] == [
        "m/config.json: passed over, as not known: rope_scaling.spread",
        "m/config.json: passed over, as not known: logit_scale",
        "x.gguf: passed over, as not known: llama.residual_scale",
    ]


@pytest.mark.parametrize("kind", KEYS)
def test_every_key_of_transformers_is_read_or_known_to_be_irrelevant(kind, caplog):
    name = "gemma3" if kind == "gemma3_text" else kind
    said = tiny_models.CONFIGS[name]
    with caplog.at_level(logging.WARNING, "kvcascade"):
        shapes.from_hub({key: None for key in KEYS[kind]} | said | {"transformers_version": "5"}, "m")
        extra = {key: "x" for key in KEYS[kind] if key in shapes.IRRELEVANT and key not in ("vocab_size", "model_type")}
        shapes.from_hub(said | extra, "m")
    assert not caplog.records
    metadata = Metadata({key: 1 for key in KEYS[kind]}, "m")
    read = Metadata(said | {"model_type": kind}, "m")
    if kind == "gpt2":
        shapes._gpt2(read)
    else:
        (shapes._gemma if "gemma" in kind else shapes._llama)(kind, read)
    assert {*metadata} <= read.asked | shapes.IRRELEVANT


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**70)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([10**400, -1, 0]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "type", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.data())
def test_whatever_a_file_says_is_a_shape_or_one_line(data):
    if from_hub := data.draw(st.booleans()):
        said = dict(tiny_models.CONFIGS[data.draw(st.sampled_from([*tiny_models.CONFIGS]))])
        keys = [*said, "rope_scaling", "rope_parameters", "layer_types", "sliding_window"]
    else:
        said, keys = dict(FIELDS), [*FIELDS, "llama.rope.scaling.type", "llama.rope.scaling.factor"]
    said |= data.draw(st.dictionaries(st.sampled_from(keys), ANYTHING, min_size=1, max_size=2))
    try:
        shapes.from_hub(said, "m") if from_hub else shapes.from_gguf(said, TENSORS, "m")
    except BadInput as error:
        assert len(str(error)) < 600
