"""A policy that was trained: a ranker says of each token that enters what attention it will get once it is no longer recent."""

import dataclasses

import jax.numpy as jnp

from kvcascade.cache import ranker
from kvcascade.cache.policy import Place, Policy
from kvcascade.cache.queries import before_rope
from kvcascade.cache.statistic import HeadIds, Statistic


@dataclasses.dataclass(frozen=True)
class Predicted(Statistic):
    """What a ranker says of a token from its key before RoPE, its value and its position, once, when it enters."""

    ranker: str = ""

    def reads(self):
        return (HeadIds(),)

    def enter(self, new):
        networks = ranker.read(self.ranker).networks
        # All rows have the same heads; by those of one, networks are not gathered for each row. Where rows are divided among devices the
        # partitioner tells them these few numbers.
        mine = {name: jnp.asarray(array)[new.memories[0][0]] for name, array in networks.items()}
        k = before_rope(new.k_BKSH, new.pos_BKS, new.heads)
        return ranker.scores(mine, ranker.features(k, new.v_BKSW, new.pos_BKS))


@dataclasses.dataclass(frozen=True)
class Learned(Policy):
    """Keep what a trained network expects to get most attention (after KVzap, arXiv 2601.07891).

    KVzap reads the hidden state and says what KVzip+ would; this reads what a cache has of a token and says what later queries will give it,
    which KVpop (arXiv 2607.05061) learns from as well. `ranker` is a folder that `kvcascade rank` made for the model; its networks are
    parameters, and no bytes of a cache.
    """

    ranker: Place = ""

    def content(self):
        return ranker.read(self.ranker).fingerprint

    def reads(self):
        return (Predicted(ranker=self.ranker),)

    def check(self, heads):
        ranker.read(self.ranker).check(self.ranker, ranker.Shape.of(heads))
