"""Where each token of a conversation is, as it is told to who watches: the whole at first, and then what has changed."""

from typing import Any

import numpy as np

from kvcascade.serve.answers import Form


class View:
    """One conversation's steps."""

    def __init__(self):
        self._places: np.ndarray | None = None
        self._told = 0

    def step(self, tokens: list[int], places_LKT: np.ndarray | None, form: Form) -> dict[str, Any]:
        """The texts of new tokens, the shape of the places, and those that have changed: a layer, a head, a position and its tier, one after
        the other. Of a cache on blocks every token but the newest is in the one tier."""
        known = len(tokens) - 1  # the newest is not in the cache yet
        if places_LKT is None:
            places_LKT = np.zeros((1, 1, known), np.int8)
        layers, heads, _ = places_LKT.shape
        before = np.full(places_LKT.shape, -2, np.int8)
        if self._places is not None:
            before[..., : self._places.shape[2]] = self._places
        layer, head, position = np.nonzero(places_LKT != before)
        changes = np.stack([layer, head, position, places_LKT[layer, head, position]], 1)
        texts = [form.token_bytes(token).decode(errors="replace") for token in tokens[self._told :]]
        self._places, self._told = places_LKT, len(tokens)
        return {"texts": texts, "layers": layers, "heads": heads, "tokens": known, "changes": changes.ravel().tolist()}
