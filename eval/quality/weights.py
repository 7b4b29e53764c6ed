"""What it costs to keep a model's weights in fewer bits: bytes and perplexity, on the page and in the README."""

import math

import numpy as np

from kvcascade.eval import stats
from kvcascade.eval.records import Record, Table, of_kind


def quantized(before: Record, after: Record, **about) -> Record:
    """The record of a model that was rounded, from its evaluations before and after."""
    same = {
        key: before[key]
        for key in (
            "model",
            "data",
            "context",
            "sequences",
            "tokens",
            "bos",
            "rows",
            "windows",
            "documents",
            "document_windows",
        )
    }
    pairs = {
        f"{key}_{when}": each[key]
        for when, each in (("before", before), ("after", after))
        for key in ("ppl", "nll_windows", "parameter_bytes")
    }
    return {"kind": "quantize", "weights": after["weights"]} | same | pairs | about


def table(found: list[Record]) -> Table:
    """Columns and rows of one model's weights on one text: as it was, in fewer bits as it is, and rounded by each method."""
    columns = ["weights", "rounded", "bytes of parameters", "of float32", "PPL", "Δ PPL (95 %)"]
    rounded = of_kind(found, "quantize")
    plain = [r for r in of_kind(found, "evaluate") if r["cache"] == "full" and "parameter_bytes" in r]
    lines = [(r["weights"], "", r["parameter_bytes"], r["ppl"], r["nll_windows"]) for r in plain]
    if rounded and not any(weights == "float32" for weights, *_ in lines):
        first = rounded[0]
        lines.insert(
            0, ("float32", "", first["parameter_bytes_before"], first["ppl_before"], first["nll_windows_before"])
        )
    for r in rounded:
        how = f"{r['method']}, groups of {r['group']}"
        lines.append((r["weights"], how, r["parameter_bytes_after"], r["ppl_after"], r["nll_windows_after"]))
    _, _, whole, ppl, windows = next((line for line in lines if line[0] == "float32"), lines[0])
    rows = []
    for weights, how, size, mine, theirs in lines:
        change = ""
        if mine != ppl and len(theirs) == len(windows):
            low, high = (
                math.expm1(x)
                for x in stats.interval(np.asarray(theirs) - np.asarray(windows), found[0].get("document_windows"))
            )
            change = f"{mine / ppl - 1:+.2%} ({low:+.2%} … {high:+.2%})"
        rows.append([weights, how, f"{size:,}", f"{size / whole:.1%}", f"{mine:.3f}", change])
    return columns, rows


def protocol(found: list[Record]) -> str:
    """In one sentence what was measured on what."""
    first = found[0]
    calibrated = of_kind(found, "quantize")
    text = f"{first['sequences']} windows of {first['context']} tokens of {first['data'].removeprefix('file:')}; 95 % intervals over windows"
    if calibrated:
        one = calibrated[0]
        text += f"; calibrated on {one['samples']} windows of {one['calibration'].removeprefix('file:')}"
    return f"{first['model']}, {text}"
