"""A ranker made for the laws: networks drawn by lot, for heads of width 8."""

import functools
import tempfile
from pathlib import Path

import numpy as np

from kvcascade.cache.policies import POLICIES
from kvcascade.cache.policy import Policy
from kvcascade.cache.ranker import Networks, Ranker, Shape

WIDTH = 8
SHAPE = Shape(layers=2, kv_heads=2, width=WIDTH, value_width=WIDTH)


def networks(shape: Shape, hidden: int = 4, seed: int = 0) -> Networks:
    """Some that say of tokens something else each."""
    J, F, D = shape.networks, shape.features, hidden
    draw = lambda *size: np.random.default_rng([seed, *size]).standard_normal(size).astype(np.float32)
    return {
        "hidden": draw(J, F, D) / F**0.5,
        "hidden_bias": draw(J, D),
        "out": draw(J, D),
        "skip": draw(J, F) / F**0.5,
        "bias": draw(J),
    }


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()  # goes when the process ends


@functools.cache
def planted() -> str:
    """The path of a folder with it."""
    path = Path(_folder().name) / "ranker"
    Ranker(SHAPE, networks(SHAPE)).write(path, {})
    return str(path)


def example(name: str, among: dict[str, type[Policy]] = POLICIES) -> Policy:
    """A policy with its defaults, and with a ranker where it needs one."""
    return among[name](**{"ranker": planted()} if name == "learned" else {})
