"""Records: appended whole, read back, compared in pairs."""

import json

import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import records
from kvcascade.eval.quality.perplexity import Scores
from kvcascade.model import tokenizer
from kvcascade.model.config import ModelConfig
from kvcascade.model.pretrained import Model

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=61, context=16)
MODEL = Model("runs/x", CONFIG, {}, tokenizer.bytes_encoding())
CONTRACT = """model cache data context sequences tokens nll ppl bits_per_byte kv_bytes kv_bytes_predicted kv_bytes_full compression
tokens_per_second traces device seed commit seconds""".split()


def record(cache: str = "full", shift: float = 0.0) -> records.Record:
    """A record of made-up scores."""
    spec = parse(cache)
    nll_BT = np.random.default_rng(1).random((4, 15)) + shift
    scores = Scores(nll_BT, spec.nbytes(CONFIG.layer_heads, 16), 100.0, 1, 0.5)
    lengths = np.full(61, 2)
    one = records.evaluation(MODEL, spec, "stdlib", np.zeros((4, 16), np.int32), 0, lengths, scores, 8)
    return records.stamp(one, 1.5)


def test_a_record_holds_what_the_contract_names():
    """Every field is there, and the derived ones follow from the others."""
    one = record()
    assert set(CONTRACT) <= set(one)
    assert one["kv_bytes_full"] == 2 * 2 * 2 * 8 * 16 * 2
    assert one["compression"] == 1 - one["kv_bytes"] / one["kv_bytes_full"]
    assert one["ppl"] == pytest.approx(np.exp(one["nll"]))
    assert one["bits_per_byte"] == pytest.approx(one["nll"] / np.log(2) / 2)
    json.dumps(one)


def test_the_table_has_a_column_for_each_cell():
    """Each row is as long as the header."""
    _, columns, rows = records.evaluation_table([record(), record("recent 4", 0.1)])
    assert {len(row) for row in rows} == {len(columns)}


def test_a_figure_that_is_not_finite_is_no_record():
    """Neither NaN nor infinity is stamped, wherever in the record it is."""
    for bad in ({"nll": float("nan")}, {"points": [[1, float("inf")]]}):
        with pytest.raises(BadInput, match=f"x, full: {next(iter(bad))} is not finite"):
            records.stamp({"model": "x", "cache": "full"} | bad, 1.0)
    with pytest.raises(BadInput, match="ppl is not finite"):
        record(shift=1000)  # e^1000


def test_the_paired_interval_takes_out_the_spread_between_windows():
    """A constant shift of every window has an interval of no width, however much the windows differ."""
    low, high = records.paired(record("recent 4", 0.25), record())
    assert low == pytest.approx(0.25, abs=1e-5) and high == pytest.approx(0.25, abs=1e-5)


def test_windows_of_another_text_have_no_paired_interval():
    """Records of one model on other windows stand in one table."""
    other = record("recent 4") | {"data": "file:x"}
    assert np.isnan(records.paired(other, record())).all()
    assert records.paired(record("recent 4"), record()) == (0, 0)
