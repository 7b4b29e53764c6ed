"""What the records of each kind must hold for tables, figures and pages to be made of them, whoever wrote them."""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

LARGEST = 1e18  # beyond any count, size or time that was measured


class Number(NamedTuple):
    """A finite number and what it may be."""

    least: int | float = -LARGEST
    most: int | float = LARGEST
    above: bool = False
    """Whether `least` itself is too little."""

    def wrong(self, value: Any) -> str | None:
        """What a value is not, None if it is right."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "is not finite" if value is None else "is not a number"
        if isinstance(value, float) and not math.isfinite(value):
            return "is not finite"
        if not (self.least < value if self.above else self.least <= value) or value > self.most:
            low = f"{'above' if self.above else 'at least'} {self.least:g}"
            return f"is {value:.6g}, not {low} and at most {self.most:g}" if value < LARGEST else "is not finite"
        return None


class Optional(NamedTuple):
    """What a key holds that may be missing."""

    wanted: Any


class Null(NamedTuple):
    """What may be null."""

    wanted: Any


FINITE = Number(-sys.float_info.max, sys.float_info.max)
ANY, SIZE, POSITIVE = Number(), Number(0), Number(0, above=True)
COUNT = Number(1)
NATS = Number(0, 700)  # e^700 is the largest perplexity that a float can tell
SHARE = Number(0, 1)
FLAG = bool

MADE = {
    "device": str, "versions": {}, "commit": str, "seconds": SIZE, "schema": Optional(Number(2, 2)), "key": Optional(str), "of": Optional(COUNT),
    "code": Optional(str), "date": Optional(str), "processor": Optional(str), "command": Optional(str),
}  # fmt: skip
NAMED = MADE | {"model": str, "cache": str}
GROWTH = {"contexts": [COUNT], "kv_bytes": [POSITIVE]}

KEYS: dict[str, dict[str, Any]] = {
    "train": MADE
    | {
        "model": str, "shape": {"heads": COUNT, "kv_heads": COUNT}, "parameters": SIZE, "kv_bytes_per_token": POSITIVE, "steps": COUNT,
        "tokens_per_step": POSITIVE, "curve": [(SIZE, POSITIVE, SIZE, POSITIVE)], "validation_loss": POSITIVE, "validation_stderr": SIZE,
        "validation_bits_per_byte": POSITIVE, "unigram_bits_per_byte": SIZE, "tokens_per_second": SIZE, "train_seconds": SIZE,
    },
    "evaluate": NAMED
    | {
        "data": str, "context": COUNT, "sequences": COUNT, "tokens": COUNT, "seed": ANY, "nll": NATS, "nll_windows": [NATS], "ppl": POSITIVE,
        "bits_per_byte": SIZE, "kv_bytes": POSITIVE, "kv_bytes_predicted": SIZE, "compression": ANY, "kept": SIZE,
        "tokens_per_second": SIZE, "traces": SIZE, "weights": Optional(str), "parameter_bytes": Optional(SIZE), "rows": Optional(str),
        "windows": Optional(str), "documents": Optional(COUNT), "document_windows": Optional([SIZE]), "draws": Optional(COUNT),
    },
    "quantize": MADE
    | {
        "model": str, "weights": str, "method": str, "group": COUNT, "calibration": str, "samples": COUNT, "data": str, "context": COUNT,
        "sequences": COUNT, "tokens": COUNT, "ppl_before": POSITIVE, "ppl_after": POSITIVE, "nll_windows_before": [NATS],
        "nll_windows_after": [NATS], "parameter_bytes_before": POSITIVE, "parameter_bytes_after": POSITIVE,
    },
    "retrieve": NAMED
    | {
        "task": str, "length": COUNT, "depth": SHARE, "samples": COUNT, "turns": COUNT, "answered": SIZE, "kv_bytes": SIZE,
        "compression": ANY, "seed": ANY, "puzzles": Optional([{"name": str, "answers": [str], "said": [str], "right": [bool]}]),
    },
    "harness": NAMED
    | {
        "weights": str, "task": str, "version": str, "samples": COUNT, "few_shot": Null(SIZE), "chat": FLAG, "context": COUNT, "longest": COUNT,
        "metrics": [{"metric": str, "filter": str, "value": FINITE, "stderr": Null(FINITE)}], "kv_bytes": POSITIVE, "kv_bytes_full": POSITIVE,
        "compression": ANY, "lm_eval": str, "seed": ANY,
    },
    "layer": MADE | {"layer": str, "codec": str, "bytes_per_token": SIZE},
    "growth": NAMED | GROWTH,
    "bench": NAMED
    | {
        "batch": COUNT, "context": COUNT, "steps": COUNT, "repeats": COUNT, "bandwidth": POSITIVE, "weights": Optional(str),
        "library": Optional(str), "peer": Optional(str), "kv_bytes": Optional(Null(SIZE)), "step_bytes": Optional(SIZE), "reason": Optional(str),
        "prefills": Optional(COUNT), "steady": Optional(FLAG), "bandwidth_range": Optional((POSITIVE, POSITIVE)),
    },
    "stream": NAMED
    | {
        "weights": str, "tokens": COUNT, "kv_bytes": SIZE, "points": [(COUNT, SIZE, SIZE)], "finite": FLAG, "traces": SIZE,
    },
    "fit": NAMED
    | {
        "gpu": str, "context": COUNT, "weights": str, "share": SHARE, "gpu_memory": POSITIVE, "budget": POSITIVE, "failed": Optional(str),
    },
    "crash": NAMED
    | {
        "context": COUNT, "limit": POSITIVE, "way": str, "users": COUNT, "died": SIZE, "peak": SIZE, "peak_one": SIZE,
        "user_bytes": Null(POSITIVE), "user_bytes_predicted": SIZE, "users_predicted": SIZE, "children": [{"users": COUNT, "lived": FLAG}],
    },
    "profile": NAMED
    | {
        "weights": str, "batch": COUNT, "context": COUNT, "bandwidth": POSITIVE, "profiled_ms": POSITIVE, "step_ms": POSITIVE,
        "between_ms": SIZE, "around_ms": SIZE, "operations": SIZE,
        "components": [{"name": str, "calls": SIZE, "ms": POSITIVE, "bytes": SIZE}],
        "tiers": [{"tier": str, "ms": SIZE, "bytes": SIZE}],
        "buffers": {
            "largest": [{"component": str, "type": str, "count": COUNT, "bytes": SIZE}], "copies": SIZE, "cache": POSITIVE,
            "aliased": SIZE, "temporaries": SIZE,
        },
        "watched": {"steps": SIZE, "arrays": ANY, "bytes": ANY, "resident": ANY},
        "growth": GROWTH | {"temporary_bytes": [SIZE], "live_bytes": [SIZE], "output_bytes": [SIZE]},
    },
}  # fmt: skip
SPEEDS = {
    "first_token_ms": POSITIVE, "prefill_tokens_per_second": POSITIVE, "decode_tokens_per_second": POSITIVE, "step_ms": POSITIVE,
    "alone_ms_5_95": Optional([SIZE]), "step_ms_5_95": Optional([SIZE]),
}  # fmt: skip
FITS = {
    "baseline": str, "users": SIZE, "exact": FLAG, "held": POSITIVE, "rows": SIZE, "kv_bytes": SIZE, "kv_bytes_full": POSITIVE,
    "difference": ANY, "expected": {"weights": SIZE}, "longest": {"context": Null(SIZE)},
}  # fmt: skip
FIDELITY = {"kl": SIZE, "kl_windows": [SIZE], "same_top": SHARE, "same_top_windows": [SHARE]}


def _evaluate(record: dict) -> str | None:
    for key in ("nll_windows", "document_windows"):
        if key in record and len(record[key]) != record["sequences"]:
            return f"has {len(record[key])} {key} for {record['sequences']} sequences"
    return _wrong(record, FIDELITY) if "kl" in record else None


def _bench(record: dict) -> str | None:
    older = {"alone_ms_50_90_99": [POSITIVE]} if "alone_ms_50_90_99" in record else {"alone_ms": POSITIVE}
    return None if "reason" in record else _wrong(record, SPEEDS | older)


def _growth(growth: dict) -> str | None:
    lengths = {key: len(each) for key, each in growth.items() if key == "contexts" or key.endswith("_bytes")}
    return None if len({*lengths.values()}) == 1 else f"{', '.join(lengths)} are of unequal lengths"


def _crash(record: dict) -> str | None:
    lived = [each for each in record["children"] if each["lived"]]
    return next((wrong for each in lived if (wrong := _wrong(each, {"peak": SIZE}, "children.")) is not None), None)


def _quantize(record: dict) -> str | None:
    counts = [len(record[f"nll_windows_{when}"]) for when in ("before", "after")]
    return (
        None if counts == [record["sequences"]] * 2 else f"has {counts} nll_windows for {record['sequences']} sequences"
    )


RULES: dict[str, Callable[[dict], str | None]] = {
    "evaluate": _evaluate,
    "quantize": _quantize,
    "retrieve": lambda r: None if r["answered"] <= r["turns"] else "has more answers than turns",
    "growth": _growth,
    "bench": _bench,
    "stream": lambda r: None if r["points"][-1][0] >= 1024 else "ends before its first 1,024 tokens",
    "fit": lambda r: None if "failed" in r else _wrong(r, FITS),
    "crash": _crash,
    "profile": lambda r: _growth(r["growth"]),
}
"""What cannot be said of one key alone."""


def wrong(record: Any) -> str | None:
    """Why a record cannot be used, None if it can; one of a kind that no report shows is right whatever it holds."""
    if not isinstance(record, dict):
        return "is not an object"
    if not isinstance(kind := record.get("kind"), str):
        return "has no kind"
    if kind not in KEYS:
        return None
    return _wrong(record, KEYS[kind]) or RULES.get(kind, lambda record: None)(record)


def not_finite(value: Any, name: str = "") -> str | None:
    """The key of the first number in a record that is NaN or infinite."""
    if isinstance(value, dict):
        found = (not_finite(each, f"{name}.{key}" if name else key) for key, each in value.items())
    elif isinstance(value, list | tuple):
        found = (not_finite(each, name) for each in value)
    else:
        return name if isinstance(value, float) and not math.isfinite(value) else None
    return next((each for each in found if each is not None), None)


def _wrong(value: Any, wanted: Any, name: str = "") -> str | None:
    if isinstance(wanted, Null):
        return None if value is None else _wrong(value, wanted.wanted, name)
    if isinstance(wanted, Number):
        found = wanted.wrong(value)
        return f"{name} {found}" if found else None
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return f"{name.rstrip('.')} is not an object"
        prefix = name if name.endswith(".") or not name else f"{name}."
        for key, each in wanted.items():
            optional = isinstance(each, Optional)
            if key not in value and not optional:
                return f"lacks {prefix}{key}"
            if key in value and (found := _wrong(value[key], each.wanted if optional else each, f"{prefix}{key}")):
                return found
        return None
    if isinstance(wanted, list | tuple):
        if not isinstance(value, list) or not value or isinstance(wanted, tuple) and len(value) != len(wanted):
            return f"{name} is not a list of {len(wanted) if isinstance(wanted, tuple) else 'some'} values"
        parts = wanted if isinstance(wanted, tuple) else wanted * len(value)
        return next(
            (found for each, part in zip(value, parts, strict=True) if (found := _wrong(each, part, name))), None
        )
    if not isinstance(value, wanted):
        return f"{name} is not {'text' if wanted is str else 'true or false'}"
    return f"{name} is empty" if value == "" and name.rpartition(".")[2] in ("model", "cache") else None
