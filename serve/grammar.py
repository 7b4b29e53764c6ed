"""Answers after a JSON schema: which tokens may come next, by llguidance."""

import functools
import json
from collections.abc import Callable
from typing import Any

import llguidance
import numpy as np
from llguidance.numpy import fill_next_token_bitmask

from kvcascade.cache.errors import BadInput
from kvcascade.model.pretrained import Model

LONGEST = 2**16
"""Characters of a schema."""
MULTIPLE = 10_000
"""The largest `multipleOf` of a schema: the automaton has as many states."""


class Schema:
    """A row's grammar; once its text is whole only an end token is left."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab: int):
        self._matcher, self._vocab = matcher, vocab

    def allowed(self) -> np.ndarray:
        """As `request.Grammar` has it."""
        mask = np.zeros((1, -(-self._vocab // 32)), np.int32)
        fill_next_token_bitmask(self._matcher, mask)
        # One that has lost its way would let the text end: now no token is allowed, and the row ends with an error.
        return (mask[0] * (not self.lost)).view(np.uint32)

    @property
    def lost(self) -> bool:
        """Whether it cannot say any more what may come."""
        return self._matcher.is_error()

    def take(self, token: int) -> None:
        """As `request.Grammar` has it; what comes after the end is nobody's."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Grammars:
    """What makes grammars for one model's tokens."""

    def __init__(self, model: Model):
        """BadInput for a model without an end token: an answer could not end where its text is whole."""
        if not model.end:
            raise BadInput(f"{model.name} has no token that ends an answer, which a schema needs")
        self._model = model

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(self._model)), self._model.config.vocab)

    def of(self, schema: dict[str, Any] | None) -> Callable[[], Schema]:
        """What makes the grammar of a row: JSON after this schema, or any object without one. BadInput for a schema that cannot be followed."""
        text = json.dumps({"type": "object"} if schema is None else schema)
        if len(text) > LONGEST or _largest(schema) > MULTIPLE:
            raise BadInput(f"a schema has {LONGEST:,} characters at most, and no multipleOf above {MULTIPLE:,}")
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text)
        except ValueError as error:
            raise BadInput(f"the schema cannot be followed: {_line(error)}") from None
        first = llguidance.LLMatcher(self._tokenizer, grammar)
        again = first.deep_copy()
        again.compute_bitmask()
        if first.is_error() or again.is_error():
            raise BadInput(f"the schema cannot be followed: {_line(first.get_error() or again.get_error())}")
        return lambda: Schema(first.deep_copy(), self._model.config.vocab)


def _largest(schema: Any) -> float:
    """The largest multipleOf anywhere in a schema, or its inverse where that is a fraction."""
    found, left = 0.0, [schema]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            multiple = each.get("multipleOf")
            if isinstance(multiple, int | float) and multiple:
                found = max(found, float(abs(multiple)), 1 / abs(multiple))
            left += each.values()
        elif isinstance(each, list):
            left += each
    return found


def _line(words: object) -> str:
    return " ".join(str(words).split())[:300]


class _Tokens:
    """A model's tokens as llguidance asks for them: their bytes, and those that end a text."""

    def __init__(self, model: Model):
        encoding, vocab = model.encoding, model.config.vocab
        self.eos_token_id, self.bos_token_id = min(model.end), model.bos
        known = min(encoding.n_vocab, vocab)
        texts = [_bytes(encoding.decode_single_token_bytes, token) for token in range(known)]
        # What has no text is told apart by a name that no text has; llguidance takes a leading 0xff for it.
        self.tokens = [text or b"\xff<%d>" % token for token, text in enumerate([*texts, *[b""] * (vocab - known)])]
        self.special_token_ids = [token for token, text in enumerate(self.tokens) if text.startswith(b"\xff<")]
        self._encode = encoding.encode

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return list(self._encode(text, disallowed_special=()))


def _bytes(decode: Callable[[int], bytes], token: int) -> bytes:
    try:
        return decode(token)
    except KeyError:  # a number that no token has
        return b""
