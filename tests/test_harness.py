"""Tasks of lm-evaluation-harness behind a cache agree with its own backend for transformers, and with this project's other scores."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import harness_cases
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import record_files
from kvcascade.eval.quality import perplexity
from kvcascade.eval.records import TaskResult, of
from kvcascade.model import gpt, pretrained, tokenizer
from kvcascade.model.pretrained import Model
from kvcascade.scripts import cli

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from kvcascade.eval.quality import harness  # noqa: E402

GOLDEN = json.loads(
    Path(__file__).with_name("golden_harness.json").read_text("utf-8")
)  # made by make_golden_harness.py


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("harness")
    return {name: pretrained.load(str(harness_cases.write(name, folder / name))) for name in harness_cases.MODELS}


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Iterator[TaskManager]:
    """The tasks of harness_tasks alone, their data read anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.chdir(harness_cases.TASKS)
        yield TaskManager(include_path=".", include_defaults=False)


def behind(model: Model, cache: str, batch: int = 4, context: int = harness_cases.CONTEXT) -> harness.CachedModel:
    return harness.CachedModel(model, lambda size: parse(cache), context, batch)


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]  # pyright: ignore


class Watched(harness.CachedModel):
    """Keeps what was asked and answered."""

    def keep(self, requests, answers):
        self.seen = [[*request.args, answer] for request, answer in zip(requests, answers, strict=True)]
        return answers

    def loglikelihood(self, requests, disable_tqdm=True):
        return self.keep(requests, super().loglikelihood(requests))

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        return self.keep(requests, super().loglikelihood_rolling(requests))

    def generate_until(self, requests, disable_tqdm=True):
        return self.keep(requests, super().generate_until(requests))


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("name", harness_cases.MODELS)
def test_every_request_and_metric_equals_the_backend_for_transformers(models, known, name, chat):
    """Log-likelihoods to 1e-3 of it, for up to 200 tokens; greedy flags, texts, and so the metrics; few-shot and templates where there is a chat."""
    for task in harness_cases.NAMES:
        golden = GOLDEN[f"{name}{'-chat' if chat else ''}/{task}"]
        model = Watched(models[name], lambda size: parse("full@f32"), harness_cases.CONTEXT, 3)
        (result,) = harness.evaluate(model, known, task, 1 if chat else None, chat_template=chat)
        assert len(model.seen) == len(golden["requests"])
        for mine, theirs in zip(model.seen, golden["requests"], strict=True):
            assert mine[:-1] == theirs[:-1]
            if isinstance(theirs[-1], str):
                assert mine[-1] == theirs[-1]
            else:
                np.testing.assert_allclose(mine[-1], theirs[-1], atol=1e-3)
        for each in result["metrics"]:
            value, error = (golden["metrics"][f"{each['metric']}{which},{each['filter']}"] for which in ("", "_stderr"))
            assert each["value"] == pytest.approx(value, rel=1e-4)
            assert each["stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-3))


@pytest.mark.slow
def test_a_full_cache_scores_as_one_forward_pass(models):
    """A text of one window, and contexts of unequal lengths in one batch."""
    model = models["bos"]
    ours = behind(model, "full@f32")
    text = "A lake lies behind the hill, and a mill stands there."
    # A window begins with its prefix, which is BOS here, and so does the text.
    tokens = [ours.prefix_token_id, *model.encode(text)]
    expected = -float(gpt.nll(model.config, model.params, jnp.asarray([tokens])).sum())
    assert ours.loglikelihood_rolling(asked("loglikelihood_rolling", (text,))) == [pytest.approx(expected, abs=1e-3)]
    nll_T = gpt.nll(model.config, model.params, jnp.asarray([tokens[1:]]))[0]
    pairs = [(text[:cut], text[cut:]) for cut in (1, 6, 11, 22)]
    for (context, _), (found, greedy) in zip(pairs, ours.loglikelihood(asked("loglikelihood", *pairs)), strict=True):
        first = len(model.encode(context.rstrip()))
        assert found == pytest.approx(-float(nll_T[first - 1 :].sum()), abs=1e-3) and not greedy


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["sink 4@f32 | recent 12@f32", "sink 2@f32 | recent 6@f32 | heavy 8@f32"])
def test_a_window_is_scored_as_perplexity_scores_it(models, cache):
    """Token by token from the first on, and after a context that entered in one prefill; rows of a batch do not mix."""
    model = models["plain"]
    ours = behind(model, cache)
    texts = [
        "The mill has not turned since the war, and nobody knows why.",
        "It was built of stone, by two brothers, near a small lake.",
    ]
    length = min(len(model.encode(text)) for text in texts)
    texts = [model.encoding.decode(model.encode(text)[:length]) for text in texts]
    rows = np.asarray([[ours.prefix_token_id, *model.encode(text)] for text in texts], np.int32)
    expected = perplexity.score(model.config, model.params, parse(cache), rows, 2).nll_BT
    found = ours.loglikelihood_rolling(asked("loglikelihood_rolling", *[(text,) for text in texts]))
    np.testing.assert_allclose(found, -expected.sum(1), atol=1e-3)
    expected = perplexity.score(model.config, model.params, parse(cache), rows, 2, prefix=20).nll_BT
    pairs = [(model.encoding.decode(row[1:20].tolist()), model.encoding.decode(row[20:].tolist())) for row in rows]
    found = ours.loglikelihood(asked("loglikelihood", *[("<|end|>" + context, after) for context, after in pairs]))
    np.testing.assert_allclose([value for value, _ in found], -expected.sum(1), atol=1e-3)


@pytest.mark.slow
def test_an_answer_depends_on_no_other_row(models):
    """Greedy or drawn; requests that draw draw apart."""
    model, cache = models["plain"], "sink 4 | recent 12"
    drawn, greedy = {"do_sample": True, "temperature": 1.5, "top_k": 40, "max_gen_toks": 12}, {"max_gen_toks": 12}
    answers = lambda *requests: behind(model, cache, 3).generate_until(asked("generate_until", *requests))
    first = answers(("The sky", drawn), ("The sky", drawn), ("It rained", greedy))
    again = answers(
        ("The sky", drawn), ("A dog", drawn), ("It rained", drawn), ("It rained", greedy), ("A", greedy), ("It", greedy)
    )
    assert first[0] == again[0] != first[1] and first[2] == again[3] not in again[2]


def test_what_stops_an_answer(models):
    """The first stop text is cut off with what follows; an end token ends the answer."""
    model = models["plain"]
    ours = behind(model, "full@f32")
    (whole,) = ours.generate_until(asked("generate_until", ("The sky", {"max_gen_toks": 24})))
    stop = whole[len(whole) // 2 :][:2]
    (part,) = ours.generate_until(asked("generate_until", ("The sky", {"max_gen_toks": 24, "until": [stop]})))
    assert part == whole[: whole.index(stop)]
    first = model.encode(whole)[0]
    ends = dataclasses.replace(model, end=frozenset({first}))
    assert behind(ends, "full@f32").generate_until(asked("generate_until", ("The sky", {"max_gen_toks": 24}))) == [""]


def test_a_tokenizer_of_bytes_has_texts_begin_after_a_line(models):
    """A model of its own run has neither BOS nor an end token."""
    config, params = models["plain"].config, models["plain"].params
    ours = behind(Model("run", config, params, tokenizer.bytes_encoding()), "full@f32")
    expected = -float(gpt.nll(config, params, jnp.asarray([list(b"\nabc def")])).sum())
    assert ours.loglikelihood_rolling(asked("loglikelihood_rolling", ("abc def",))) == [
        pytest.approx(expected, abs=1e-3)
    ]
    assert ours.loglikelihood(asked("loglikelihood", ("", "abc def"))) == [(pytest.approx(expected, abs=1e-3), False)]


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({"num_beams": 4, "max_gen_toks": 8}, "num_beams=4"),
        ({"max_gen_toks": harness_cases.CONTEXT}, "leave no room"),
        ({"do_sample": True, "top_p": 2.0, "max_gen_toks": 8}, "top-p"),
    ],
)
def test_what_cannot_be_generated_is_refused(models, said, wrong):
    with pytest.raises(BadInput, match=wrong):
        behind(models["plain"], "full").generate_until(asked("generate_until", ("The sky", said)))


def test_a_continuation_must_fit(models):
    for pair in (("The sky", ""), ("The sky", "x" * harness_cases.CONTEXT + "y")):
        with pytest.raises(BadInput, match="tokens to score"):
            behind(models["plain"], "full").loglikelihood(asked("loglikelihood", pair))


def run(*arguments: str) -> int | str | None:
    try:
        cli.main(["harness", *arguments])
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.mark.slow
def test_the_command_records_each_cache_and_task(models, known, tmp_path, monkeypatch, capsys):
    """A group comes to its tasks and itself; full and random eviction stand beside; bytes are of the longest row."""
    monkeypatch.setattr(harness, "TaskManager", lambda include_path: known)
    out, model = tmp_path / "records.jsonl", models["plain"].name
    arguments = ["--model", model, "--include", ".", "--tasks", "tiny_group", "--cache", "sink 2 | recent 14"]
    assert run(*arguments, "--limit", "2", "--num-fewshot", "0", "--batch", "2", "--out", str(out)) == 0
    found = of(record_files.read(out), TaskResult)
    assert [r.cache for r in found] == ["full"] * 3 + ["sink 2 | recent 14"] * 3 + ["random 16"] * 3
    assert [r.task for r in found[:3]] == ["tiny_lambada", "tiny_choice", "tiny_group"]
    config = models["plain"].config
    for r in found:
        assert r.samples == (4 if r.task == "tiny_group" else 2) and not r.chat and r.few_shot == 0
        assert r.kv_bytes == parse(r.cache).nbytes(config.layer_heads, r.longest)
        assert 16 < r.longest <= r.context == harness_cases.CONTEXT
    shown = capsys.readouterr().out
    assert "acc_norm" in shown and "bootstrapping" not in shown


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--tasks", "tiny_wikki"], "the task tiny_wikki"),
        (["--tasks", " , "], "at least one task"),
        (["--tasks", "tiny_wiki", "--include", "nowhere"], "nowhere is no folder"),
        (["--tasks", "tiny_wiki", "--context", "97"], "a context of 97 tokens is longer"),
        (["--tasks", "tiny_wiki", "--cache", "recnt 4"], "did you mean 'recent'"),
        (["--tasks", "tiny_lost"], "the task tiny_lost: .*lost.jsonl"),
    ],
)
def test_bad_input_is_one_line(models, known, monkeypatch, capsys, arguments, wrong):
    monkeypatch.setattr(harness, "TaskManager", lambda include_path: known)
    assert run("--model", models["plain"].name, *arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kvcascade: ")]
    assert len(said) == 1 and re.search(wrong, said[0])
