"""The arithmetic of memory: what a decode step holds, from a model's shape and a cache's spec alone."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvcascade.cache.errors import BadInput
from kvcascade.cache.groups import Group
from kvcascade.cache.spec import CacheSpec
from kvcascade.eval.table import CONTEXT, Column, Table
from kvcascade.kernels import aot
from kvcascade.kernels.nonlinear import GATED
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig

SHARE = 0.9
"""Of a card's memory, what a program may count on.

JAX hands out 75 % of it unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise, and can be told to hand out all that is free: that is the
card's memory less the CUDA context and the libraries' own, about half a GiB, and less what the allocator cannot use between its blocks.
"""
LIMIT = 1 << 26
"""Tokens; a context that no model comes near."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a decode step holds at once: `weights` once, everything else for every row (user)."""

    weights: int
    cache: int
    logits: int
    inputs: int
    workspace: int
    alone: int
    """The workspace of a step that has one row only."""

    @property
    def row(self) -> int:
        """Bytes that one more row takes: cache + logits + inputs + workspace."""
        return self.cache + self.logits + self.inputs + self.workspace

    def work(self, rows: int) -> int:
        """Bytes of temporaries of so many rows: rows · workspace, of one `alone`."""
        return rows * self.workspace if rows > 1 else rows * self.alone

    def total(self, rows: int) -> int:
        """Bytes of so many rows: weights + rows · (cache + logits + inputs) + work."""
        return self.weights + rows * (self.row - self.workspace) + self.work(rows)

    def users(self, budget: int) -> int:
        """Rows that fit into so many bytes: ⌊(budget − weights) / row⌋, but 1 where one fits alone."""
        return max(0, (budget - self.weights) // self.row, int(self.total(1) <= budget))


def decode_step(config: ModelConfig, spec: CacheSpec, context: int) -> Memory:
    """What a decode step with a donated cache holds, for rows of up to `context` tokens.

    weights    `weights`
    cache      codes, scales, positions and numbers of every tier of every layer (`CacheSpec.nbytes`)
    logits     vocab · 2 or 4, as `dtype` says
    inputs     8 + `drawing`: a token and a position in int32, and what the next token is drawn by
    workspace  `workspace`, alone the same for one row

    BadInput for a cache on blocks.
    """
    spec.check_in_rows("the arithmetic of a decode step")
    return Memory(
        weights(config),
        spec.nbytes(config.layer_heads, context),
        config.vocab * jnp.dtype(config.dtype).itemsize,
        8 + drawing(config),
        workspace(config, spec, context),
        workspace(config, spec, context, alone=True),
    )


def full_bytes(config: ModelConfig, context: int) -> int:
    """Bytes per row of a bf16 cache of all that a query may see of the context, keys and values alone.

    Σ over layers of K · (key width + value width) · 2 · slots, and slots are the context, or a layer's window if that is less.
    """
    slots = lambda heads: min(context, heads.window or context)
    return sum(heads.kv * (heads.width + heads.value_width) * 2 * slots(heads) for heads in config.layer_heads)


def drawing(config: ModelConfig) -> int:
    """Bytes of a row's `generate.State` that its next token is drawn by: six settings, and for each token of the vocabulary whether it was there."""
    return 24 + config.vocab


def weights(config: ModelConfig) -> int:
    """Bytes of a model's parameters as they are stored.

    Matrices and embeddings 4, 2 or 1 a number as `config.weights` says, int8 with 4 more per output; norms, biases and learned positions 4.
    """
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(gpt.graph(config)[1]))


def workspace(config: ModelConfig, spec: CacheSpec, context: int, alone: bool = False) -> int:
    """Bytes of temporaries that a decode step needs for a row, as its GPU kernels have them: ranks + the widest layer's.

    ranks   Σ over layers of 4 · K · (S₀ + 1): how much each slot of the first tier, and the newcomer, deserve to stay. They depend on
            nothing that the step computes, so XLA ranks all layers' in one kernel at the start, and they live until their layer's turn.
            In a step of one row alone it does not: then it is the most of any layer.
    layer   the larger of attention, M · d + (N + 2K) · H · d + (N + 2K) · H · 4 + 4 · N · S where attention mass is collected, and of
            the MLP, M · d + matrices · F · d with d the bytes of `dtype`; S the slots of all tiers, `matrices` 3 with a gate, else 2.
            K and V go to their slots in float32, as attention's output comes from them; the logits of all slots make the mass.
    """
    number = jnp.dtype(config.dtype).itemsize
    layers = [[*found] for _, found in itertools.groupby(spec.groups(config.layer_heads), lambda group: group.layer)]

    def rank(group: Group) -> int:
        return 4 * len(group.chosen) * (group.cascade.tiers[0].slots(context, group.of.window) + 1)

    def attend(groups: Sequence[Group]) -> int:
        heads = groups[0].of
        logits = [
            each.heads.queries * sum(tier.slots(context, heads.window) for tier in each.cascade.tiers)
            for each in groups
            if each.cascade.observed
        ]
        wide = (heads.queries + heads.kv) * heads.width + heads.kv * heads.value_width
        return wide * (number + 4) + 4 * sum(logits)

    ranks = [sum(map(rank, groups)) for groups in layers]
    attention = max(map(attend, layers))
    mlp = (3 if config.activation in GATED else 2) * config.mlp * number
    return (max(ranks) if alone else sum(ranks)) + config.width * number + max(attention, mlp)


def longest(config: ModelConfig, spec: CacheSpec, budget: int) -> int | None:
    """The longest context that one user may have in so many bytes; 0 if none, None if no context is too long: the cache does not grow with it.

    A model with learned positions has no longer one than its own.
    """
    fits = lambda context: decode_step(config, spec, context).total(1) <= budget
    most = config.context if config.positions == "learned" else LIMIT
    if fits(most):
        return None if most == LIMIT else most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def budget(gpu: str, share: float = SHARE) -> int:
    """Bytes of a card that a program may count on; BadInput for a card that is not known, or a share that is none."""
    if gpu not in aot.MEMORY:
        raise BadInput(f"no GPU {gpu!r}; there are {', '.join(aot.MEMORY)}")
    if not 0 < share <= 1:
        raise BadInput(f"the share of the card's memory is {share}; it must be above 0 and at most 1")
    return int(aot.MEMORY[gpu] * share)


def table(models: dict[str, ModelConfig], specs: list[CacheSpec], contexts: list[int], gpu: str | None) -> Table:
    """Bytes of each model's weights and of each cache, and with a card how many users fit on it."""
    rows = [
        Fitted(name, config, spec, context, decode_step(config, spec, context))
        for name, config in models.items()
        for context in contexts or [config.context]
        for spec in specs
    ]
    columns = [
        Column("model", "name"), CONTEXT, Column("cache", "spec"), Column("weights, GiB", lambda row: row.held.weights / 2**30, "{:.2f}"),
        Column("bytes/token", lambda row: row.held.cache / row.context, "{:,.0f}"),
        Column("MiB/user", lambda row: row.held.cache / 2**20, "{:,.1f}"),
        Column("of bf16 K and V", lambda row: row.held.cache / full_bytes(row.config, row.context), "{:.1%}"),
        Column("step, MiB/user", lambda row: (row.held.row - row.held.cache) / 2**20, "{:,.2f}"),
    ]  # fmt: skip
    if not gpu:
        return Table.of("what a decode step holds", columns, rows)
    most = budget(gpu)
    columns += [
        Column(f"users on {gpu}", lambda row: row.held.users(most), "{:,}"),
        Column("one user's context", lambda row: _tokens(longest(row.config, row.spec, most))),
    ]
    title = f"what a decode step holds, in {SHARE:.0%} of its {aot.MEMORY[gpu] / 2**30:.1f} GiB"
    return Table.of(title, columns, rows)


class Fitted(NamedTuple):
    """A cache behind a model, and what its step holds."""

    name: str
    config: ModelConfig
    spec: CacheSpec
    context: int
    held: Memory


def _tokens(context: int | None) -> str:
    return "any" if context is None else f"{context:,}"
