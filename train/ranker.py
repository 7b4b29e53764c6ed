"""Training of a ranker: what a text's tokens got of later queries, in every head of a model, and networks that learn to say it from a token."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from kvcascade.cache import ranker
from kvcascade.cache.prompt import Prompt
from kvcascade.cache.queries import before_rope
from kvcascade.cache.ranker import Networks, Ranker, Shape
from kvcascade.kernels.heads import Heads
from kvcascade.model import generate
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params

LEAST = 16  # later queries that a token must have had to be learned from
FLOOR = 1e-2  # of the target before its logarithm: attention a hundredth of what all tokens get on the mean
ROOM = 1 << 30  # bytes of examples on the host
ROWS = 4  # windows that go through the model together
DISPATCH = 50  # steps between two moments at which the user can stop


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is learned, and how."""

    skip: int = 28
    """A token's target begins so many positions after it: before that a window of recent tokens holds it anyway."""
    horizon: int = 512
    """And ends so many after it."""
    hidden: int = 64
    """Width of a network's hidden layer."""
    steps: int = 2000
    batch: int = 256
    """Tokens of each head in a step."""
    learning_rate: float = 2e-3
    held_out: float = 0.125
    """The share of windows, those of the text's end, that nothing is learned from."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokens of J heads, as a network looks at them, and what it is to say."""

    x_JEF: Float[np.ndarray, "J E F"]
    """In float16."""
    y_JE: Float[np.ndarray, "J E"]
    windows: int
    """They are of so many windows, as many of each, one window after the other."""

    def part(self, start: int, stop: int) -> "Examples":
        """Those of some windows."""
        each = self.y_JE.shape[1] // self.windows
        cut = slice(start * each, stop * each)
        return Examples(self.x_JEF[:, cut], self.y_JE[:, cut], stop - start)

    def by_window(self, values_JE: Float[np.ndarray, "J E"]) -> Float[np.ndarray, "J windows each"]:
        """Values of the tokens, window by window."""
        return values_JE.reshape(len(values_JE), self.windows, -1)


def record(
    config: ModelConfig,
    params: Params,
    rows_BT: Int[np.ndarray, "B T"],
    settings: Settings,
    tell: Callable[[int], None] = lambda done: None,
) -> Examples:
    """Put windows through a model, a few at a time, and note of each as many tokens, drawn by lot, as there is room for; BadInput for heads
    that no ranker is for."""
    windows, T = rows_BT.shape
    shape, usable = Shape.of(config.layer_heads), T - settings.skip - LEAST + 1
    each = min(usable, 1 + ROOM // (windows * shape.networks * (2 * shape.features + 4)))
    x = np.empty((shape.layers, shape.kv_heads, windows, each, shape.features), np.float16)
    y = np.empty(x.shape[:-1], np.float32)
    draw = np.random.default_rng(settings.seed)
    positions = jnp.broadcast_to(jnp.arange(T), (ROWS, T))
    for first in range(0, windows, ROWS):
        rows = np.resize(rows_BT[first : first + ROWS], (ROWS, T))
        there = slice(first, min(first + ROWS, windows))
        chosen_BE = np.stack([np.sort(draw.choice(usable, each, replace=False)) for _ in range(ROWS)]).astype(np.int32)
        prompt = Prompt(config.layer_heads, T)
        _, prompt = generate.prefill_step(config, params, prompt, jnp.asarray(rows), positions)
        for layer, ((q, k, v, _), heads) in enumerate(zip(prompt.parts, config.layer_heads, strict=True)):
            heads = dataclasses.replace(heads, rope=heads.rope and heads.rope.at(T))
            found = _examples(q, k, v, jnp.asarray(chosen_BE), heads, settings.skip, settings.horizon)
            for whole, part in zip((x, y), found, strict=True):
                whole[layer, :, there] = np.asarray(part)[: there.stop - first].swapaxes(0, 1)
        tell(there.stop)
    joined = shape.networks, windows * each
    return Examples(x.reshape(*joined, shape.features), y.reshape(joined), windows)


@functools.partial(jax.jit, static_argnames=("heads", "skip", "horizon"))
def _examples(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKW: Float[Array, "B T K W"],
    chosen_BE: Int[Array, "B E"],
    heads: Heads,
    skip: int,
    horizon: int,
) -> tuple[Float[Array, "B K E F"], Float[Array, "B K E"]]:
    """Some tokens' features, and the logarithm of what attention they got."""
    B, T, K = k_BTKH.shape[:3]
    take = lambda x_BTKH: jnp.take_along_axis(x_BTKH, chosen_BE[:, :, None, None], 1).swapaxes(1, 2).astype(jnp.float32)
    k, v = take(k_BTKH), take(v_BTKW)
    pos_BKE = jnp.broadcast_to(chosen_BE[:, None], k.shape[:3])
    x = ranker.features(before_rope(k, pos_BKE, heads), v, pos_BKE).astype(jnp.float16)
    got_BKT = jax.vmap(functools.partial(later_attention, heads=heads, skip=skip, horizon=horizon))(q_BTNH, k_BTKH)
    got_BKE = jnp.take_along_axis(got_BKT, pos_BKE, 2)
    return x, jnp.log(jnp.maximum(got_BKE, FLOOR))


def later_attention(
    q_TNH: Float[Array, "T N H"], k_TKH: Float[Array, "T K H"], heads: Heads, skip: int, horizon: int
) -> Float[Array, "K T"]:
    """What each token of a row got of the queries from `skip` to before `horizon` positions after it: their mean, in units of what a query
    gives to a token on the mean, which later queries give less of; the mean over a group's heads. 0 where there is no such query."""
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    grouped = q_TNH.astype(jnp.float32).reshape(T, K, N // K, H)
    age_TS = jnp.arange(T)[:, None] - jnp.arange(T)
    counts_TS = (age_TS >= skip) & (age_TS < horizon)
    share_TS = counts_TS * jnp.arange(1, T + 1)[:, None] / jnp.maximum(counts_TS.sum(0), 1)

    def one(of_head):
        q_TGH, k_SH = of_head
        logits = jnp.einsum("TGH,SH->GTS", q_TGH, k_SH) * heads.scale
        weights = jax.nn.softmax(jnp.where(heads.sees(age_TS), heads.capped(logits), -jnp.inf), -1)
        return (weights.mean(0) * share_TS).sum(0)

    return lax.map(one, (grouped.swapaxes(0, 1), k_TKH.astype(jnp.float32).swapaxes(0, 1)))


def fit(
    examples: Examples,
    shape: Shape,
    settings: Settings,
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Ranker, Examples, float]:
    """Train all networks at once, by Adam with a cosine; return those of the step that did best on the held-out windows, these, and how well.

    `tell` hears after so many steps the share of the held-out variance that is not explained, the mean over the networks.
    """
    kept = examples.windows - max(1, round(settings.held_out * examples.windows))
    learned, held = examples.part(0, kept), examples.part(kept, examples.windows)
    scale = _Scale.of(learned)
    x_JEF, y_JE = jnp.asarray(learned.x_JEF), jnp.asarray(scale.target(learned.y_JE))
    held_x_JEF, held_y_JE = jnp.asarray(held.x_JEF), jnp.asarray(scale.target(held.y_JE))
    transform = optax.adam(
        optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, min(50, settings.steps - 1), settings.steps)
    )

    def loss(networks, x_JEF, y_JE):
        return ((ranker.scores(networks, scale.features(x_JEF)) - y_JE) ** 2).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(state, x_JEF, y_JE, first, stop):
        def one(step, state):
            networks, optimizer = state
            key = jax.random.fold_in(jax.random.key(settings.seed), step)
            chosen = jax.random.randint(key, (settings.batch,), 0, x_JEF.shape[1])
            gradient = jax.grad(loss)(networks, x_JEF[:, chosen], y_JE[:, chosen])
            updates, optimizer = transform.update(gradient, optimizer)
            return optax.apply_updates(networks, updates), optimizer

        return lax.fori_loop(first, stop, one, state)

    left = jax.jit(loss)
    networks = _fresh(shape, settings)
    state = networks, transform.init(networks)
    best, least = networks, np.inf
    for first in range(0, settings.steps, DISPATCH):
        stop = min(first + DISPATCH, settings.steps)
        state = steps(state, x_JEF, y_JE, first, stop)
        if (now := float(left(state[0], held_x_JEF, held_y_JE))) < least:
            best, least = jax.device_get(state[0]), now
        tell(stop, now)
    return Ranker(shape, scale.folded(best)), held, least


def _fresh(shape: Shape, settings: Settings) -> Networks:
    J, F, D = shape.networks, shape.features, settings.hidden
    keys = jax.random.split(jax.random.key(settings.seed))
    normal = lambda key, inputs, *size: jax.random.normal(key, size) / inputs**0.5
    zeros = {"hidden_bias": jnp.zeros((J, D)), "skip": jnp.zeros((J, F)), "bias": jnp.zeros(J)}
    return {"hidden": normal(keys[0], F, J, F, D), "out": normal(keys[1], D, J, D)} | zeros


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Means and standard deviations of the features and of the target: networks learn what has none, and are then made to do without."""

    mean_JF: np.ndarray
    spread_JF: np.ndarray
    mean_J: np.ndarray
    spread_J: np.ndarray

    @classmethod
    def of(cls, examples: Examples) -> "_Scale":
        wide = {"axis": 1, "dtype": np.float32}
        mean, spread = examples.x_JEF.mean(**wide), examples.x_JEF.std(**wide)
        return cls(mean, spread + 1e-6, examples.y_JE.mean(1), examples.y_JE.std(1) + 1e-6)

    def features(self, x_JEF):
        return (x_JEF.astype(jnp.float32) - self.mean_JF[:, None]) / self.spread_JF[:, None]

    def target(self, y_JE):
        return (y_JE - self.mean_J[:, None]) / self.spread_J[:, None]

    def folded(self, networks: Networks) -> Networks:
        """Networks that say the same of features as they are, in the target's own scale."""
        shift = self.mean_JF / self.spread_JF
        skip = networks["skip"] * self.spread_J[:, None]
        bias = networks["bias"] * self.spread_J + self.mean_J - (shift * skip).sum(1)
        return {
            "hidden": networks["hidden"] / self.spread_JF[:, :, None],
            "hidden_bias": networks["hidden_bias"] - np.einsum("JF,JFD->JD", shift, networks["hidden"]),
            "out": networks["out"] * self.spread_J[:, None],
            "skip": skip / self.spread_JF,
            "bias": bias,
        }
