"""A prompt that is read a second time: what its tokens are given then, and where that cannot be."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvcascade.cache import prompt as prompts
from kvcascade.cache.errors import BadInput
from kvcascade.cache.groups import Vectors
from kvcascade.cache.prompt import Prompt
from kvcascade.cache.scores import Repeated, Sensitivity
from kvcascade.cache.spec import parse
from kvcascade.eval.quality import perplexity
from kvcascade.kernels.rotation import rotation
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=256, context=256)
PARAMS = jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, gpt.init(CONFIG, 0))
TEXT = np.random.default_rng(0).integers(0, 256, (2, 40), np.int32)
LENGTHS = [40, 23]
POSITIONS = np.where(np.arange(40) < np.array(LENGTHS)[:, None], np.arange(40), -1).astype(np.int32)


def read(tokens: list[int]) -> list[tuple[np.ndarray, ...]]:
    """Each layer's queries, keys and values of plain causal attention over these tokens."""
    row = jnp.asarray(tokens)[None]
    _, found = gpt.first_step(CONFIG, PARAMS, Prompt(CONFIG.layer_heads, 256), row, jnp.arange(len(tokens))[None])
    return [tuple(np.asarray(x)[0] for x in part[:3]) for part in found.parts]


class Share(NamedTuple):
    """What a query head of a part that comes again gives a token of the prompt, and the token's value."""

    layer: int
    head: int
    query: int
    key: int
    share: float
    value: np.ndarray


def shares(tokens: list[int], part: int) -> Iterator[tuple[list[int], list[Share]]]:
    """Query by query: each part comes after the prompt, with the last tokens of the part before in front of it."""
    T = len(tokens)
    for start in range(0, T, part):
        stop, lead = min(start + part, T), min(start, gpt.LEAD)
        again, found = tokens[start - lead : stop], []
        for layer, (q, k, v) in enumerate(read(tokens + again)):
            for i in range(T, T + len(again)):
                keys = [*({*range(start, stop)} | {*range(min(4, T))}), *range(T, i + 1)]
                for head in range(4):
                    logits = k[keys, head // 2] @ q[i, head] / CONFIG.head_dim**0.5
                    share = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
                    pairs = zip(keys, share.tolist(), strict=True)
                    found += [
                        Share(layer, head, i, key, x, v[key, head // 2]) for key, x in pairs if start <= key < stop
                    ]
        yield again, found


def wanted(tokens: list[int], part: int) -> np.ndarray:
    """The largest share of each token, [layers, K, T]."""
    found = np.zeros((CONFIG.layers, 2, len(tokens)))
    for _, some in shares(tokens, part):
        for each in some:
            at = each.layer, each.head // 2, each.key
            found[at] = max(found[at], each.share)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", [64, 16])
def test_the_largest_share_that_a_second_reading_gives(part: int, monkeypatch) -> None:
    """Rows of unequal lengths, each part by itself, in blocks of queries; the cache keeps what has the largest shares."""
    monkeypatch.setattr(Repeated, "part", part)
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


def felt(tokens: list[int], part: int) -> np.ndarray:
    """`wanted` with each share times what the value writes and how the last residual stream depends on what the query's attention wrote:
    a plain forward pass with the replayed tokens behind the prompt, differentiated by what is added after each layer's attention."""
    T, found = len(tokens), np.zeros((CONFIG.layers, 2, len(tokens)))
    model = nnx.merge(gpt.graph(CONFIG)[0], PARAMS)
    norms = lambda x: np.linalg.norm(np.asarray(x, np.float64), axis=-1)
    outputs = [np.asarray(layer.attention.o.rows()).reshape(CONFIG.width, 4, -1) for layer in model.layers]

    def stream(added, row):
        x, rope = model.embed(row[None]), CONFIG.layer_heads[0].rope
        by = rope and rotation(jnp.arange(len(row))[None], CONFIG.layer_heads[0].width, rope.at(256))
        for block, more in zip(model.layers, added, strict=True):
            x = x + block.attention(block.attention_norm(x), jnp.arange(len(row))[None], by, None)[0] + more
            x = x + block.mlp(block.mlp_norm(x), None)
        return x[0]

    for again, some in shares(tokens, part):
        row = jnp.asarray(tokens + again)
        squares = lambda added, row=row: (stream(added, row)[T:] ** 2).sum()
        slopes = norms(jax.grad(squares)([jnp.zeros((1, len(row), CONFIG.width))] * CONFIG.layers))
        for each in some:
            at = each.layer, each.head // 2, each.key
            written = norms(outputs[each.layer][:, each.head] @ each.value)
            found[at] = max(found[at], each.share * slopes[each.layer][0, each.query] * written)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", [64, 16])
def test_what_the_last_hidden_states_depend_on(part: int, monkeypatch) -> None:
    """Rows of unequal lengths beside shares of another part's size; and where nothing depends on attention nothing is felt."""
    monkeypatch.setattr(Sensitivity, "part", part)
    monkeypatch.setattr(prompts, "QUERIES", 7)
    first = jax.jit(lambda *arguments: gpt.first_step(CONFIG, *arguments))
    whole = Prompt(CONFIG.layer_heads, 64, (Repeated(), Sensitivity()))
    _, found = first(PARAMS, whole, jnp.asarray(TEXT), jnp.asarray(POSITIONS))
    for row, length in enumerate(LENGTHS):
        tokens = TEXT[row, :length].tolist()
        want = felt(tokens, part), wanted(tokens, 2048)
        for layer in range(CONFIG.layers):
            shares, numbers = (np.asarray(each)[row] for each in found.numbers[layer])
            np.testing.assert_allclose(numbers[:, :length], want[0][layer], rtol=2e-3, atol=1e-5)
            np.testing.assert_allclose(shares[:, :length], want[1][layer], rtol=1e-3, atol=1e-5)
            assert not numbers[:, length:].any()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_weights_of_few_bits_have_gradients_too(weights: str) -> None:
    config = dataclasses.replace(CONFIG, weights=weights)
    params = gpt.init(config, 0)
    cache = generate.empty_cache(config, parse("kvgrad 9 then recent 8"), 2, 64)
    _, cache = generate.prefill(config, params, cache, jnp.asarray(TEXT), jnp.asarray(POSITIONS))
    assert all(np.isfinite(each).all() for layer in cache.layers for slots in layer.slots for each in slots.numbers)
    assert all((layer.slots[1].numbers[0] > 0).any() for layer in cache.layers)


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
            CONFIG.layer_heads,
            256,
            parts=(Vectors(jnp.zeros((2, 3, 4, 8)), jnp.zeros((2, 3, 2, 8)), jnp.zeros((2, 3, 2, 8)), None),) * 2,
        ).enter(empty(), jnp.arange(3)[None].repeat(2, 0))
