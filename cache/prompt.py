"""A prompt, to be put into any number of caches; and a second reading of it, for the numbers that want one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.cache.codec import f32
from kvcascade.cache.groups import Vectors
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.queries import shares
from kvcascade.cache.statistic import Statistic
from kvcascade.cache.whole import Cache, put
from kvcascade.kernels.causal import causal_attention
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import attend_each, normalise
from kvcascade.kernels.slots import Codecs, Slots

SINKS = 4
"""First tokens that the queries of every part may attend to instead."""
QUERIES = 256
"""Queries whose shares are in memory at once."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["parts", "numbers"], meta_fields=["heads", "context", "rereads"]
)
@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model's layers make of whole prompts, to be put into any number of empty caches: the model goes over them once for all.

    It goes through a model's layers as a cache does.
    """

    heads: tuple[Heads, ...]
    """What the attention of each layer is."""
    context: int
    """The context of the caches."""
    rereads: tuple[Statistic, ...] = ()
    """The numbers for which it is read a second time."""
    parts: tuple[Vectors, ...] = ()
    """Of each layer that it has gone through."""
    numbers: tuple[tuple[Float[Array, "B K T"], ...], ...] = ()
    """Of each layer those that the second reading made."""

    def step(
        self,
        index: int,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKW: Float[Array, "B T K W"],
        positions_BT: Int[Array, "B T"],
        fresh: bool = True,
        written_BTK: Float[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T N W"], "Prompt"]:
        """Causal attention of rows from position 0 on, which is what any empty cache gives. Raises ValueError for a part of them."""
        if not fresh:
            raise ValueError(
                "a prompt for several caches enters whole: what a later part sees is not the same for all of them"
            )
        out_BTNW = causal_attention(q_BTNH, k_BTKH, v_BTKW, self.heads[index])
        return out_BTNW, dataclasses.replace(self, parts=(*self.parts, Vectors(q_BTNH, k_BTKH, v_BTKW, written_BTK)))

    def enter(self, cache: Cache, positions_BT: Int[Array, "B T"]) -> Cache:
        """The cache, which is donated and must be empty, with the prompts in it."""
        layers = list(cache.layers)
        none = ((),) * len(self.parts)
        for groups, part, numbers in zip(cache.of, self.parts, self.numbers or none, strict=True):
            reread = dict(zip(self.rereads, numbers, strict=True)) if numbers else {}
            for place, chosen in groups:
                some = part.of(chosen)
                own = {each: number_BKT[:, np.asarray(chosen)] for each, number_BKT in reread.items()}
                layers[place] = _enter(layers[place], positions_BT, *some, own)
        return dataclasses.replace(cache, layers=tuple(layers)).answering()

    def answering(self) -> "Prompt":
        """Itself: what goes past the tiers in front is decided where it enters."""
        return self


@functools.partial(jax.jit, donate_argnames="layer")
def _enter(layer: LayerCache, positions_BT, q_BTNH, k_BTKH, v_BTKW, written_BTK, reread) -> LayerCache:
    """One program for all layers that are alike."""
    return layer.step(q_BTNH, k_BTKH, v_BTKW, positions_BT, fresh=True, written_BTK=written_BTK, reread=reread)[1]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["prompt", "positions_BT", "start", "numbers", "gauges", "effects", "slopes"],
    meta_fields=["size"],
)
@dataclasses.dataclass(frozen=True)
class Reread:
    """A part of a prompt, from `start` on, that comes a second time after it. It goes through a model's layers as a cache does."""

    prompt: Prompt
    positions_BT: Int[Array, "B T"]
    """Of the prompt's tokens."""
    start: Int[Array, ""]
    numbers: tuple[tuple[Float[Array, "B K T"], ...], ...]
    """Of each layer; () where nothing is reckoned, and the part is read for what depends on its attention."""
    size: int
    gauges: tuple[Float[Array, "B Q"], ...] = ()
    """Of each layer zeros, whose gradient is the norm of that of what its attention adds to the residual stream."""
    effects: tuple[Float[Array, "B K G T"], ...] = ()
    """Of each layer the norm of what a token's value adds there where a query head gives it all of its attention."""
    slopes: tuple[Float[Array, "B Q"], ...] = ()
    """The gauges' gradients."""

    @property
    def context(self) -> int:
        """The context of the caches."""
        return self.prompt.context

    def step(
        self,
        index: int,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKW: Float[Array, "B T K W"],
        positions_BT: Int[Array, "B T"],
        fresh: bool = False,
        written_BTK: Float[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T N W"], "Reread"]:
        """Attention to the whole prompt and causally to the part itself. The shares are over the prompt's part, its first tokens and the
        queries' own (KVzip, §3.3)."""
        heads, (_, k, v, _) = self.prompt.heads[index], self.prompt.parts[index]
        stored = lambda x: f32.encode(x.astype(jnp.float32).swapaxes(1, 2))
        slots = lambda k, v, pos_BT: Slots(stored(k), stored(v), _per_head(pos_BT, k))
        there, own = slots(k, v, self.positions_BT), slots(k_BTKH, v_BTKW, positions_BT)
        held = [(each, Codecs(f32, f32)) for each in (there, own)]
        attention = lambda q, held: normalise(attend_each(q, positions_BT, held, heads, observed=False))[0]
        if not self.numbers:
            slots_of = lambda slots: [(each, codecs) for each, (_, codecs) in zip(slots, held, strict=True)]
            again = jax.checkpoint(lambda q, slots: attention(q, slots_of(slots)))  # what a backward pass would keep
            return again(q_BTNH, [each for each, _ in held]).astype(q_BTNH.dtype), self
        out_BTNW = attention(q_BTNH, held)

        first = min(SINKS, k.shape[1])
        cut = lambda x: lax.dynamic_slice_in_dim(x, self.start, self.size, 2)
        keys = jnp.concatenate([cut(f32.decode(there.k)), f32.decode(there.k)[:, :, :first], f32.decode(own.k)], 2)
        sinks = jnp.where(there.pos_BKS[:, :, :first] < self.start, there.pos_BKS[:, :, :first], -1)
        pos_BKS = jnp.concatenate([cut(there.pos_BKS), sinks, own.pos_BKS], 2)

        def block(numbers, part):
            q_BQNH, pos_BQ, slope_BQ = part
            q_BQKGH = q_BQNH.astype(jnp.float32).reshape(*pos_BQ.shape, keys.shape[1], -1, heads.width)
            pos_BKQ = jnp.broadcast_to(pos_BQ[:, None], (len(pos_BQ), keys.shape[1], pos_BQ.shape[1]))
            given = shares(q_BQKGH.swapaxes(1, 2), pos_BKQ, keys, pos_BKS, heads)[..., : self.size]
            felt = given * effect_BKGS[:, :, :, None] * slope_BQ[:, None, None, :, None]
            pairs = zip(self.prompt.rereads, numbers, strict=True)
            return tuple(each.reread(x, felt if each.sensitive else given) for each, x in pairs), None

        old = tuple(map(cut, self.numbers[index]))
        slope_BQ = self.slopes[index] if self.slopes else jnp.ones(positions_BT.shape)
        effect_BKGS = (
            lax.dynamic_slice_in_dim(self.effects[index], self.start, self.size, 3)
            if self.effects
            else jnp.ones((1, 1, 1, 1))
        )
        new, _ = lax.scan(block, old, (_blocks(q_BTNH, 0), _blocks(positions_BT, -1), _blocks(slope_BQ, 0)))
        # What is padding here has the number that it had.
        kept = (jnp.where(cut(there.pos_BKS) >= 0, x, y) for x, y in zip(new, old, strict=True))
        whole = zip(self.numbers[index], kept, strict=True)
        numbers = tuple(lax.dynamic_update_slice_in_dim(x, part, self.start, 2) for x, part in whole)
        return out_BTNW.astype(q_BTNH.dtype), dataclasses.replace(self, numbers=put(self.numbers, index, numbers))

    def gauged(self, index: int, out_BTM: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        """What a layer's attention adds to the residual stream, where its gradient is asked for."""
        return _gauged(out_BTM, self.gauges[index]) if self.gauges else out_BTM


@jax.custom_vjp
def _gauged(x_BTM, gauge_BT):
    """x, whatever the gauge is; the gauge's gradient is the norm of x's."""
    return x_BTM


_gauged.defvjp(
    lambda x, gauge: (x, None), lambda _, slope: (slope, jnp.linalg.norm(slope.astype(jnp.float32), axis=-1))
)


def _per_head(pos_BT, k_BTKH) -> Int[Array, "B K T"]:
    return jnp.broadcast_to(pos_BT[:, None], (len(pos_BT), k_BTKH.shape[2], pos_BT.shape[1])).astype(jnp.int32)


def _blocks(x, fill: int):
    """[B, T, …] as blocks of queries, [blocks, B, QUERIES, …]."""
    size = min(QUERIES, x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    return x.reshape(len(x), -1, size, *x.shape[2:]).swapaxes(0, 1)
