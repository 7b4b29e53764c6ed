"""Caches as if rows of given lengths had gone through them, every byte written: what a crash test runs on."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvcascade.cache.block_cache import BlockCache, limit
from kvcascade.cache.cascade import Cascade
from kvcascade.cache.errors import BadInput
from kvcascade.cache.groups import Group
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.tier import BLOCK
from kvcascade.cache.whole import Cache
from kvcascade.kernels.pages import Pool
from kvcascade.kernels.slots import Slots, payload
from kvcascade.model.config import ModelConfig


def lengths_of(requests: Sequence[int] | None, users: int, context: int, steps: int) -> list[int]:
    """The tokens of each user: the context, or those of requests that fit into it, from the first on and again."""
    if requests is None:
        return [context] * users
    found = [length for length in requests if steps < length <= context]
    if not found:
        raise BadInput(f"no request of the trace has more than {steps} and at most {context} tokens")
    return list(itertools.islice(itertools.cycle(found), users))


def predicted(spec: CacheSpec, config: ModelConfig, context: int, lengths: Sequence[int]) -> int:
    """Bytes of a cache for rows of these lengths: all that `context` tokens take, but for blocks that they do not need."""
    groups = spec.groups(config.layer_heads)
    on_blocks = sum(tier.nbytes(context, each.of, 0) * each.of.kv for each in groups if (tier := each.cascade.shared))
    most, *counts = blocks(spec, config, context, [context, *lengths])
    spared = len(lengths) * most - sum(counts)
    return len(lengths) * spec.nbytes(config.layer_heads, context) - spared * on_blocks // max(1, most)


def blocks(spec: CacheSpec, config: ModelConfig, context: int, lengths: Sequence[int]) -> list[int]:
    """The blocks of rows of these lengths, in a cache for a context."""
    most = limit(spec.groups(config.layer_heads), context)
    return [-(-min(length, most) // BLOCK) for length in lengths]


def room(cache: Cache, users: int) -> int:
    """Tokens that there is room for, in the layer that has most."""
    own = [users * layer.kept for layer in cache.layers]
    if not isinstance(cache, BlockCache):
        return max(own)
    on_blocks = [len(payload(cache.pools[each.pool].k)) * BLOCK if each else 0 for each in cache.shared]
    return max(
        count + sum(own[place] for place, _ in shares) for count, shares in zip(on_blocks, cache.of, strict=True)
    )


def occupied(spec: CacheSpec, config: ModelConfig, context: int, lengths: Sequence[int], steps: int) -> Cache:
    """A cache that rows of these lengths have gone through, but for their last `steps` tokens; of blocks as many as they need."""
    batch, tokens_B11 = len(lengths), jnp.asarray(lengths)[:, None, None] - steps

    def spread(codec, width: int, shape: tuple[int, ...]):
        # Encoding one vector and spreading its codes: encoding them all would need room for them in float32.
        one = codec.encode(jnp.sin(jnp.arange(1.0, width + 1)))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*shape, x.shape[-1])), one)

    def layer(group: Group, cascade: Cascade, first: int) -> LayerCache:
        held, heads = [], group.heads
        for number, tier in enumerate(cascade.tiers):
            shape = (batch, heads.kv, tier.slots(context, heads.window))
            pos_S = first + jnp.arange(shape[-1])
            first += shape[-1]
            k, v = spread(tier.codecs.k, heads.width, shape), spread(tier.codecs.v, heads.value_width, shape)
            pos_BKS = jnp.broadcast_to(jnp.where(pos_S < tokens_B11, pos_S, -1), shape)
            held.append(Slots(k, v, pos_BKS, tuple(jnp.ones(shape) for _ in cascade.numbers(number))))
        memories = tuple(each.init(batch, heads, group.ids) for each in cascade.memories)
        return LayerCache(cascade, heads, context, tuple(held), memories, of_groups[group][-len(held) :])

    groups = spec.groups(config.layer_heads)
    of_groups = dict(zip(groups, spec.bases(groups), strict=True))
    if not spec.on_blocks:
        return Cache.of_groups(groups, (layer(each, each.cascade, 0) for each in groups))
    counts = blocks(spec, config, context, lengths)
    cache = BlockCache.empty(groups, batch, context, sum(counts), bases=spec.bases(groups))
    table, free = np.full(cache.table_RW.shape, -1, np.int32), itertools.count()
    for row, count in enumerate(counts):
        table[row, :count] = list(itertools.islice(free, count))
    pools = list(cache.pools)
    for each in filter(None, cache.shared):
        shape = (*payload(pools[each.pool].k).shape[:2], each.heads.kv, BLOCK)
        k, v = spread(each.codecs.k, each.heads.width, shape), spread(each.codecs.v, each.heads.value_width, shape)
        pools[each.pool] = Pool(k, v)
    first = limit(groups, context)
    beside = tuple(
        layer(each, own, first if each.cascade.shared else 0) for each in groups if (own := each.cascade.own)
    )
    return dataclasses.replace(cache, layers=beside, pools=tuple(pools), table_RW=jnp.asarray(table))
