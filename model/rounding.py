"""Weights rounded to four bits: to the nearest, or so that a calibration text's activations notice the least (GPTQ, AWQ)."""

import dataclasses
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from kvcascade.cache.errors import BadInput
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.linear import Linear, watched

METHODS = ("rtn", "gptq", "awq")
BLOCK = 128  # columns whose errors GPTQ keeps together before it spreads them over the others
DAMPING = 0.01  # of the mean of the Hessian's diagonal
POWERS = np.arange(20) / 20  # of the activations' sizes, among which AWQ looks for a scale
CLIPS = 1 - np.arange(10) / 20  # of the range of a group's weights, among which AWQ looks


@dataclasses.dataclass
class Rounded:
    """A matrix [O, I] of codes from 0 to 15: scale · (code - zero), with a scale and a zero [O, G] per group of inputs."""

    codes_OI: np.ndarray
    scale_OG: np.ndarray
    zero_OG: np.ndarray

    def dense(self) -> np.ndarray:
        """The numbers that the codes stand for."""
        O, I = self.codes_OI.shape
        grouped = self.codes_OI.reshape(O, self.scale_OG.shape[1], -1).astype(np.float32)
        return ((grouped - self.zero_OG[..., None]) * self.scale_OG.astype(np.float32)[..., None]).reshape(O, I)


def steps(
    groups: Float[np.ndarray, "*B N"], clip: Float[np.ndarray, "*B"] | float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The float16 scale and the zero, from 1 to 15, with which 16 codes span each group's numbers, or a part `clip` of their range."""
    low, high = np.minimum(groups.min(-1), 0) * clip, np.maximum(groups.max(-1), 0) * clip
    scale = np.maximum((high - low) / 15, 1e-7).astype(np.float16).astype(np.float32)
    return scale, np.clip(np.round(-low / scale), 1, 15)


def rtn(weight: Float[np.ndarray, "O I"], group: int, clip_OG: np.ndarray | float = 1.0) -> Rounded:
    """To the nearest code."""
    groups = weight.reshape(len(weight), -1, group)
    scale, zero = steps(groups, clip_OG)
    codes = np.clip(np.round(groups / scale[..., None]) + zero[..., None], 0, 15)
    return Rounded(codes.reshape(weight.shape).astype(np.uint8), scale, zero)


def gptq(weight: Float[np.ndarray, "O I"], hessian: Float[np.ndarray, "I I"], group: int) -> Rounded:
    """Column by column, each one's error made good by those to come (Frantar et al. 2022, algorithm 1)."""
    weight, hessian = weight.astype(np.float32).copy(), hessian.astype(np.float64).copy()
    O, I = weight.shape
    unused = np.diag(hessian) == 0
    hessian[unused, unused] = 1
    hessian[np.diag_indices(I)] += DAMPING * np.diag(hessian).mean()
    # The upper Cholesky factor of the inverse.
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)
    codes = np.zeros((O, I), np.uint8)
    scales, zeros = (np.zeros((O, I // group), np.float32) for _ in range(2))
    for first in range(0, I, BLOCK):
        end = min(first + BLOCK, I)
        errors = np.zeros((O, end - first), np.float32)
        for i in range(first, end):
            g = i // group
            if i % group == 0:
                # What is left for the columns of a later block, the block's errors have not reached yet.
                ahead = weight[:, i : i + group].copy()
                if i + group > end:
                    ahead[:, end - i :] -= errors @ upper[first:end, end : i + group]
                scales[:, g], zeros[:, g] = steps(ahead)
            column = weight[:, i]
            codes[:, i] = np.clip(np.round(column / scales[:, g]) + zeros[:, g], 0, 15)
            error = (column - (codes[:, i] - zeros[:, g]) * scales[:, g]) / upper[i, i]
            weight[:, i + 1 : end] -= np.outer(error, upper[i, i + 1 : end])
            errors[:, i - first] = error
        weight[:, end:] -= errors @ upper[first:end, end:]
    return Rounded(codes, scales, zeros)


def loss(change: Float[np.ndarray, "O I"], hessian: Float[np.ndarray, "I I"]) -> float:
    """The squared error of the products with the calibration's inputs, by which a change of the matrix is felt."""
    return float(np.einsum("oi,oi->", change @ hessian, change))


def awq_scale(
    weights: list[np.ndarray], hessian: np.ndarray, mean_I: Float[np.ndarray, " I"], group: int
) -> np.ndarray:
    """What columns are multiplied by before they are rounded, and inputs divided by (Lin et al. 2023, §3.2): a power of the inputs' sizes."""

    def cost(scale: np.ndarray) -> float:
        return sum(loss(rtn(weight * scale, group).dense() / scale - weight, hessian) for weight in weights)

    found = []
    for power in POWERS:
        scale = np.maximum(mean_I, 1e-6) ** power
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        found.append((cost(scale), float(power), scale))
    return min(found, key=lambda each: each[:2])[2]


def awq_clip(weight: Float[np.ndarray, "O I"], hessian: np.ndarray, group: int) -> Float[np.ndarray, "O G"]:
    """The part of each group's range that is spanned, so that the group's own products err the least (Lin et al. 2023, §3.3 of its code)."""
    O, I = weight.shape
    groups = weight.reshape(O, -1, group)
    blocks = np.stack([hessian[i : i + group, i : i + group] for i in range(0, I, group)])
    costs = []
    for clip in CLIPS:
        change = (rtn(weight, group, clip).dense().reshape(groups.shape) - groups).astype(np.float32)
        costs.append(np.einsum("ogi,gij,ogj->og", change, blocks, change, optimize=True))
    return CLIPS[np.argmin(costs, 0)].astype(np.float32)


def quantize(
    config: ModelConfig,
    params: Params,
    rows: Int[np.ndarray, "B T"],
    method: str,
    group: int,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Params, dict[str, Rounded]]:
    """A model whose layers' matrices are rounded, in float32, and by path the codes.

    The rows, a calibration text, go through the model once; each matrix is rounded as they reach it, so that later ones see what the
    earlier ones' rounding did. Raises BadInput for models whose matrices do not fit into whole groups, or of several experts.
    """
    if method not in METHODS:
        raise BadInput(f"no method {method!r}; there are {', '.join(METHODS)}")
    if config.experts or config.weights != "float32":
        raise BadInput("only a model in float32, without experts, can be rounded")
    model = nnx.merge(gpt.graph(config)[0], params)
    names = dict(_linears(model))
    for linear, name in names.items():
        if linear.inputs % group or linear.weight.shape[0] % 8:
            raise BadInput(
                f"{name} has {linear.weight.shape[0]} x {linear.inputs} weights; groups of {group} do not fit"
            )
    found: dict[str, Rounded] = {}
    befores = {id(block.attention.q): block.attention_norm for block in model.layers}
    befores |= {id(block.up): block.mlp_norm for block in model.layers}
    befores |= {id(block.down): block.up for block in model.layers if hasattr(block, "gate")}

    def see(x, linears: tuple[Linear, ...]):
        weights = [np.asarray(each.weight[...]) for each in linears]
        flat = np.asarray(x, np.float32).reshape(-1, x.shape[-1])
        hessian = flat.T @ flat if method != "rtn" else np.zeros((0, 0))
        if method == "awq" and (before := befores.get(id(linears[0]))):
            scale = awq_scale(weights, hessian, np.abs(flat).mean(0), group)
            weights = [weight * scale for weight in weights]
            hessian /= np.outer(scale, scale)
            x = x / scale
            _divide(before, scale, found.get(names.get(before, "")))
        for linear, weight in zip(linears, weights, strict=True):
            if method == "gptq":
                rounded = gptq(weight, hessian, group)
            else:
                rounded = rtn(weight, group, awq_clip(weight, hessian, group) if method == "awq" else 1.0)
            found[names[linear]] = rounded
            linear.weight[...] = jnp.asarray(rounded.dense())
            report(len(found), len(names))
        return x

    with watched(see):
        model.hidden(jnp.asarray(rows), jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape), None)
    return nnx.to_pure_dict(nnx.state(model)), found


def _divide(before, scale: np.ndarray, rounded: Rounded | None) -> None:
    """Let what an input comes from give it divided: a norm, or the rows of a matrix that is rounded already, whose codes stay."""
    if rounded is None:
        before.scale[...] = before.scale[...] / scale
        if getattr(before, "bias", None) is not None:
            before.bias[...] = before.bias[...] / scale
        return
    rounded.scale_OG[...] = (rounded.scale_OG / scale[:, None]).astype(np.float16)
    before.weight[...] = jnp.asarray(rounded.dense())
    if before.added is not None:
        before.bias[...] = before.bias[...] / scale


def _linears(model) -> Iterator[tuple[Linear, str]]:
    """The layers' Linears with their paths."""
    for index, block in enumerate(model.layers):
        for part in ("attention.q", "attention.k", "attention.v", "attention.o", "gate", "up", "down"):
            owner = block.attention if part.startswith("attention.") else block
            if linear := getattr(owner, part.removeprefix("attention."), None):
                yield linear, f"layers.{index}.{part}"
