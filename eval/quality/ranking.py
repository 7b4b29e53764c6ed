"""How well a ranker ranks tokens that nothing was learned from, beside what needs no training."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float

from kvcascade.cache import ranker
from kvcascade.cache.ranker import Ranker
from kvcascade.eval.quality.evaluation import KEPT, PPL, against, change, protocol
from kvcascade.eval.records import Correlations, Evaluation, Ranking, Record, commits, of
from kvcascade.eval.table import CACHE, KV_BYTES, SAVED, Column, Table, markdown

SAID = ("learned", "key_norm", "position")
"""By what tokens are ranked: a ranker, minus the norm of the key, and how new they are."""


def correlations(
    found: Ranker, x_JWEF: Float[np.ndarray, "J W E F"], y_JWE: Float[np.ndarray, "J W E"]
) -> list[Correlations]:
    """For each layer the rank correlation (Spearman's) of what was said of tokens and what came, the mean over heads and windows."""
    shape = found.shape
    key_norm, position = (x_JWEF[..., at].astype(np.float32) for at in (-ranker.BESIDE, -1))
    learned = [np.asarray(ranker.scores(found.networks, jnp.asarray(x, jnp.float32))) for x in x_JWEF.swapaxes(0, 1)]
    said = zip(SAID, (np.stack(learned, 1), -key_norm, position), strict=True)
    by_layer = {name: spearman(values, y_JWE).reshape(shape.layers, -1).mean(1) for name, values in said}
    at = lambda name, layer: round(float(by_layer[name][layer]), 4)
    of_layer = lambda layer: Correlations(
        learned=at("learned", layer), key_norm=at("key_norm", layer), position=at("position", layer)
    )
    return [of_layer(layer) for layer in range(shape.layers)]


def spearman(a: Float[np.ndarray, "*B E"], b: Float[np.ndarray, "*B E"]) -> Float[np.ndarray, "*B"]:
    """The correlation of ranks along the last axis; 0 where all of one are equal."""
    ranks = [scipy.stats.rankdata(x, axis=-1) for x in (a, b)]
    x, y = (each - each.mean(-1, keepdims=True) for each in ranks)
    spread = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(spread > 0, (x * y).sum(-1) / np.maximum(spread, 1e-30), 0.0)


def mean(record: Ranking, name: str) -> float:
    """One of its correlations, the mean over layers."""
    return float(np.mean([each[name] for each in record.correlations]))


def table(record: Ranking) -> Table:
    """A row for each layer, and one for all of them."""
    rows: list[dict[str, Any]] = [{"layer": at} | each for at, each in enumerate(record.correlations)]
    rows.append({"layer": "all"} | {name: mean(record, name) for name in SAID})
    columns = [Column("layer", "layer"), *(Column(name.replace("_", " "), name, "{:.3f}") for name in SAID)]
    title = (
        f"{record.model}: rank correlation with the attention that tokens got {record.skip} to {record.horizon} positions later, in "
        f"{record.held_out} windows that nothing was learned from, of {record.windows}; {record.ranker_bytes:,} bytes of networks"
    )
    return Table.of(title, columns, rows)


def page(found: list[Record]) -> str:
    """What recorded caches gave that were ranked by a recorded ranker and without, and how well it ranks, in Markdown."""
    evaluations, first = of(found, Evaluation), of(found, Ranking)[0]
    columns = [
        CACHE,
        KEPT,
        KV_BYTES,
        SAVED._replace(name="bytes saved"),
        PPL._replace(form="{:.2f}"),
        change(evaluations),
    ]
    means = ", ".join(f"{name.replace('_', ' ')} {mean(first, name):.2f}" for name in SAID)
    about = (
        f"{first.model} in {first.weights}, {protocol(evaluations[0])}; ≈: not decided, all caches taken together. "
        f"{_beside(evaluations)}. The ranker learned from {first.windows - first.held_out} windows of {first.data.removeprefix('file:')} in "
        f"{first.steps:,} steps and has {first.ranker_bytes:,} bytes; rank correlation with what came in the {first.held_out} windows held out, the mean "
        f"over layers: {means}. {first.device}, commits {commits(evaluations)}."
    )
    return f"{markdown(Table.of('', columns, evaluations).code)}\n\n{about}"


def _beside(evaluations: list[Evaluation]) -> str:
    """Caches whose last tier a ranker ranks, each against those that differ in how that is ranked alone, at equal bytes or nearly so."""
    told = []
    for record in evaluations:
        if ranked := re.fullmatch(r"(.*\| )(learned\[[^]]*\] \d+(@\w+|))", record.cache):
            before, _, codec = (re.escape(part) for part in ranked.groups())
            others = [r for r in evaluations if re.fullmatch(rf"{before}[a-z-]+ \d+{codec}", r.cache)]
            against_each = ", ".join(f"{against(record, r)} against `{r.cache.rsplit('| ')[-1]}`" for r in others)
            told += [f"PPL with `{ranked[2]}` {against_each}"] if others else []
    return "; ".join(told)
