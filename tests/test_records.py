"""Records of evaluations: what they hold, and how they are compared."""

import dataclasses
import json

import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import measure, records
from kvcascade.eval.quality import evaluation, perplexity
from kvcascade.eval.quality.evaluation import Protocol
from kvcascade.eval.quality.perplexity import Scores
from kvcascade.eval.quality.windows import Windows
from kvcascade.model import tokenizer
from kvcascade.model.config import ModelConfig
from kvcascade.model.pretrained import Model

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=256, context=16)
MODEL = Model("runs/x", CONFIG, {}, tokenizer.bytes_encoding())
WINDOWS = Windows(np.zeros((4, 16), np.int32), np.asarray([0, 0, 1, 2]), "stdlib", "text", "spread", 0, False)
CONTRACT = """model cache data context sequences tokens nll ppl bits_per_byte kv_bytes kv_bytes_predicted kv_bytes_full compression
tokens_per_second traces device seed commit seconds""".split()


@pytest.fixture
def record(monkeypatch):
    """Makes records of made-up scores."""

    def make(cache: str = "full", shift: float = 0.0, windows: Windows = WINDOWS) -> records.Evaluation:
        spec = parse(cache)
        nll_BT = np.random.default_rng(1).random((4, 15)) + shift
        scores = Scores(nll_BT, spec.nbytes(CONFIG.layer_heads, 16), 100.0, 1, 0.5)
        monkeypatch.setattr(perplexity, "score", lambda *arguments: scores)
        (one,) = measure.measure([evaluation.job(MODEL, spec, windows, Protocol())], None).records
        return one

    return make


def test_a_record_holds_what_the_contract_names(record):
    """Every field is there, and the derived ones follow from the others."""
    one = record().given
    assert set(CONTRACT) <= set(one)
    assert one["kv_bytes_full"] == 2 * 2 * 2 * 8 * 16 * 2
    assert one["compression"] == 1 - one["kv_bytes"] / one["kv_bytes_full"]
    assert one["ppl"] == pytest.approx(np.exp(one["nll"]))
    assert one["bits_per_byte"] == pytest.approx(one["nll"] / np.log(2))
    assert one["documents"] == 3 and one["document_windows"] == [0, 0, 1, 2]
    assert one["processor"] and one["threads"] > 0 and one["command"].startswith("kvcascade")
    json.dumps(one)


def test_the_table_has_a_column_for_each_cell(record):
    """Each row is as long as the header."""
    _, columns, rows = evaluation.table([record(), record("recent 4", 0.1)])
    assert {len(row) for row in rows} == {len(columns)}


def test_a_figure_that_is_not_finite_is_no_record(record):
    """Neither NaN nor infinity is recorded, wherever in the record it is."""
    for shift, said in ((float("nan"), "nll is not finite"), (1000, "nll is not less than or equal to 700")):
        with pytest.raises(BadInput, match=f"runs/x: full: {said}, so nothing is recorded"):
            record(shift=shift)


def test_the_paired_interval_takes_out_the_spread_between_windows(record):
    """A constant shift of every window has an interval of no width, however much the windows differ."""
    low, high = evaluation.paired(record("recent 4", 0.25), record())
    assert low == pytest.approx(0.25, abs=1e-5) and high == pytest.approx(0.25, abs=1e-5)


def test_windows_of_another_text_have_no_paired_interval(record):
    """Records of one model on other windows stand in one table, and nothing is said of their difference."""
    other = records.changed(record("recent 4", windows=WINDOWS.part(0, 4)), rows="others")
    assert np.isnan(evaluation.paired(other, record())).all() and records.baseline(other, [record()]) is None
    assert evaluation.changes([record(), other]) == ["", ""]
    assert evaluation.paired(record("recent 4"), record()) == (0, 0)


def test_what_is_not_decided_is_marked(record):
    """A change of every window by the same is decided, one that the windows do not agree on is not."""
    full, sure, unsure = record(), record("recent 4", 0.1), record("recent 8", 0.1)
    beside = lambda one, *by: records.changed(
        one, nll_windows=[x + d for x, d in zip(full.nll_windows, by, strict=True)]
    )
    unsure, sure = beside(unsure, 0.5, -0.3, 0.4, -0.2), beside(sure, 0.1, 0.1001, 0.1, 0.1)
    _, first, second = evaluation.changes([full, sure, unsure])
    assert first.startswith("+10.5") and second.startswith("≈ ")


def test_windows_that_an_earlier_record_has_are_not_scored_again(monkeypatch):
    """A record that was added to equals one that was measured at once; random eviction has as many seeds, in turn."""
    rows = np.random.default_rng(0).integers(0, 256, (12, 16)).astype(np.int32)
    whole = Windows(rows, np.arange(12) // 2, "stdlib", "text", "spread", 0, False)
    scored = []

    def score(config, params, spec, rows, batch, prefix, other, chunk):
        scored.append((str(spec), rows.tolist()))
        nll_BT = rows[:, 1:] / 100 + spec.parts[0][2].tiers[0].policy.seed
        return Scores(nll_BT, spec.nbytes(CONFIG.layer_heads, 16), 100.0, 1, 0.5)

    monkeypatch.setattr(perplexity, "score", score)
    spec, protocol = parse("random 4"), Protocol(batch=4)
    (half,) = evaluation.job(MODEL, spec, whole.part(0, 4), protocol).run()
    (added,) = evaluation.job(MODEL, spec, whole, protocol, half).run()
    assert sum(len(each) for _, each in scored) == 12 and half.draws == 1 and added.draws == 3
    assert [name for name, _ in scored] == ["random 4", "random[seed=1] 4", "random[seed=2] 4"]
    (once,) = evaluation.job(MODEL, spec, whole, protocol).run()
    assert added == once


def test_every_kind_is_read() -> None:
    """A class of records that no line becomes would be measured again and again, and shown nowhere."""
    every = [records.Record]
    for each in every:
        every += each.__subclasses__()
    kinds = {
        each.__dataclass_fields__["kind"].default for each in every if "kind" in vars(each).get("__annotations__", {})
    }
    assert kinds - {dataclasses.MISSING} == {*records.KINDS}
