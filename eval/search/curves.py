"""What each KV head of a model loses behind a cascade: the cascade alone goes over what was recorded of the model, not the model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.cache.groups import Vectors
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.prompt import Prompt
from kvcascade.cache.spec import CacheSpec
from kvcascade.eval.measure import Job
from kvcascade.eval.quality.windows import Windows
from kvcascade.eval.records import Curve
from kvcascade.eval.table import brief
from kvcascade.kernels.loss import token_nll
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.pretrained import Model

ROWS = 4
"""Windows that go through the model together."""


class Recorded(NamedTuple):
    """Of one layer: what its attention was about, what it gave, and the gradient of all tokens' nats with respect to that."""

    vectors: Vectors
    out_BTNW: Float[Array, "B T N W"]
    slope_BTNW: Float[Array, "B T N W"]

    def of(self, chosen: Sequence[int]) -> "Recorded":
        """Of some KV heads, and of the query heads that read them."""
        queries = lambda x: self.vectors._replace(q_BTNH=x).of(chosen).q_BTNH
        return Recorded(self.vectors.of(chosen), queries(self.out_BTNW), queries(self.slope_BTNW))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parts", "numbers", "taps", "outs"],
    meta_fields=["heads", "context", "rereads"],
)
@dataclasses.dataclass(frozen=True)
class Tapped(Prompt):
    """A prompt with something added to what each layer's attention gives: zeros, whose gradient is that of what it gives."""

    taps: tuple[Float[Array, "B T N W"], ...] = ()
    outs: tuple[Float[Array, "B T N W"], ...] = ()

    def step(self, index, q_BTNH, k_BTKH, v_BTKW, positions_BT, fresh=True, written_BTK=None):
        """`Prompt.step`, and what was tapped."""
        out_BTNW, after = super().step(index, q_BTNH, k_BTKH, v_BTKW, positions_BT, fresh, written_BTK)
        return out_BTNW + self.taps[index], dataclasses.replace(after, outs=(*self.outs, out_BTNW))


def jobs(model: Model, specs: Sequence[CacheSpec], windows: Windows) -> list[Job[Curve]]:
    """A measurement for each spec; what the model's attention is about is found by the first that runs."""

    @functools.cache
    def recorded() -> list[list[Recorded]]:
        return record(model.config, model.params, windows.rows_BT)

    def job(spec: CacheSpec) -> Job[Curve]:
        about: dict[str, Any] = {
            "kind": "curve", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint, "cache": str(spec),
            "rows": windows.key, "context": windows.rows_BT.shape[1],
        } | spec.content  # fmt: skip

        def run() -> list[Curve]:
            found = errors(model.config, spec, recorded())
            rounded = lambda errors_LK: [[float(f"{x:.6g}") for x in row] for row in errors_LK]
            return [Curve(**about, nats=rounded(found.nats_LK), squares=rounded(found.squares_LK))]

        return Job(about, "eval/search", run, brief(str(spec)))

    return [*map(job, specs)]


def record(config: ModelConfig, params: Params, rows_BT: Int[np.ndarray, "B T"]) -> list[list[Recorded]]:
    """Put windows through a model, a few at a time: of each few its layers."""
    return [
        _record(config, params, jnp.asarray(rows_BT[first : first + ROWS])) for first in range(0, len(rows_BT), ROWS)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _record(config: ModelConfig, params: Params, rows_BT) -> list[Recorded]:
    inputs_BT, targets_BT = rows_BT[:, :-1], rows_BT[:, 1:]
    B, T = inputs_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    model = nnx.merge(gpt.graph(config)[0], params)

    def nats(taps):
        tapped = Tapped(config.layer_heads, T, taps=taps)
        x_BTM, tapped = model.hidden(inputs_BT, positions_BT, tapped, fresh=True)
        head_VM = model.head_matrix.rows().astype(config.dtype)
        x = x_BTM.reshape(-1, config.width).astype(config.dtype)
        return token_nll(x, head_VM, targets_BT.reshape(-1), config.final_soft_cap).sum(), tapped

    zeros = tuple(jnp.zeros((B, T, heads.queries, heads.value_width)) for heads in config.layer_heads)
    slopes, tapped = jax.grad(nats, has_aux=True)(zeros)
    return [Recorded(*each) for each in zip(tapped.parts, tapped.outs, slopes, strict=True)]


class Errors(NamedTuple):
    """By layer and KV head, a token's mean: of what attention gave too much or too little."""

    nats_LK: Float[np.ndarray, "L K"]
    """Half the square of what it changes the loss by to first order: what the loss rises by to second order, with the empirical Fisher
    information in the place of the second derivative, and as if no other head erred (Hassibi & Stork 1993, eq. 1)."""
    squares_LK: Float[np.ndarray, "L K"]
    """Its square, times the layer's mean squared gradient."""


def errors(
    config: ModelConfig,
    spec: CacheSpec,
    recorded: Sequence[Sequence[Recorded]],
) -> Errors:
    """What each head of each layer loses behind a spec, token by token, as an evaluation goes."""
    groups, tokens = spec.groups(config.layer_heads), 0
    heads = max(each.kv for each in config.layer_heads)
    found = np.zeros((2, config.layers, heads))
    for layers in recorded:
        B, T = layers[0].out_BTNW.shape[:2]
        tokens += B * T
        some = []
        for group, bases in zip(groups, spec.bases(groups), strict=True):
            cache = LayerCache.empty(group.cascade, B, group.heads, T, group.ids, bases)
            weight = (layers[group.layer].slope_BTNW ** 2).mean()
            some.append(_replayed(cache, *layers[group.layer].of(group.chosen), weight))
        for group, errors in zip(groups, jax.device_get(some), strict=True):
            found[:, group.layer, group.chosen] += errors
    # Each spec has programs of its own, and a process has room for some ten thousand pieces of code.
    _replayed.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    return Errors(*found / tokens)


@jax.jit
def _replayed(cache: LayerCache, vectors: Vectors, out_BTNW, slope_BTNW, weight) -> Float[Array, "2 K"]:
    B, T, N, W = out_BTNW.shape
    by_head = lambda x_BN: x_BN.reshape(B, cache.heads.kv, -1).sum((0, 2))

    def one(carry, token):
        cache, found = carry
        t, out_BNW, slope_BNW, *some = token
        q, k, v, written = (None if x is None else x[:, None] for x in some)
        got_BTNW, cache = cache.step(q, k, v, jnp.full((B, 1), t), written_BTK=written)
        missed_BNW = got_BTNW[:, 0] - out_BNW
        first_BK = (missed_BNW * slope_BNW).sum(-1).reshape(B, cache.heads.kv, -1).sum(-1)
        found += jnp.stack([0.5 * (first_BK**2).sum(0), weight * by_head((missed_BNW**2).sum(-1))])
        return (cache, found), None

    first = lambda x: None if x is None else jnp.moveaxis(x, 1, 0)
    tokens = (jnp.arange(T), *map(first, (out_BTNW, slope_BTNW, *vectors)))
    (_, found), _ = lax.scan(one, (cache, jnp.zeros((2, cache.heads.kv))), tokens)
    return found
