"""From a checkpoint of one attention shape to one of another: fewer KV heads, ready for uptraining."""

import dataclasses

import jax
from jaxtyping import Array, Float

from kvcascade.cache.errors import BadInput
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params

METHODS = ("mean", "first", "random")


def convert(
    config: ModelConfig, params: Params, kv_heads: int, method: str = "mean", seed: int = 0
) -> tuple[ModelConfig, Params]:
    """Reduce a model's KV heads to `kv_heads`; every other parameter stays as it is, and K = N heads stay exactly the same.

    Each new head comes from a group of neighbours, those that its query heads used before: their `mean` (GQA, Ainslie et al.
    2023, §2.1), the `first` of them, or, as a baseline, a `random` draw with the spread of the old head.
    Raises BadInput for another method, a number that does not divide the heads there are, or a model whose layers are not alike.
    """
    if method not in METHODS:
        raise BadInput(f"no method {method!r} to convert heads by; there are {', '.join(METHODS)}")
    if config.unlike:
        raise BadInput("the layers of this model have heads of several kinds, which are not pooled to one number")
    if kv_heads < 1 or config.kv_heads % kv_heads:
        raise BadInput(f"{config.kv_heads} KV heads cannot be pooled to {kv_heads}: it must divide them")
    if kv_heads == config.kv_heads:
        return config, params

    def pool(weight: Float[Array, "KH *M"], key) -> Float[Array, "kH *M"]:
        groups = weight.reshape(kv_heads, -1, config.head_dim, *weight.shape[1:])
        first = groups[:, 0]
        if method == "mean":  # around the first, so that equal heads stay exactly as they are
            pooled = first + (groups - groups[:, :1]).mean(1)
        elif method == "first":
            pooled = first
        else:
            pooled = jax.random.normal(key, first.shape) * weight.std()
        return pooled.reshape(-1, *weight.shape[1:])

    layers = {}
    for index, layer in params["layers"].items():
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
        pooled = {
            name: {part: pool(weight, key) for part, weight in layer["attention"][name].items()}
            for name, key in zip("kv", keys, strict=True)
        }
        layers[index] = layer | {"attention": layer["attention"] | pooled}
    return dataclasses.replace(config, kv_heads=kv_heads), params | {"layers": layers}
