"""Sampling keeps what it promises; chats are written as templates say; answers end where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.model import chat, generate, pretrained
from kvcascade.model.generate import Sampling
from kvcascade.scripts.console import Answer

LOGITS = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.07, 0.03]]))
NONE = jnp.zeros((1, 0), bool)


def drawn(sampling: Sampling, logits=LOGITS, seen=NONE, draws: int = 400) -> np.ndarray:
    """How often each token comes."""
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = jax.vmap(lambda key: generate.sample(logits, key, sampling, seen))(keys)
    return np.bincount(np.asarray(tokens).ravel(), minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(), [1, 0, 0, 0, 0]),
        (Sampling(1.0), [0.4, 0.3, 0.2, 0.07, 0.03]),
        (Sampling(0.5), [0.16, 0.09, 0.04, 0.0049, 0.0009]),
        (Sampling(1.0, top_k=2), [0.4, 0.3, 0, 0, 0]),
        (Sampling(1.0, top_k=99), [0.4, 0.3, 0.2, 0.07, 0.03]),
        (Sampling(1.0, top_p=0.7), [0.4, 0.3, 0, 0, 0]),
        (Sampling(1.0, top_p=0.71), [0.4, 0.3, 0.2, 0, 0]),
        (Sampling(1.0, top_p=1e-6), [1, 0, 0, 0, 0]),
        (Sampling(1.0, min_p=0.45), [0.4, 0.3, 0.2, 0, 0]),
        (Sampling(1.0, top_k=3, min_p=0.6), [0.4, 0.3, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling, shares: list[float]) -> None:
    """Shares within five standard deviations, and nothing from outside the limits."""
    want = np.asarray(shares) / sum(shares)
    got = drawn(sampling)
    np.testing.assert_array_less(np.abs(got - want), 5 * np.sqrt(want * (1 - want) / 400) + 1e-9)
    assert (got[want == 0] == 0).all()


def test_what_was_there_is_penalised() -> None:
    """Positive logits of seen tokens are divided, negative ones multiplied."""
    logits, seen = jnp.asarray([[2.0, 1.9, -1.0, -1.1]]), jnp.asarray([[True, False, False, False]])
    assert drawn(Sampling(repetition_penalty=1.2), logits, seen)[1] == 1
    assert drawn(Sampling(repetition_penalty=1.01), logits, seen)[0] == 1
    negative, seen = jnp.asarray([[-1.0, -1.1]]), jnp.asarray([[True, False]])
    assert drawn(Sampling(repetition_penalty=1.2), negative, seen)[1] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"temperature": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(BadInput):
        Sampling(**wrong)


def test_a_penalty_keeps_a_text_from_repeating(nano) -> None:
    """With a huge penalty no token of the prompt or the text comes again, in rows of unequal prompts."""
    prompts = [[3, 1, 4], [9]]
    cache = generate.empty_cache(nano.config, parse("full"), 2, 16)
    steps = generate.generate(nano.config, nano.params, cache, prompts, 10, Sampling(repetition_penalty=1e6))
    for prompt, more in zip(prompts, np.concatenate([tokens_nB for tokens_nB, _ in steps]).T.tolist(), strict=True):
        assert len({*prompt, *more}) == len(prompt) + 10


def test_few_prompt_lengths_are_compiled(nano) -> None:
    """Prompts of 5 to 8 tokens share one prefill."""
    lengths = range(5, 9)
    before = generate.prefill._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    for length in lengths:
        cache = generate.empty_cache(nano.config, parse("sink 1 | recent 8"), 1, 32)
        tokens, positions = generate.pad([list(range(length))])
        generate.prefill(nano.config, nano.params, cache, jnp.asarray(tokens), jnp.asarray(positions))
    after = generate.prefill._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    assert after == before + 1


TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_chat_is_written_as_the_template_says(tmp_path) -> None:
    messages = [{"role": "user", "content": " hi "}]
    assert chat.render(TEMPLATE, messages) == "<|user|>hi<|end|>\n<|assistant|>"
    folder = tiny_models.write("llama", tmp_path / "m")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": 256}')
    model = pretrained.load(str(folder))
    assert model.end == {256}
    assert chat.encode(model, messages).count(256) == 1
    with pytest.raises(BadInput, match="no chat template"):
        chat.encode(pretrained.load(str(tiny_models.write("llama", tmp_path / "plain"))), messages)


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ raise_exception('no system') }}", "{{ messages.__class__.__mro__ }}", "{{ x.y.z }}"]
)
def test_a_template_that_is_broken_or_reaches_out_is_refused(template: str) -> None:
    with pytest.raises(BadInput, match="chat template"):
        chat.render(template, [])


def test_an_answer_ends_at_a_stop_text_or_an_end_token() -> None:
    """Text comes as soon as its characters are whole; after the end nothing is added."""
    pieces = {0: b"a", 1: "é".encode()[:1], 2: "é".encode()[1:], 3: b"st", 4: b"op", 9: b"<|end|>"}
    one = Answer(pieces.__getitem__, frozenset({9}), ("stop",))
    assert [one.add(token) for token in (0, 1, 2, 3, 4, 0)] == ["a", "", "é", "st", "op", ""]
    assert one.done and one.text == "aéstop" and one.count == 5
    two = Answer(pieces.__getitem__, frozenset({9}), ())
    assert [two.add(token) for token in (0, 9, 0)] == ["a", "", ""] and two.done
