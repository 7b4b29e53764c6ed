"""Retrieval: samples are what they say, and scoring agrees with decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import stats
from kvcascade.eval.quality import retrieval
from kvcascade.model import generate, gpt, tokenizer
from kvcascade.model.config import ModelConfig

ENCODING = tokenizer.bytes_encoding()


@pytest.mark.parametrize("task", retrieval.TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_sample_is_whole_and_comes_again(task, depth):
    """Contexts have exactly the length; what is asked for is in them (arithmetic: its parts); the same seed gives the same sample."""
    one = retrieval.sample(task, ENCODING, 700, depth, 3)
    assert one == retrieval.sample(task, ENCODING, 700, depth, 3) != retrieval.sample(task, ENCODING, 700, depth, 4)
    text = ENCODING.decode(one.context)
    assert len(one.context) == 700
    for _, answer in one.turns:
        words = ENCODING.decode(answer).replace(",", "").split()
        if task == "arithmetic":
            continue
        assert all(word in text for word in words)
    if task in ("passkey", "single"):
        where = text.index(ENCODING.decode(one.turns[0][1]).strip()) / 700
        assert abs(where - depth) < 0.15


def test_arithmetic_adds_up():
    for seed in range(20):
        one = retrieval.sample("arithmetic", ENCODING, 400, 0.3, seed)
        text = ENCODING.decode(one.context)
        tom, ann, bob = (int(ENCODING.decode(answer)) for _, answer in one.turns)
        assert (
            f"Tom has {tom} apples" in text
            and f"Ann has {ann - tom} more" in text
            and f"Bob has {bob - ann} more" in text
        )


def test_what_cannot_be_made_is_refused():
    with pytest.raises(BadInput, match="no task 'x'"):
        retrieval.sample("x", ENCODING, 100, 0.0, 0)
    with pytest.raises(BadInput, match="too few"):
        retrieval.sample("multikey", ENCODING, 100, 0.0, 0)
    with pytest.raises(BadInput, match="depth"):
        retrieval.sample("single", ENCODING, 100, 1.5, 0)


CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=256, context=256)
PARAMS = jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, gpt.init(CONFIG, 0))


@pytest.mark.parametrize("cache", ["full", "sink 2 | recent 30", "recent 16 | heavy 16"])
def test_an_answer_counts_if_greedy_decoding_gives_it(cache):
    """The answer that greedy decoding gives after the question counts; with its last token changed it does not. Rows do not mix."""
    rng, samples, wanted = np.random.default_rng(0), [], []
    for index in range(3):
        context, turns, told = rng.integers(0, 256, 64).tolist(), [], []
        kv = generate.empty_cache(CONFIG, parse(cache), 1, 112)
        _, kv = generate.prefill(CONFIG, PARAMS, kv, jnp.asarray([context]), jnp.arange(64)[None])
        at = 64
        for turn in range(2):
            question, answer = rng.integers(0, 256, 5 + index).tolist(), []
            logits = None
            for token in question:
                logits, kv = generate.decode_step(CONFIG, PARAMS, kv, jnp.asarray([token]), jnp.asarray([at]))
                at += 1
            for last in (False, False, True):
                assert logits is not None
                likeliest = int(logits[0].argmax())
                wrong = last and (index + turn) % 2
                answer.append((likeliest + bool(wrong)) % 256)
                logits, kv = generate.decode_step(CONFIG, PARAMS, kv, jnp.asarray([answer[-1]]), jnp.asarray([at]))
                at += 1
            turns.append((question, answer))
            told.append((index + turn) % 2 == 0)
        samples.append(retrieval.Sample(context, turns))
        wanted.append(told)
    found, size = retrieval.score(CONFIG, PARAMS, parse(cache), samples, retrieval.asked(samples), batch=2)
    assert found == wanted
    assert size == parse(cache).nbytes(CONFIG.layer_heads, 64 + 2 * (7 + 3))


def test_wilson_is_between_0_and_1_and_around_the_share():
    for hits, of, low, high in ((0, 10, 0, 0.278), (10, 10, 0.722, 1), (5, 10, 0.237, 0.763)):
        assert stats.wilson(hits, of) == pytest.approx((low, high), abs=1e-3)


def test_logits_that_are_not_numbers_are_refused():
    """They answer nothing, and are no wrong answer."""
    broken = PARAMS | {"norm": {"scale": PARAMS["norm"]["scale"].at[0].set(jnp.nan)}}
    one = retrieval.Sample(list(range(8)), [([1, 2], [3])])
    with pytest.raises(BadInput, match="for position 9 of row 0 are not numbers"):
        retrieval.score(CONFIG, broken, parse("full"), [one], 3, 1)
