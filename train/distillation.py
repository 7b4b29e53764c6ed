"""Distillation: a small GPT learns what a model would say next, on texts that the model writes itself."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.kernels.heads import capped
from kvcascade.model import chat, generate, gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.pretrained import Model
from kvcascade.model.programs import Compiled, kept
from kvcascade.model.sampling import Sampling
from kvcascade.train import loop
from kvcascade.train.config import TrainConfig

WRITTEN = 64
"""Texts that are written together."""
HEARD = 4
"""Texts that go through the model together."""
BLOCK = 512
"""Tokens whose logits are held at once."""
HEAD = 64
"""Width of the small model's heads."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is written, and how it is learned."""

    texts: int = 384
    length: int = 384
    """Tokens of each text."""
    layers: int = 2
    width: int = 256
    """Of the small model; a multiple of HEAD."""
    window: int = 256
    """Positions that it sees: no more than it learns with, so that it may go on in longer texts."""
    steps: int = 500
    batch: int = 4
    """Texts of a step."""
    learning_rate: float = 2e-3
    held_out: float = 0.125
    """The share of the texts that nothing is learned from."""
    seed: int = 0


def opening(model: Model) -> list[int]:
    """What every text begins with: the beginning of a user's turn, which a model that chats goes on from with a question and its answer
    (Magpie, Xu et al. 2024), or else BOS; BadInput for a model that has neither."""
    if model.chat_template:
        mark = "\N{WHITE SQUARE}"
        before = chat.text(model, [{"role": "user", "content": mark}]).partition(mark)[0]
        return list(model.encoding.encode(before, allowed_special="all"))
    if model.bos is None:
        raise BadInput(f"{model.name} has no chat template and no BOS that a text of its own could begin with")
    return [model.bos]


def write(
    model: Model,
    settings: Settings,
    tell: Callable[[int], None] = lambda done: None,
    compiled: Compiled = kept,
) -> Int[np.ndarray, "texts length"]:
    """Texts as the model draws them, at temperature 1; they go on whatever ends in them."""
    begin, config = opening(model), model.config
    count = settings.length - len(begin)
    if count < 2:
        raise BadInput(f"a text of {settings.length} tokens has no room behind the {len(begin)} that all begin with")
    made, rows = [], min(WRITTEN, settings.texts)
    for first in range(0, settings.texts, rows):
        cache = generate.empty_cache(config, parse("full"), rows, settings.length)
        how = Sampling(temperature=1.0, seed=settings.seed + first)
        steps = generate.generate(config, model.params, cache, [begin] * rows, count, how, compiled)
        drawn_TB = np.concatenate([tokens_nB for tokens_nB, _ in steps])
        made.append(np.concatenate([np.tile(begin, (rows, 1)), drawn_TB.T], 1))
        tell(min(first + rows, settings.texts))
    return np.concatenate(made)[: settings.texts].astype(np.int32)


def hear(
    model: Model, rows_NT: Int[np.ndarray, "N T"], tell: Callable[[int], None] = lambda done: None
) -> Float[np.ndarray, "N T M"]:
    """What the model's head is applied to in each place of texts, in bfloat16."""
    positions = jnp.broadcast_to(jnp.arange(rows_NT.shape[1]), (HEARD, rows_NT.shape[1]))

    @jax.jit
    def hidden(params, rows_BT):
        module = nnx.merge(gpt.graph(model.config)[0], params)
        return module.hidden(rows_BT, positions, None)[0].astype(jnp.bfloat16)

    found = np.empty((*rows_NT.shape, model.config.width), jnp.bfloat16)
    for first in range(0, len(rows_NT), HEARD):
        rows = np.resize(rows_NT[first : first + HEARD], (HEARD, rows_NT.shape[1]))
        found[first : first + HEARD] = np.asarray(hidden(model.params, rows))[: len(found) - first]
        tell(min(first + HEARD, len(rows_NT)))
    return found


def shape(teacher: ModelConfig, settings: Settings) -> ModelConfig:
    """A small GPT of the teacher's tokens; BadInput for a width that has no heads."""
    if settings.width % HEAD:
        raise BadInput(f"the width is {settings.width}; it must be a multiple of {HEAD}")
    heads = settings.width // HEAD
    return ModelConfig(
        layers=settings.layers, width=settings.width, heads=heads, kv_heads=heads // 2 or 1, mlp=3 * settings.width, vocab=teacher.vocab,
        context=teacher.context, activation="swiglu", window=settings.window, final_soft_cap=teacher.final_soft_cap,
    )  # fmt: skip


def begin(config: ModelConfig, head_VM: Float[Array, "V M"], seed: int) -> Params:
    """Fresh parameters, but for the embedding, which is the head too: the teacher's head along its principal directions, as many as there are."""
    params = gpt.init(config, seed)
    _, direction_MC = jnp.linalg.eigh(head_VM.T @ head_VM)
    known_VC = (head_VM @ direction_MC[:, ::-1])[:, : config.width]
    params["embed"]["weight"] = params["embed"]["weight"].at[:, : known_VC.shape[1]].set(known_VC)
    return params


class Compared(NamedTuple):
    """How far a small model is from the one that it learns from, in some places of a text: means over them."""

    divergence: Float[Array, ""]
    """The Kullback-Leibler divergence, in nats."""
    shared: Float[Array, ""]
    """The share of draws in which both agree at best: 1 - the total variation."""
    alike: Float[Array, ""]
    """The share of places in which the likeliest token is the same."""


def compare(
    x_TM: Float[Array, "T M"],
    head_VM: Float[Array, "V M"],
    wanted_TN: Float[Array, "T N"],
    head_VN: Float[Array, "V N"],
    soft_cap: float,
) -> tuple[Compared, tuple[Float[Array, "T M"], Float[Array, "V M"]]]:
    """Compare softmax(x · headᵀ) with what is wanted; also the divergence's gradients by x and by the head.

    Logits are made once, for BLOCK places at a time, so T x V numbers are never held.
    """
    T, V = len(x_TM), len(head_VM)
    count = -(-T // BLOCK)
    cut = lambda x: jnp.pad(x, ((0, count * BLOCK - T), (0, 0))).reshape(count, BLOCK, -1)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def block(dhead_VM, pair):
        x, wanted, there = pair
        raw = product("TM,VM->TV", x, head_VM)
        ours, theirs = capped(raw, soft_cap), capped(product("TN,VN->TV", wanted, head_VN), soft_cap)
        alike = ours.max(-1, keepdims=True) == jnp.where(theirs == theirs.max(-1, keepdims=True), ours, -jnp.inf)
        ours, theirs = (logits - jax.nn.logsumexp(logits, -1, keepdims=True) for logits in (ours, theirs))
        p, q = jnp.exp(theirs), jnp.exp(ours)
        found = (p * (theirs - ours)).sum(-1), jnp.minimum(p, q).sum(-1), alike.any(-1)
        back = (q - p) * there / T
        if soft_cap:
            back = back * (1 - (capped(raw, soft_cap) / soft_cap) ** 2)
        dhead_VM += product("TV,TM->VM", back, x)
        return dhead_VM, (product("TV,VM->TM", back, head_VM), [each * there[:, 0] for each in found])

    there = cut(jnp.ones((T, 1)))
    dhead_VM, (dx, found) = lax.scan(block, jnp.zeros((V, x_TM.shape[1])), (cut(x_TM), cut(wanted_TN), there))
    return Compared(*(each.sum() / T for each in found)), (dx.reshape(count * BLOCK, -1)[:T], dhead_VM)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def divergence(x_TM, head_VM, wanted_TN, head_VN, soft_cap: float) -> Float[Array, ""]:
    """The divergence of `compare`, whose gradients are made along with it."""
    return compare(x_TM, head_VM, wanted_TN, head_VN, soft_cap)[0].divergence


def _forward(x_TM, head_VM, wanted_TN, head_VN, soft_cap):
    found, gradients = compare(x_TM, head_VM, wanted_TN, head_VN, soft_cap)
    return found.divergence, gradients


def _backward(soft_cap, gradients, by):
    return *(by * each for each in gradients), None, None


divergence.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Learned:
    """A small model, and how far it is from the one that it learned from in the texts that nothing was learned from."""

    config: ModelConfig
    params: Params
    compared: Compared
    held: int
    """How many these are."""


def learn(
    model: Model,
    rows_NT: Int[np.ndarray, "N T"],
    heard_NTM: Float[np.ndarray, "N T M"],
    settings: Settings,
    tell: Callable[[int, str], None] = lambda done, words: None,
) -> Learned:
    """Train a small model to give the distributions that the teacher gives, in every place of texts but the opening."""
    config = shape(model.config, settings)
    first, held = len(opening(model)) - 1, max(1, int(len(rows_NT) * settings.held_out))
    head_VM = nnx.merge(gpt.graph(model.config)[0], model.params).head_matrix.rows()
    train = TrainConfig(
        steps=settings.steps, batch_size=settings.batch, learning_rate=settings.learning_rate, weight_decay=0.01
    )
    transform, half_VM = loop.optimizer(train), head_VM.astype(jnp.bfloat16)

    def asked(params, rows_BT, heard_BTM):
        module = nnx.merge(gpt.graph(config)[0], params)
        positions = jnp.broadcast_to(jnp.arange(rows_BT.shape[1]), rows_BT.shape)
        x_BTM, _ = module.hidden(rows_BT, positions, None)
        flat = lambda x: x[:, first:].reshape(-1, x.shape[-1])
        return flat(x_BTM), module.head_matrix.rows(), flat(heard_BTM), half_VM, config.final_soft_cap

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, rows_BT, heard_BTM):
        loss, gradient = jax.value_and_grad(lambda params: divergence(*asked(params, rows_BT, heard_BTM)))(params)
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    judge = jax.jit(lambda params, rows_BT, heard_BTM: compare(*asked(params, rows_BT, heard_BTM))[0])
    params = begin(config, head_VM, settings.seed)
    state = transform.init(params)
    draw = np.random.default_rng(settings.seed)
    for number in range(settings.steps):
        some = draw.choice(len(rows_NT) - held, settings.batch, replace=False)
        params, state, loss = step(params, state, rows_NT[some], heard_NTM[some])
        if number % 10 == 9 or number == settings.steps - 1:
            tell(number + 1, f"steps; {float(loss):.3f} nats from the model")
    places = [slice(at, at + 1) for at in range(len(rows_NT) - held, len(rows_NT))]
    means = np.mean([judge(params, rows_NT[at], heard_NTM[at]) for at in places], 0).tolist()
    return Learned(config, params, Compared(*means), held)
