"""How requests become rows of an engine, and rows become answers, whole or as a stream; the routes are in `api.py`."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from kvcascade.cache.spec import CacheSpec
from kvcascade.model import chat, tokenizer
from kvcascade.model.pretrained import Model
from kvcascade.serve import request as engine
from kvcascade.serve.answers import Choice, Form, Json, Told, usage
from kvcascade.serve.guard import Rules
from kvcascade.serve.metrics import Heard, Metrics
from kvcascade.serve.request import Event
from kvcascade.serve.score import score
from kvcascade.serve.view import View
from kvcascade.serve.visible import Visible
from kvcascade.serve.wire import Asked, Chat, Completion, Refused
from kvcascade.serve.worker import Worker

BEHIND = 16
"""Events that a client may be behind before it is not told any more where tokens were at each step."""
LATE = np.zeros((0, 0, 0), np.int8)


class Failed(Refused):
    """The engine cannot answer."""

    def __init__(self, message: str, status: int = 500):
        super().__init__(message, status, kind="server_error")


@dataclasses.dataclass
class Rows:
    """The rows of a request while they run: of each choice's its number in the engine, and what is heard of all."""

    name: str
    tenant: str
    count: int
    """How many were counted in."""
    ids: dict[int, int] = dataclasses.field(default_factory=dict)
    heard: dict[int, Heard] = dataclasses.field(default_factory=dict)
    events: "asyncio.Queue[tuple[int, Event | Exception]]" = dataclasses.field(default_factory=asyncio.Queue)


class Stream(StreamingResponse):
    """A stream after which its rows are taken out, also where nobody has begun to read it."""

    def __init__(self, content: AsyncIterator[str], close: Callable[[], None]):
        super().__init__(
            content, media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        self._close = close

    async def __call__(self, scope, receive, send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


class Server:
    """A model behind caches, and how it answers."""

    def __init__(
        self,
        model: Model,
        specs: Sequence[CacheSpec],
        worker: Worker,
        metrics: Metrics,
        rules: Rules,
        context: int,
        name: str = "",
        points: Sequence[Json] = (),
    ):
        self.model, self.worker, self.metrics, self.rules, self.context = model, worker, metrics, rules, context
        self.specs = {str(spec): spec for spec in specs}
        self.name = name or model.name
        self.created = int(time.time())
        self.draining = False
        self.points = list(points)
        self.open: dict[str, int] = {}
        """Rows of each tenant that run or wait."""
        self._texts = ThreadPoolExecutor(1, "texts")  # a tokeniser is not for two threads at once
        self._schemas = ThreadPoolExecutor(1, "schemas")  # one may take seconds to compile
        self._special = tokenizer.special_texts(model.encoding)

    # What a request is made of

    async def texts[R](self, work: Callable[[], R]) -> R:
        """Have something done with the tokeniser."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, work)

    def conversation(self, messages: Sequence) -> list[int]:
        """The tokens of a conversation. Refused where a message has the text of a special token, by which it could speak for another."""
        for index, message in enumerate(messages):
            for special in self._special:
                if special in message.text:
                    words = f"messages[{index}] contains {special!r}, which tells this model where a message ends"
                    raise Refused(words, code="special_token", param="messages")
        role = lambda each: "system" if each.role == "developer" else each.role
        return chat.encode(self.model, [{"role": role(each), "content": each.text} for each in messages])

    def numbers(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a prompt."""
        return self.model.encode(prompt) if isinstance(prompt, str) else prompt

    def cache(self, asked: str | None) -> str:
        """The engine that a request is for: the first one, or the one that it names."""
        if asked is None:
            return next(iter(self.specs))
        if (name := " ".join(asked.split())) not in self.specs:  # read as text alone: a spec may name a file
            raise Refused(
                f"the cache {name!r} is not served; there are {', '.join(map(repr, self.specs))}", param="cache"
            )
        return name

    def known(self, name: str | None) -> None:
        """Refused for another model."""
        if name not in (None, self.name):
            raise Refused(f"there is no model {name!r}, only {self.name!r}", 404, "model_not_found", "model")

    def request(self, asked: Chat | Completion, prompt: list[int], count: int, tenant: str, grammar) -> engine.Request:
        """What the engine is asked."""
        stops = frozenset() if asked.ignore_eos else self.model.end
        retention, salt = tuple(each.retention() for each in asked.retention), json.dumps([tenant, asked.cache_salt])
        how = asked.sampling(), asked.n, stops, asked.priority, retention, salt, asked.likely or 0, asked.bias
        return engine.Request(prompt, count, *how, grammar, asked.speculate, asked.watch)

    def grammar(self, asked: Asked):
        """What makes the grammar of each row, where the answer must be JSON."""
        if asked.response_format is None or asked.response_format.type == "text":
            return None
        schema = asked.response_format.json_schema
        return self._grammars.of(schema.schema_ if schema else None)

    @functools.cached_property
    def _grammars(self):
        from kvcascade.serve.grammar import Grammars

        return Grammars(self.model)

    # Rows

    def admit(self, name: str, tenant: str, count: int) -> Rows:
        """Count rows in; Refused where there are too many."""
        total, mine = sum(self.open.values()), self.open.get(tenant, 0)
        if self.draining or not self.worker.ready.is_set():
            self.metrics.refuse("draining")
            raise Failed("the server is not ready, or is about to end", 503)
        for there, most, words, reason in (
            (total, self.rules.queue, "the server has", "queue"),
            (mine, self.rules.per_key, "your key has", "per_key"),
        ):
            if count > most:
                raise Refused(f"a request has {most} answers at most", param="n")
            if there + count > most:
                self.metrics.refuse(reason)
                words = f"{words} {there} answers of at most {most} already"
                raise Refused(words, 429, "rate_limit_exceeded", kind="rate_limit_error")
        self.open[tenant] = mine + count
        return Rows(name, tenant, count)

    async def begin(self, rows: Rows, requests: Sequence[engine.Request]) -> None:
        """Give requests to their engine."""
        loop, arrival = asyncio.get_running_loop(), time.monotonic()

        def hearer(asked: engine.Request, index: int, first: bool):
            count = self.metrics.heard(rows.name, arrival, len(asked.prompt) if first else 0)
            rows.heard[index] = count

            def hear(event: Event | Exception) -> None:
                if isinstance(event, Event):
                    count(event)
                    if rows.events.qsize() > BEHIND and event.places is not None and not event.finished:
                        event = event._replace(places=LATE)  # whoever reads so slowly is not told of every step
                with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                    loop.call_soon_threadsafe(rows.events.put_nowait, (index, event))

            return hear

        for place, asked in enumerate(requests):
            indices = [place * asked.continuations + row for row in range(asked.continuations)]
            future = self.worker.submit(
                rows.name, asked, [hearer(asked, index, index == indices[0]) for index in indices]
            )
            try:
                numbers = await asyncio.wrap_future(future)
            except asyncio.CancelledError:  # it may be in the engine all the same
                leave = lambda done: (
                    done.cancelled() or done.exception() or self.worker.cancel(rows.name, done.result())
                )
                future.add_done_callback(leave)
                raise
            rows.ids |= zip(indices, numbers, strict=True)

    def close(self, rows: Rows) -> None:
        """Take out what still runs, and count the rows out; once."""
        if rows.ids:
            self.worker.cancel(rows.name, [*rows.ids.values()])
            for index in rows.ids:
                rows.heard[index].end("cancelled")
            rows.ids.clear()
        self.open[rows.tenant] -= rows.count
        rows.count = 0

    # Answers

    async def answer(
        self, http: Request, asked: Chat | Completion, prompts: Sequence[list[int]], chatty: bool
    ) -> Response:
        """All prompts' answers, at once or as a stream."""
        name = self.cache(asked.cache)
        found = self.worker.engines.get(name)
        if asked.retention and not (found and found.blocks.limit):
            raise Refused("nothing is kept for others behind a cache that is not on blocks", param="retention")
        counts = [self.room(prompt, asked.count, "messages" if chatty else "prompt") for prompt in prompts]
        http.state.told |= {"cache": name, "prompt_tokens": sum(map(len, prompts))}
        rows = self.admit(name, http.state.tenant, asked.n * len(prompts))
        form = Form(chatty, self.name, asked.likely, self.model.encoding.decode_single_token_bytes)
        try:
            grammar = await asyncio.get_running_loop().run_in_executor(self._schemas, self.grammar, asked)
            pairs = zip(prompts, counts, strict=True)
            requests = [self.request(asked, *pair, http.state.tenant, grammar) for pair in pairs if pair[1]]
            await self.begin(rows, requests)
            if asked.stream:
                return Stream(self.stream(http, asked, form, prompts, rows), lambda: self.close(rows))
            found = await self.whole(http, asked, form, prompts, rows)
        except BaseException:
            self.close(rows)
            raise
        self.close(rows)
        return JSONResponse(found)

    def room(self, prompt: list[int], count: int | None, param: str) -> int:
        """How many tokens are generated at most; Refused where prompt and answer do not fit, and for tokens that are none."""
        room = self.context - len(prompt)
        wanted = room if count is None else count
        if not prompt:
            raise Refused("the prompt is empty", param=param)
        if not (0 if count == 0 else 1) <= wanted <= room:
            words = f"{len(prompt)} tokens of prompt and {max(wanted, 1)} to generate do not fit into a context of {self.context}"
            raise Refused(words, code="context_length_exceeded", param=param)
        if not all(0 <= token < self.model.config.vocab for token in prompt):
            raise Refused(f"a prompt's tokens are numbers from 0 to {self.model.config.vocab - 1}", param=param)
        return wanted

    def choices(self, asked: Asked, form: Form, prompts: Sequence) -> list[Choice]:
        """The answers of all prompts, empty."""
        make = lambda index: Choice(index, Visible(form.token_bytes, asked.stops))
        return [make(index) for index in range(asked.n * len(prompts))]

    async def whole(self, http: Request, asked: Chat | Completion, form: Form, prompts, rows: Rows) -> Json:
        """The answer to a request that is no stream."""
        choices, before = self.choices(asked, form, prompts), []
        if not rows.ids:  # nothing is generated
            for choice in choices:
                choice.reason = "length"
        async with asyncio.timeout(self.rules.timeout):
            for prompt in prompts if isinstance(asked, Completion) and asked.echo else ():
                told: list[Told] = []
                if asked.likely is not None:
                    ask = lambda prompt=prompt: score(self.model.config, self.model.params, prompt, asked.likely or 0)
                    told = await asyncio.wrap_future(self.worker.ask(ask, slow=True))
                before += [(await self.texts(lambda prompt=prompt: self.model.encoding.decode(prompt)), told)] * asked.n
                if await http.is_disconnected():
                    raise Gone
            async with contextlib.aclosing(self.each(http, choices, rows)) as events:
                async for choice, event in events:
                    choice.add(event)
        used = usage(sum(map(len, prompts)), choices, asked.n)
        http.state.told |= {"completion_tokens": used["completion_tokens"]}
        return form.whole(choices, used, before)

    async def each(self, http: Request, choices: list[Choice], rows: Rows) -> AsyncGenerator[tuple[Choice, Event]]:
        """Events of all rows, with the choice that each is of; nothing of a row after its stop text. Gone where the client is."""

        async def leave() -> None:
            while not await http.is_disconnected():
                await asyncio.sleep(0.25)
            await rows.events.put((-1, Gone()))

        watch = asyncio.ensure_future(leave())
        try:
            while rows.ids:
                index, event = await rows.events.get()
                if isinstance(event, Gone):
                    raise event
                if index not in rows.ids:
                    continue
                if isinstance(event, Exception):
                    raise Failed("the engine has failed") from event
                if event.finished:
                    del rows.ids[index]
                if event.finished == "error":
                    raise Failed("the model's logits are not numbers, or no token is left that the schema allows")
                yield choices[index], event
                if choices[index].reason and not event.finished:  # by a stop text, of which the engine does not know
                    self.worker.cancel(rows.name, [rows.ids.pop(index)])
                    rows.heard[index].end("stop")
        finally:
            watch.cancel()

    async def stream(
        self,
        http: Request,
        asked: Chat | Completion,
        form: Form,
        prompts,
        rows: Rows,
    ) -> AsyncIterator[str]:
        """Server-sent events: a chunk for each token that shows something, or is asked about."""
        line = lambda content: f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
        choices = self.choices(asked, form, prompts)
        view = View() if asked.watch else None
        pending: list[list[Told]] = [[] for _ in choices]
        try:
            if form.chat:
                for choice in choices:
                    yield line(form.first(choice.index))
            async with asyncio.timeout(self.rules.timeout):
                async with contextlib.aclosing(self.each(http, choices, rows)) as events:
                    async for choice, event in events:
                        new = choice.add(event)
                        waiting = pending[choice.index]
                        waiting += choice.told[-1:]
                        more: Json = {}
                        if view and event.places is not LATE:
                            more = {
                                "kvcascade": view.step(
                                    [*prompts[0], *(told.token for told in choice.told)], event.places, form.token_bytes
                                )
                            }
                        if new or choice.reason or more:
                            yield line(form.chunk(choice, new, waiting) | more)
                            waiting.clear()
            used = usage(sum(map(len, prompts)), choices, asked.n)
            http.state.told |= {"completion_tokens": used["completion_tokens"]}
            if asked.stream_options and asked.stream_options.include_usage:
                yield line(form.last(used))
        except TimeoutError:
            self.metrics.refuse("timeout")
            yield line(Failed(f"the request took more than {self.rules.timeout:g} s", 504).body())
        except Refused as refused:
            yield line(refused.body())
        except Gone:
            return
        yield "data: [DONE]\n\n"


class Gone(Exception):
    """The client is not there any more."""
