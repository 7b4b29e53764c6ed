"""How likely a prompt's own tokens are, for who asks to have it echoed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.serve.answers import Told
from kvcascade.serve.device import likely
from kvcascade.serve.request import TOP

ROWS = 128
"""Tokens whose logits are in memory at once."""


@functools.partial(jax.jit, static_argnames="config")
def scores(
    config: ModelConfig, params: Params, token_T: Int[Array, " T"]
) -> tuple[Float[Array, " T"], Float[Array, "T N"], Int[Array, "T N"]]:
    """Of each token but the first the log-probability after those before it, and the likeliest ones in its place; T is a multiple of ROWS."""
    model = nnx.merge(gpt.graph(config)[0], params)
    x_1TM, _ = model.hidden(token_T[None], jnp.arange(len(token_T))[None], None)

    def some(part):
        x_RM, next_R = part
        logprob_RV = jax.nn.log_softmax(model.logits(x_RM[None])[0].astype(jnp.float32))
        return jnp.take_along_axis(logprob_RV, next_R[:, None], 1)[:, 0], *jax.lax.top_k(
            logprob_RV, min(TOP, config.vocab)
        )

    parts = x_1TM.reshape(-1, ROWS, x_1TM.shape[-1]), jnp.roll(token_T, -1).reshape(-1, ROWS)
    return jax.tree.map(lambda x: x.reshape(len(token_T), *x.shape[2:]), jax.lax.map(some, parts))


def score(config: ModelConfig, params: Params, prompt: list[int], count: int) -> list[Told]:
    """What is told of a prompt's tokens: of the first nothing, of the others with so many of the likeliest."""
    size = max(ROWS, 1 << (len(prompt) - 1).bit_length())
    padded = np.zeros(size, np.int32)
    padded[: len(prompt)] = prompt
    logprob_T, top_TN, token_TN = map(np.asarray, scores(config, params, jnp.asarray(padded)))
    rows = zip(prompt[1:], logprob_T.tolist(), top_TN, token_TN, strict=False)
    return [
        Told(prompt[0], None, ()),
        *(Told(token, each, likely(top, some)[:count]) for token, each, top, some in rows),
    ]
