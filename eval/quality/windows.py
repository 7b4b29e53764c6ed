"""Windows of a text that caches are scored on: spread over its documents, or the first ones."""

import dataclasses
import hashlib
from typing import Literal

import numpy as np
from jaxtyping import Int32, Integer

from kvcascade.cache.errors import BadInput

type How = Literal["spread", "first"]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Rows of as many tokens each, the same for all that is compared."""

    rows_BT: Int32[np.ndarray, "B T"]
    documents_B: Integer[np.ndarray, " B"]
    """The document that the middle of a window is in."""
    data: str
    """The text's name."""
    text: str
    """What tells the whole text's tokens from others."""
    how: How
    seed: int
    bos: bool
    """Whether each begins with BOS, which is not scored."""

    @property
    def key(self) -> str:
        """What tells these rows from others."""
        return fingerprint(self.rows_BT)

    def part(self, start: int, stop: int) -> "Windows":
        """Some of the rows, in their order."""
        return dataclasses.replace(self, rows_BT=self.rows_BT[start:stop], documents_B=self.documents_B[start:stop])


def choose(
    tokens: Integer[np.ndarray, " N"],
    starts_D: Integer[np.ndarray, " D"],
    data: str,
    context: int,
    count: int,
    how: How = "spread",
    seed: int = 0,
    bos: int | None = None,
) -> Windows:
    """Choose `count` windows of a text, each of `context` tokens, of which BOS is the first if there is one; documents begin at `starts`.

    The text is cut into windows one after the other. `first` takes the first ones. `spread` takes them in the order of a van der Corput
    sequence with a seeded offset: any number from the first on is spread evenly over the text, and 2·n windows are n and n more. Raises
    BadInput if the text has fewer.
    """
    begin = [] if bos is None else [bos]
    own = context - len(begin)
    if count < 1 or own < 1:
        raise BadInput(f"{count} windows of {context} tokens are none")
    there = len(tokens) // own
    if there < count:
        raise BadInput(f"{count} windows of {context} tokens were asked for, but the text has {there}")
    index_B = np.arange(count) if how == "first" else spread(there, seed)[:count]
    body = tokens[index_B[:, None] * own + np.arange(own)].astype(np.int32)
    rows_BT = np.concatenate([np.full((count, len(begin)), begin, np.int32), body], 1)
    documents_B = np.searchsorted(starts_D, index_B * own + own // 2, side="right") - 1
    return Windows(rows_BT, documents_B, data, fingerprint(tokens), how, seed, bos is not None)


def spread(total: int, seed: int) -> Integer[np.ndarray, " total"]:
    """The numbers below `total` in an order whose every beginning is spread evenly."""
    bits = max(1, (total - 1).bit_length())
    index = np.arange(1 << bits)
    mirrored = np.sum([((index >> bit) & 1) << (bits - 1 - bit) for bit in range(bits)], axis=0)
    places = np.asarray((mirrored / (1 << bits) + np.random.default_rng(seed).random()) % 1 * total, np.int64)
    _, first = np.unique(places, return_index=True)
    return places[np.sort(first)]


def fingerprint(tokens: np.ndarray) -> str:
    """What tells tokens from others, whatever type of integer they are kept in."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<u4").tobytes()).hexdigest()[:16]
