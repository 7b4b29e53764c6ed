"""Prompts are continued; chats are written as templates say; answers end where they should."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.model import chat, generate, pretrained
from kvcascade.model.answer import Answer
from kvcascade.model.sampling import Sampling


def test_a_penalty_keeps_a_text_from_repeating(nano) -> None:
    """With a huge penalty no token of the prompt or the text comes again, in rows of unequal prompts."""
    prompts = [[3, 1, 4], [9]]
    cache = generate.empty_cache(nano.config, parse("full"), 2, 16)
    steps = generate.generate(nano.config, nano.params, cache, prompts, 10, Sampling(repetition_penalty=1e6))
    for prompt, more in zip(prompts, np.concatenate([tokens_nB for tokens_nB, _ in steps]).T.tolist(), strict=True):
        assert len({*prompt, *more}) == len(prompt) + 10


@pytest.mark.parametrize(
    ("spec", "slots", "line"),
    [("full", 11, "12 tokens do not fit into a cache for a context of 11"), ("recent 4", 12, None), ("full", 12, None)],
)
def test_a_text_longer_than_the_cache_is_refused(nano, spec: str, slots: int, line: str | None) -> None:
    """A full tier would drop its first token; a tier that forgets has no end but the model's."""
    go_on = lambda count: next(
        generate.generate(
            nano.config, nano.params, generate.empty_cache(nano.config, parse(spec), 2, slots), [[3, 1, 4], [9]], count
        )
    )
    with pytest.raises(BadInput, match=line) if line else contextlib.nullcontext():
        go_on(10)
    with pytest.raises(BadInput, match="33 tokens is longer than the model's 32"):
        go_on(31)
    with pytest.raises(BadInput, match="3 tokens do not fit into a cache for a context of 2"):
        cache = generate.empty_cache(nano.config, parse("full"), 1, 2)
        generate.begin(nano.config, nano.params, cache, [[3, 1, 4]])


@pytest.mark.parametrize(("count", "most", "made"), [(0, 1, 0), (1, 1, 1), (3, 1, 1), (0, 2, 0), (5, 2, 2)])
def test_as_many_steps_as_counted_and_at_most_so_many(nano, count: int, most: int, made: int) -> None:
    """The positions of the newest tokens and what the cache holds both say how many there were."""
    cache = generate.empty_cache(nano.config, parse("full"), 2, 16)
    state = generate.begin(nano.config, nano.params, cache, [[3, 1, 4], [9]])
    token_B = np.asarray(state.token_B)
    tokens_nB, state = generate.decode_steps(nano.config, nano.params, state, count, most=most)
    assert tokens_nB.shape == (most, 2) and state.position_B.tolist() == [3 + made, 1 + made]
    assert (state.cache.layers[0].slots[0].pos_BKS[:, 0] >= 0).sum(-1).tolist() == [3 + made, 1 + made]
    assert np.asarray(state.token_B).tolist() == (tokens_nB[made - 1] if made else token_B).tolist()


@pytest.mark.parametrize(
    "positions", [[[-1, -1, 0, 1]], [[1, 2, 3, 4]], [[0, -1, 1, 2]], [[0, 1, 2, 4]], [[0, 1, 1, 2]]]
)
def test_positions_other_than_padded_on_the_right_are_refused(nano, positions: list) -> None:
    """Logits of a prompt that is padded on the left would be wrong, with no word."""
    cache = generate.empty_cache(nano.config, parse("full"), 1, 8)
    with pytest.raises(BadInput, match="padding, -1, on the right"):
        generate.prefill(nano.config, nano.params, cache, jnp.ones((1, 4), jnp.int32), jnp.asarray(positions))


@pytest.mark.parametrize("spec", ["full", "sink 1 | recent 2", "heavy 2 | recent 2"])
def test_a_second_prefill_is_refused(nano, spec: str) -> None:
    """It would attend to nothing of what the cache holds. Inside another jit nothing is looked at."""
    tokens_BT, positions_BT = jnp.ones((2, 4), jnp.int32), jnp.asarray([[0, 1, 2, 3], [0, 1, -1, -1]])
    cache = generate.empty_cache(nano.config, parse(spec), 2, 8)
    within = jax.jit(lambda cache: generate.prefill(nano.config, nano.params, cache, tokens_BT, positions_BT))
    expected, cache = within(cache)
    with pytest.raises(BadInput, match="needs an empty cache"):
        generate.prefill(nano.config, nano.params, cache, tokens_BT, positions_BT)
    empty = generate.empty_cache(nano.config, parse(spec), 2, 8)
    found, _ = generate.prefill(nano.config, nano.params, empty, tokens_BT, positions_BT)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_few_prompt_lengths_are_compiled(nano) -> None:
    """Prompts of 5 to 8 tokens share one prefill."""
    lengths = range(5, 9)
    before = generate.prefill_step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    for length in lengths:
        cache = generate.empty_cache(nano.config, parse("sink 1 | recent 8"), 1, 32)
        tokens, positions = generate.pad([list(range(length))])
        generate.prefill(nano.config, nano.params, cache, jnp.asarray(tokens), jnp.asarray(positions))
    after = generate.prefill_step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
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
