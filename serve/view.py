"""Where each token of a conversation is, as it is told to who watches: the whole at first, and then what has changed."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kvcascade.cache.spec import CacheSpec
from kvcascade.model.pretrained import Model


def card(model: Model, spec: CacheSpec, context: int) -> dict[str, Any]:
    """What a cache is, for who looks at one: of each layer its KV heads, its tiers with the bytes of a slot of one head, and those of a token
    in full."""
    layers = []
    for layer, _, cascade, heads in spec.groups(model.config.layer_heads):
        slot = lambda index, tier, cascade=cascade, heads=heads: tier.slot_bytes(heads, len(cascade.numbers(index)))
        if layer == len(layers):
            layers.append({"heads": heads.kv, "tiers": [], "full": 2 * (heads.width + heads.value_width)})
        # Of groups of heads one after the other, as `Cache.places` numbers them.
        layers[layer]["tiers"] += [
            {"name": str(tier), "bytes": slot(index, tier)} for index, tier in enumerate(cascade.tiers)
        ]
    return {"cache": str(spec), "layers": layers, "bytes": spec.nbytes(model.config.layer_heads, context)}


class View:
    """One conversation's steps."""

    def __init__(self):
        self._places: np.ndarray | None = None
        self._told = 0

    def step(
        self, tokens: list[int], places_LKT: np.ndarray | None, token_bytes: Callable[[int], bytes]
    ) -> dict[str, Any]:
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
        texts = [token_bytes(token).decode(errors="replace") for token in tokens[self._told :]]
        self._places, self._told = places_LKT, len(tokens)
        return {"texts": texts, "layers": layers, "heads": heads, "tokens": known, "changes": changes.ravel().tolist()}
