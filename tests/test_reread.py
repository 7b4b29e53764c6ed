"""A prompt that is read a second time: what its tokens are given then, and where that cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache import prompt as prompts
from kvcascade.cache.errors import BadInput
from kvcascade.cache.prompt import Prompt
from kvcascade.cache.scores import Repeated
from kvcascade.cache.spec import parse
from kvcascade.eval.quality import perplexity
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=256, context=256)
PARAMS = jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, gpt.init(CONFIG, 0))
TEXT = np.random.default_rng(0).integers(0, 256, (2, 40), np.int32)
LENGTHS = [40, 23]
POSITIONS = np.where(np.arange(40) < np.array(LENGTHS)[:, None], np.arange(40), -1).astype(np.int32)


def read(tokens: list[int]) -> list[tuple[np.ndarray, ...]]:
    """Each layer's queries and keys of plain causal attention over these tokens."""
    row = jnp.asarray(tokens)[None]
    _, found = gpt.first_step(CONFIG, PARAMS, Prompt(CONFIG.layer_heads, 256), row, jnp.arange(len(tokens))[None])
    return [tuple(np.asarray(x)[0] for x in part[:2]) for part in found.parts]


def wanted(tokens: list[int], part: int) -> np.ndarray:
    """Query by query, [layers, K, T]: the part comes after the prompt, with the last tokens of the part before in front of it."""
    T, found = len(tokens), np.zeros((CONFIG.layers, 2, len(tokens)))
    for start in range(0, T, part):
        stop, lead = min(start + part, T), min(start, gpt.LEAD)
        again = tokens[start - lead : stop]
        for layer, (q, k) in enumerate(read(tokens + again)):
            for i in range(T, T + len(again)):
                keys = [*({*range(start, stop)} | {*range(min(4, T))}), *range(T, i + 1)]
                for head in range(4):
                    logits = k[keys, head // 2] @ q[i, head] / CONFIG.head_dim**0.5
                    share = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
                    for key, x in zip(keys, share, strict=True):
                        if start <= key < stop:
                            found[layer, head // 2, key] = max(found[layer, head // 2, key], x)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", [64, 16])
def test_the_largest_share_that_a_second_reading_gives(part: int, monkeypatch) -> None:
    """Rows of unequal lengths, each part by itself, in blocks of queries; the cache keeps what has the largest shares."""
    monkeypatch.setattr(gpt, "PART", part)
    monkeypatch.setattr(prompts, "QUERIES", 7)
    spec = parse("sink 2 | kvzip 9 then recent 8")
    cache = generate.empty_cache(CONFIG, spec, 2, 64)
    first = jax.jit(lambda *arguments: gpt.first_step(CONFIG, *arguments))  # a program of this test's own
    whole = Prompt(CONFIG.layer_heads, 64, (Repeated(),))
    tokens, positions = jnp.asarray(TEXT), jnp.asarray(POSITIONS)
    logits, found = first(PARAMS, whole, tokens, positions)
    same, cache = first(PARAMS, cache, tokens, positions)
    np.testing.assert_allclose(same, logits, atol=1e-5)
    for row, length in enumerate(LENGTHS):
        want = wanted(TEXT[row, :length].tolist(), part)
        for layer in range(CONFIG.layers):
            numbers = np.asarray(found.numbers[layer][0])[row]
            np.testing.assert_allclose(numbers[:, :length], want[layer], rtol=1e-3, atol=1e-5)
            assert not numbers[:, length:].any()
            # The front tier is empty, the sinks hold 0 and 1; of the others the newest stays whatever it is given.
            front, sinks, zipped = (np.asarray(slots.pos_BKS[row]) for slots in cache.layers[layer].slots)
            assert (front < 0).all() and (np.sort(sinks) == [0, 1]).all()
            for head in range(2):
                ranked = sorted(range(2, length - 1), key=lambda pos, head=head: -want[layer, head, pos])
                assert {*zipped[head].tolist()} == {*ranked[:8], length - 1}


@pytest.mark.slow
def test_a_cache_from_the_whole_prompt_is_the_one_from_the_prompt_that_several_share() -> None:
    spec = parse("kvzip 9 | heavy 4@int8 then recent 8")
    tokens, positions = jnp.asarray(TEXT), jnp.asarray(POSITIONS)
    alone = generate.prefill(CONFIG, PARAMS, generate.empty_cache(CONFIG, spec, 2, 64), tokens, positions)[1]
    _, whole = generate.prefill_step(CONFIG, PARAMS, Prompt(CONFIG.layer_heads, 64, spec.rereads), tokens, positions)
    shared = whole.enter(generate.empty_cache(CONFIG, spec, 2, 64), positions)
    for one, other in zip(alone.layers, shared.layers, strict=True):
        for a, b in zip(one.slots, other.slots, strict=True):
            np.testing.assert_array_equal(np.sort(a.pos_BKS), np.sort(b.pos_BKS))


def test_a_prompt_that_cannot_be_read_twice_is_told_in_one_line() -> None:
    """Without a prompt, in parts, in a later turn, or beyond the model's context; and what was not read twice is not put into such a cache."""
    spec = parse("kvzip 9 then recent 8")
    empty = lambda: generate.empty_cache(CONFIG, spec, 2, 256)
    tokens, positions = jnp.asarray(TEXT), jnp.asarray(POSITIONS)
    with pytest.raises(BadInput, match="reads a prompt twice: give it one"):
        perplexity.check(CONFIG, [spec], 64, 0)
    with pytest.raises(BadInput, match="takes it at once, not in parts or turns"):
        generate.prefill(CONFIG, PARAMS, empty(), tokens, positions, 16)
    with pytest.raises(BadInput, match="goes up to position 268, and the model's context is 256"):
        perplexity.check(CONFIG, [spec], 200, 130)
    with pytest.raises(BadInput, match="goes up to position 268"):
        generate.begin(CONFIG, PARAMS, empty(), [[1] * 130, [2]])
    with pytest.raises(ValueError, match="read twice"):
        Prompt(
            CONFIG.layer_heads, 256, parts=((jnp.zeros((2, 3, 4, 8)), *(jnp.zeros((2, 3, 2, 8)),) * 2, None),) * 2
        ).enter(empty(), jnp.arange(3)[None].repeat(2, 0))
