"""Retrieval: samples are what they say, and scoring agrees with decoding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import stats
from kvcascade.eval.quality import puzzles, retrieval
from kvcascade.eval.records import Retrieval
from kvcascade.model import generate, gpt, tokenizer
from kvcascade.model.config import ModelConfig

ENCODING = tokenizer.bytes_encoding()


@pytest.mark.parametrize("task", puzzles.TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_sample_is_whole_and_comes_again(task, depth):
    """Contexts have exactly the length; what is asked for is in them (arithmetic: its parts); the same seed gives the same sample."""
    one = puzzles.sample(task, ENCODING, 700, depth, 3)
    assert one == puzzles.sample(task, ENCODING, 700, depth, 3) != puzzles.sample(task, ENCODING, 700, depth, 4)
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


def test_no_two_puzzles_are_alike():
    """Over tasks, lengths, depths, seeds and numbers; what is asked for differs as well, where there is much to choose from."""
    made = [
        puzzles.sample(task, ENCODING, length, depth, seed, number)
        for task in puzzles.TASKS
        for length in (600, 700)
        for depth in (0.0, 0.5)
        for seed in (0, 1)
        for number in range(3)
    ]
    assert len({each.name for each in made}) == len(made) == len({tuple(each.context) for each in made})
    assert len({each.answers for each in made if each.name.startswith("passkey")}) == 24


def test_tasks_weigh_alike_and_one_at_chance_is_left_out():
    """The mean is over tasks, whatever the number of turns; what the full cache guesses is named and not in it; bytes are of one length."""

    def record(cache, task, right, answers, length=100):
        told: Any = [
            {"name": f"{i}", "answers": [answer], "said": [""], "right": [r]}
            for i, (answer, r) in enumerate(zip(answers, right, strict=True))
        ]
        return Retrieval(
            model="m", cache=cache, task=task, length=length, depth=0.5, samples=len(right), turns=len(right), answered=sum(right),
            puzzles=told, kv_bytes=length, compression=0.5, seed=0,
        )  # fmt: skip

    many = [str(i) for i in range(40)]
    found = [
        record("full", "a", [True] * 40, many), record("full", "b", [True] * 20 + [False] * 20, ["1"] * 25 + many[:15]),
        record("recent 4", "a", [True] * 20 + [False] * 20, many), record("recent 4", "b", [True] * 40, ["1"] * 25 + many[:15]),
        record("full", "a", [True] * 40, many, 200), record("recent 4", "a", [False] * 40, many, 200),
    ]  # fmt: skip
    assert retrieval.chance(found[1:2]) == 26 / 40 and retrieval.measurable(found, 100) == ["a"]
    mean = retrieval.average(found, "recent 4", 100)
    assert mean is not None and mean.share == 0.5 and 0.3 < mean.low < 0.4 and 0.6 < mean.high < 0.7
    _, columns, rows = retrieval.table(found)
    assert {len(row) for row in rows} == {len(columns)} and [row[:2] for row in rows[:2]] == [
        ["chance", "100"],
        ["full", "100"],
    ]
    assert retrieval.protocol(found).endswith("no better than the best constant answer: b (65%)")
    assert "not measurable" in rows[0][5] and rows[0][4] == "2%" and rows[3][5] == ""
    assert np.isnan(retrieval.at(found, "recent 4", 200, 0.25))
    one, two = retrieval.Share(0.5, 0.4, 0.6), retrieval.Share(1.0, 0.9, 1.0)
    assert retrieval.macro([one, two]).low == pytest.approx(0.75 - np.hypot(0.1, 0.1) / 2)


def test_arithmetic_adds_up():
    for seed in range(20):
        one = puzzles.sample("arithmetic", ENCODING, 400, 0.3, seed)
        text = ENCODING.decode(one.context)
        tom, ann, bob = (int(ENCODING.decode(answer)) for _, answer in one.turns)
        assert (
            f"Tom has {tom} apples" in text
            and f"Ann has {ann - tom} more" in text
            and f"Bob has {bob - ann} more" in text
        )


def test_what_cannot_be_made_is_refused():
    with pytest.raises(BadInput, match="no task 'x'"):
        puzzles.sample("x", ENCODING, 100, 0.0, 0)
    with pytest.raises(BadInput, match="too few"):
        puzzles.sample("multikey", ENCODING, 100, 0.0, 0)
    with pytest.raises(BadInput, match="depth"):
        puzzles.sample("single", ENCODING, 100, 1.5, 0)


CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=256, context=256)
PARAMS = jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, gpt.init(CONFIG, 0))


@pytest.mark.slow
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
        samples.append(puzzles.Sample(context, turns))
        wanted.append(told)
    others = [parse(cache), parse("random 8"), parse("full@int4")]
    scored = retrieval.score(CONFIG, PARAMS, others, samples, retrieval.asked(samples), batch=2)
    assert [[turn.right for turn in turns] for turns in scored[0][0]] == wanted
    assert [size for _, size in scored] == [each.nbytes(CONFIG.layer_heads, 64 + 2 * (7 + 3)) for each in others]
    alone = [retrieval.score(CONFIG, PARAMS, [each], samples, 20, 2)[0] for each in others]
    assert scored == alone and len({str(found) for found, _ in scored}) > 1, "what the others hold changes something"


def test_wilson_is_between_0_and_1_and_around_the_share():
    for hits, of, low, high in ((0, 10, 0, 0.278), (10, 10, 0.722, 1), (5, 10, 0.237, 0.763)):
        assert stats.wilson(hits, of) == pytest.approx((low, high), abs=1e-3)


def test_logits_that_are_not_numbers_are_refused():
    """They answer nothing, and are no wrong answer."""
    broken = PARAMS | {"norm": {"scale": PARAMS["norm"]["scale"].at[0].set(jnp.nan)}}
    one = puzzles.Sample(list(range(8)), [([1, 2], [3])])
    with pytest.raises(BadInput, match="for position 9 of row 0 are not numbers"):
        retrieval.score(CONFIG, broken, [parse("full")], [one], 3, 1)
