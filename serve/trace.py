"""Traces of requests: when each came, how long its prompt and its answer were, and what beginnings prompts had in common. No JAX here."""

import csv
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from kvcascade.cache.errors import BadInput

PIECE = 512
"""Tokens of a piece of a prompt that another may have too (Mooncake's traces, Qin et al. 2025)."""

LONGEST = 10**7
"""The most tokens of a prompt or an answer."""


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request of a trace."""

    at: float
    """Seconds since the first."""
    prompt: int
    """Tokens."""
    output: int
    """Tokens."""
    pieces: tuple[int, ...] = ()
    """What the prompt begins with: PIECE tokens of each number."""

    def __post_init__(self):
        if (
            not math.isfinite(self.at)
            or not 1 <= min(self.prompt, self.output)
            or max(self.prompt, self.output) > LONGEST
        ):
            raise ValueError("a request comes at a time, and is of 1 token or more")
        if min(self.pieces, default=0) < 0:
            raise ValueError("pieces are numbers from 0 on")

    @property
    def tokens(self) -> int:
        """Of both together."""
        return self.prompt + self.output


POISSON = {"rate": 4.0, "requests": 32.0, "prompt": 55.0, "output": 37.0, "spread": 0.8, "shared": 0.0}
"""Requests a second, how many, the medians of their lengths, the spread of the lengths' logarithms, tokens that all begin with."""


def read(text: str, seed: int = 0) -> list[Arrival]:
    """The requests of `poisson:rate=4,requests=32,…`, of a CSV file of Azure's, or of a JSON-lines file of Mooncake's, in order.

    Raises BadInput for what is none of these.
    """
    kind, colon, settings = text.partition(":")
    if kind == "poisson" and (colon or not settings):
        return poisson(settings, seed)
    path = Path(text).expanduser()
    try:
        with path.open(encoding="utf-8") as file:
            found = list(_mooncake(file, path) if path.suffix == ".jsonl" else _azure(file, path))
    except (OSError, UnicodeError, csv.Error) as error:
        raise BadInput(f"no trace {text}: {error}") from None
    if not found:
        raise BadInput(f"{text} has no requests")
    found.sort(key=lambda each: each.at)
    return [dataclasses.replace(each, at=each.at - found[0].at) for each in found]


def poisson(settings: str, seed: int) -> list[Arrival]:
    """Requests at random: the time between two is exponential, lengths are lognormal; the same for the same seed."""
    values = dict(POISSON)
    for part in filter(None, settings.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name.strip() not in POISSON or not re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            raise BadInput(f"{part!r}: a trace is written poisson:rate=4,requests=32 with some of {', '.join(POISSON)}")
        values[name.strip()] = float(value)
    count, shared = int(values["requests"]), int(values["shared"])
    if shared % PIECE:
        raise BadInput(f"what prompts share is so many times {PIECE} tokens, not {shared}")
    if count < 1 or values["rate"] <= 0 or min(values["prompt"], values["output"]) < 1:
        raise BadInput("a trace has a request at least, a rate above 0, and lengths from 1 on")
    if values["spread"] > 3 or max(values["prompt"], values["output"], shared) > LONGEST / 1000:
        raise BadInput(f"lengths spread by 3 at most, around {LONGEST // 1000:,} at most")
    draw = np.random.default_rng(seed)
    at = np.cumsum(draw.exponential(1 / values["rate"], count))
    lengths = lambda median: draw.lognormal(np.log(median), values["spread"], count).clip(1, LONGEST / 2).astype(int)
    prompts, outputs = lengths(values["prompt"]), lengths(values["output"])
    pieces = tuple(range(shared // PIECE))
    rows = zip((at - at[0]).tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return [Arrival(when, shared + prompt, output, pieces) for when, prompt, output in rows]


def _azure(file, path: Path):
    """Lines of TIMESTAMP, ContextTokens, GeneratedTokens (AzurePublicDataset, Patel et al. 2024)."""
    for number, line in enumerate(csv.DictReader(file), 2):
        try:
            when = datetime.fromisoformat(line["TIMESTAMP"][:26].strip()).timestamp()
            yield Arrival(when, int(line["ContextTokens"]), int(line["GeneratedTokens"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise BadInput(f"{path}, line {number}: no TIMESTAMP, ContextTokens, GeneratedTokens") from None


def _mooncake(file, path: Path):
    """Objects of timestamp in milliseconds, input_length, output_length, hash_ids (Mooncake, Qin et al. 2025)."""
    for number, line in enumerate(file, 1):
        try:
            each = json.loads(line)
            pieces = tuple(map(int, each.get("hash_ids", ())))
            yield Arrival(each["timestamp"] / 1e3, int(each["input_length"]), int(each["output_length"]), pieces)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            raise BadInput(f"{path}, line {number}: no timestamp, input_length, output_length") from None


def shortened(arrivals: Sequence[Arrival], by: int, context: int) -> list[Arrival]:
    """The same requests with all lengths divided; BadInput where one is still longer than a context."""
    short = lambda length: max(1, length // by)
    found = [dataclasses.replace(each, prompt=short(each.prompt), output=short(each.output)) for each in arrivals]
    longest = max(each.tokens for each in found)
    if longest > context:
        more = -(-max(each.tokens for each in arrivals) // context) + 1
        raise BadInput(f"a request has {longest} tokens, and the context {context}: shorten them, --shorten {more}")
    return found


def tokens(arrivals: Sequence[Arrival], by: int, vocab: int, seed: int) -> Iterator[list[int]]:
    """Prompts at random in which equal pieces, shortened as well, are of equal tokens, and everything else is of the request's own."""
    size = max(1, PIECE // by)
    draw = lambda count, *key: np.random.default_rng([seed, *key]).integers(1, vocab, count).tolist()
    for index, each in enumerate(arrivals):
        shared = [token for piece in each.pieces for token in draw(size, 1, piece)][: each.prompt]
        yield shared + draw(each.prompt - len(shared), 0, index)
