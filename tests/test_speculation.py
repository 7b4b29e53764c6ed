"""The measurement of foreseen tokens, with a toy that chats."""

import dataclasses

import pytest
from served import toy

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.measure import measure
from kvcascade.eval.records import Speculated, of
from kvcascade.eval.speed import speculation
from kvcascade.model.pretrained import Model
from kvcascade.model.programs import traced


@pytest.fixture
def model(monkeypatch) -> Model:
    monkeypatch.setattr(speculation, "kept", traced)
    return dataclasses.replace(toy(), config=dataclasses.replace(toy().config, context=640))


@pytest.mark.parametrize(
    "name, cache",
    [
        ("ngram", "pending 4 | sink 4 | recent 90"),
        pytest.param("ngram", "full@int8 on blocks", marks=pytest.mark.slow),
        pytest.param("self", "full@planes on blocks", marks=pytest.mark.slow),
    ],
)
def test_a_record_counts_what_was_foreseen_and_what_came(name, cache, model, monkeypatch) -> None:
    monkeypatch.setitem(speculation.TASKS, "copying", ("abcabcabcabc", "a b a b a b"))
    job = speculation.job(model, parse(cache), "copying", {name: None}, [2], 24, 2)
    found = of(measure([job], None).records, Speculated)
    plain, ours = found
    assert (plain.ahead, plain.drafted, plain.accepted) == (0, 0, ()) and plain.steps == plain.tokens
    assert ours.ahead == 2 and ours.tokens == plain.tokens and ours.drafted >= sum(ours.accepted)
    assert ours.steps + sum(ours.accepted) == ours.tokens  # a step brings a token, and what was accepted
    assert len(ours.seconds_each) == 2 and ours.tokens_per_second > 0
    assert name == "self" or ours.bytes_per_token < plain.bytes_per_token or not sum(ours.accepted)
    table = speculation.table(found)
    assert "2 prompts" in table.title and [row[1] for row in table.rows] == ["nothing", f"{name} 2"]


def test_an_answer_that_differs_is_no_measurement(model, monkeypatch) -> None:
    monkeypatch.setitem(speculation.TASKS, "copying", ("abc",))
    answered = speculation._answered

    def other(model, device, proposer, *more):
        found = answered(model, device, proposer, *more)
        return dataclasses.replace(found, answers=[[1, 2]]) if proposer == "ngram" else found

    monkeypatch.setattr(speculation, "_answered", other)
    with pytest.raises(BadInput, match="answered otherwise"):
        measure([speculation.job(model, parse("full on blocks"), "copying", {"ngram": None}, [2], 8, 1)], None)
