import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvcascade.eval import stats
from kvcascade.eval.records import Evaluation, Quantization, of
from kvcascade.eval.table import Column, Table

type Measured = Evaluation | Quantization


def quantized(before: Evaluation, after: Evaluation, **about) -> Quantization:
    """The record of a model that was rounded, from its evaluations before and after."""
    kept = "model data context sequences tokens bos rows windows documents document_windows".split()
    measured = {
        f"{key}_{when}": getattr(each, key)
        for when, each in (("before", before), ("after", after))
        for key in ("ppl", "nll_windows", "parameter_bytes")
    }
    same = {key: value for key, value in before.given.items() if key in kept}
    return Quantization(weights=str(after.weights), **same, **measured, **about)


class _Line(NamedTuple):
    weights: str | None
    rounded: str
    size: float
    ppl: float
    nll_windows: Sequence[float]


def table(found: Sequence[Measured]) -> Table:
    """One model's weights on one text: as it was, in fewer bits as it is, and rounded by each method."""
    rounded, evaluated = of(found, Quantization), of(found, Evaluation)
    lines = [
        _Line(r.weights, "", r.parameter_bytes, r.ppl, r.nll_windows)
        for r in evaluated
        if r.cache == "full" and r.parameter_bytes is not None
    ]
    if rounded and not any(line.weights == "float32" for line in lines):
        one = rounded[0]
        lines.insert(0, _Line("float32", "", one.parameter_bytes_before, one.ppl_before, one.nll_windows_before))
    for r in rounded:
        how = f"{r.method}, groups of {r.group}"
        lines.append(_Line(r.weights, how, r.parameter_bytes_after, r.ppl_after, r.nll_windows_after))
    whole = next((line for line in lines if line.weights == "float32"), lines[0])

    def change(line: _Line) -> str | None:
        if line.ppl == whole.ppl or len(line.nll_windows) != len(whole.nll_windows):
            return None
        clusters = found[0].document_windows
        low, high = map(math.expm1, stats.interval(np.subtract(line.nll_windows, whole.nll_windows), clusters))
        return f"{line.ppl / whole.ppl - 1:+.2%} ({low:+.2%} … {high:+.2%})"

    columns = [
        Column("weights", "weights"), Column("rounded", "rounded"), Column("bytes of parameters", "size", "{:,}"),
        Column("of float32", lambda line: line.size / whole.size, "{:.1%}"), Column("PPL", "ppl", "{:.3f}"), Column("Δ PPL (95 %)", change),
    ]  # fmt: skip
    return Table.of(protocol(found), columns, lines)


def protocol(found: Sequence[Measured]) -> str:
    """In one sentence what was measured on what."""
    first = found[0]
    text = f"{first.sequences} windows of {first.context} tokens of {first.data.removeprefix('file:')}; 95 % intervals over windows"
    for one in of(found, Quantization)[:1]:
        text += f"; calibrated on {one.samples} windows of {one.calibration.removeprefix('file:')}"
    return f"{first.model}, {text}"
