"""The shapes of well-known models: their published numbers of parameters follow from them, to the last one."""

import dataclasses
import math

import jax
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.model import gpt
from kvcascade.model.known import KNOWN, stretch

PARAMETERS = {
    "gpt2": 124_439_808,
    "smollm2-135m": 134_515_008,
    "llama2-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma2-2b": 2_614_341_888,
    "gemma3-1b": 999_885_952,
}


@pytest.mark.parametrize("name", KNOWN)
def test_has_the_published_number_of_parameters(name):
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(gpt.graph(KNOWN[name])[1])) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "wide", "narrow", "window", "slot"),
    [("gemma2-2b", 13, 13, 4096, 4 * (2 * 256 * 2 + 4)), ("gemma3-1b", 4, 22, 512, 2 * 256 * 2 + 4)],
)
def test_layers_that_see_a_window_take_no_more(name, wide, narrow, window, slot):
    """Bytes of a bf16 cache by hand: K · (K and V of 256 numbers in two bytes, a position of four) for each slot of each layer."""
    config = KNOWN[name]
    for context in (100, window, 8192):
        bytes_of = parse("full").nbytes(config.layer_heads, context)
        assert bytes_of == slot * (wide * context + narrow * min(window, context))


def test_stretches_what_rope_can_and_refuses_learned_positions():
    assert stretch(KNOWN["llama3-8b"], 32768) == dataclasses.replace(KNOWN["llama3-8b"], context=32768)
    assert stretch(KNOWN["llama3-8b"], 10) == KNOWN["llama3-8b"]
    with pytest.raises(BadInput, match="1024 learned positions"):
        stretch(KNOWN["gpt2"], 1025)
