"""An engine for caches that are not on blocks: each request has one of its own, and those that have begun take turns."""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.whole import Cache
from kvcascade.model import generate, gpt, sampling
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.programs import Compiled, traced
from kvcascade.model.sampling import NOT_A_NUMBER, Restriction, Sampling, Settings, settings
from kvcascade.serve.device import draw, likeliest, likely
from kvcascade.serve.request import Event, Grammar, Likely, Request, check, seeded

PART = 64
"""Tokens of a prompt that enter at once, each such part before the next is read."""


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("cache", "seen_BV"))
def turn(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    seen_BV: Bool[Array, "B V"],
    token_BT: Int[Array, "B T"],
    position_BT: Int[Array, "B T"],
    by: Settings,
    restrictions: sampling.Restrictions,
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, "B V"], Cache, Bool[Array, "B V"]]:
    """Put tokens of rows into their caches, and draw what follows the last of each; the results are those of `device.step`."""
    index_B = jnp.arange(len(token_BT))
    there_BT = jnp.where(position_BT < 0, seen_BV.shape[1], token_BT)
    seen_BV = seen_BV.at[index_B[:, None], there_BT].set(True, mode="drop")
    model = nnx.merge(gpt.graph(config)[0], params)
    x_BTM, cache = model.hidden(token_BT, position_BT, cache)
    x_B1M = x_BTM[index_B, position_BT.argmax(-1)][:, None]
    logits_BV = model.logits(x_B1M)[:, 0].astype(jnp.float32)
    return *draw(logits_BV, position_BT.max(-1) + 1, by, seen_BV, restrictions), logits_BV, cache, seen_BV


@dataclasses.dataclass
class Own:
    """A row, and its cache once its turn has come."""

    request: Request
    tokens: list[int]
    sampling: Sampling
    grammar: Grammar | None
    began: float = 0.0
    computed: int = 0
    cache: Cache | None = None
    seen_BV: Any = None


class Alone:
    """What `Engine` is for caches on blocks; nothing of a prompt is shared."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        spec: CacheSpec,
        rows: int,
        context: int,
        compiled: Compiled = traced,
        clock: Callable[[], float] = time.monotonic,
    ):
        """At most so many `rows` have a cache at once. BadInput for a cache that must have a prompt whole."""
        if spec.rereads:
            raise BadInput(f"{spec} reads a prompt twice, and here it enters in parts of {PART} tokens")
        generate.check_context(config, context)
        self.config, self.params, self.spec, self.clock = config, params, spec, clock
        self.rows, self.context, self.vocab = rows, context, config.vocab
        self.stats: collections.Counter[str] = collections.Counter()
        self.live: dict[int, Own] = {}
        self.running: collections.deque[int] = collections.deque()
        self.waiting: list[int] = []
        self.programs: dict[int, Callable] = {}
        self._ids, self._compiled = itertools.count(), compiled

    def submit(self, request: Request) -> list[int]:
        """As `Engine.submit`."""
        check(request, self.context, self.vocab)
        ids = list(itertools.islice(self._ids, request.continuations))
        for index, number in enumerate(ids):
            grammar = request.grammar and request.grammar()
            self.live[number] = Own(request, list(request.prompt), seeded(request.sampling, index), grammar)
        self.waiting = sorted([*self.waiting, *ids], key=lambda each: (self.live[each].request.priority, each))
        return ids

    def cancel(self, number: int) -> Event | None:
        """As `Engine.cancel`."""
        if number not in self.live:
            return None
        self._end(number)
        self.stats["cancelled"] += 1
        return Event(number, None, None, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether somebody runs or waits."""
        return bool(self.live)

    def run_step(self) -> list[Event]:
        """A part of the prompt of the row whose turn it is, or its next token."""
        while self.waiting and len(self.running) < self.rows:
            number = self.waiting.pop(0)
            own = self.live[number]
            own.cache = generate.empty_cache(self.config, self.spec, 1, self.context)
            own.began, own.seen_BV = self.clock(), jnp.zeros((1, self.vocab), bool)
            self.running.append(number)
            self.stats["begun"] += 1
        if not self.running:
            return []
        number = self.running[0]
        self.running.rotate(-1)
        own = self.live[number]
        left, prompt = len(own.tokens) - own.computed, len(own.request.prompt)
        size = PART if own.computed < prompt else 1
        found = self._run(own, own.tokens[own.computed : own.computed + size], size)
        count = min(left, size)
        own.computed += count
        self.stats.update(steps=1, tokens=count, padded=size - count)
        if count < left:
            return []
        if own.computed == prompt and own.cache:
            own.cache = own.cache.answering()
        return [self._drawn(number, own, *found)]

    def _run(self, own: Own, tokens: list[int], size: int) -> tuple[int, float, Likely]:
        token_BT, position_BT = np.zeros((1, size), np.int32), np.full((1, size), -1, np.int32)
        token_BT[0, : len(tokens)], position_BT[0, : len(tokens)] = tokens, np.arange(len(tokens)) + own.computed
        restriction = Restriction(own.grammar.allowed() if own.grammar else None, own.request.bias)
        how = settings([own.sampling], 1), sampling.restrictions([restriction], self.vocab)
        arguments = self.params, own.cache, own.seen_BV, token_BT, position_BT, *how
        if size not in self.programs:
            self.programs[size] = self._compiled(turn, self.config, *arguments)
        token_B, logprob_B, logits_BV, own.cache, own.seen_BV = self.programs[size](*arguments)
        told = likely(*(np.asarray(each)[0] for each in likeliest(logits_BV))) if own.request.likely else ()
        return int(token_B[0]), float(logprob_B[0]), told

    def _drawn(self, number: int, own: Own, token: int, logprob: float, told: Likely) -> Event:
        if token == NOT_A_NUMBER:
            event = Event(number, None, None, "error")
        else:
            request = own.request
            own.tokens.append(token)
            if own.grammar:
                own.grammar.take(token)
            over = len(own.tokens) == len(request.prompt) + request.count
            reason = "stop" if token in request.stops else "length" if over else ""
            places = own.cache.places(0, own.computed) if own.cache and request.watched else None
            event = Event(number, token, logprob, reason, told[: request.likely], own.began, 0, places)
        if event.finished:
            self._end(number)
            self.stats["over"] += 1
        return event

    def _end(self, number: int) -> None:
        del self.live[number]
        (self.running if number in self.running else self.waiting).remove(number)

    def warm(self) -> float:
        """Compile both programs and run them; the seconds that it took."""
        start = time.perf_counter()
        self.submit(Request([0] * min(PART + 1, self.context - 2), 2, likely=1))
        while self.busy:
            self.run_step()
        self.stats.clear()
        return time.perf_counter() - start

    def compiled(self) -> int:
        """How many programs there are."""
        return len(self.programs) + sum(each._cache_size() for each in (turn, likeliest))  # pyright: ignore[reportAttributeAccessIssue]
