"""A trace sent to a server over HTTP: every request when it comes, every token when it came, and what is wrong is said."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web
from test_engine import CONFIG, params

from kvcascade.cache.errors import BadInput
from kvcascade.eval.records import Served
from kvcascade.eval.speed import serving
from kvcascade.eval.speed.server import Server
from kvcascade.model import tokenizer
from kvcascade.model.pretrained import Model
from kvcascade.serve.trace import Arrival

PAUSE = 0.05


class Answers:
    """A server of completions on a port of its own: a token every PAUSE seconds, and `changed` turns each body into what is answered."""

    def __init__(
        self, changed: Callable[[dict], dict] = lambda body: body, silent: tuple[int, ...] = (), closed: int = 0
    ):
        self.changed, self.silent, self.bodies, self.most, self.now = changed, silent, [], 0, 0
        self.closed = closed
        self.url = ""
        self.loop, up = asyncio.new_event_loop(), threading.Event()
        app = web.Application()
        self.runner = web.AppRunner(app)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)

        async def start() -> None:
            await self.runner.setup()
            site = web.TCPSite(self.runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}/v1"
            up.set()

        def run() -> None:
            self.loop.create_task(start())
            self.loop.run_forever()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert up.wait(10)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "toy"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = self.changed(await request.json())
        self.bodies.append(body)
        if self.closed:
            self.closed -= 1
            assert request.transport
            request.transport.abort()
        if "status" in body:
            return web.json_response({"error": {"message": "no\nroom"}}, status=body["status"])
        self.now += 1
        self.most = max(self.most, self.now)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for index in range(body["max_tokens"]):
            await asyncio.sleep(PAUSE)
            said: dict[str, Any] = {"choices": [{"text": "" if index in self.silent else "a"}]}
            await answer.write(f"data: {json.dumps(said)}\n\n".encode())
        usage: dict[str, Any] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        usage["prompt_tokens_details"] = {"cached_tokens": 2}
        await answer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        self.now -= 1
        return answer


@pytest.fixture
def answering() -> Iterator[Callable[..., Answers]]:
    made: list[Answers] = []

    def make(*arguments, **named) -> Answers:
        made.append(Answers(*arguments, **named))
        return made[-1]

    yield make
    for each in made:
        each.close()


ARRIVALS = [Arrival(0.0, 3, 4), Arrival(0.02, 5, 2), Arrival(0.6, 2, 1)]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]


def test_requests_come_when_they_come_and_tokens_count_when_they_came(answering: Callable[..., Answers]) -> None:
    server = answering()
    found = Server("s", server.url).serve(ARRIVALS, PROMPTS)
    assert [(len(got.tokens), got.found) for got in found] == [(4, 2), (2, 2), (1, 2)]
    warm, *asked = server.bodies
    assert warm["prompt"] == PROMPTS[1][::-1] and [body["prompt"] for body in asked] == PROMPTS
    assert {(body["model"], body["ignore_eos"], body["stream"], body["temperature"]) for body in asked} == {
        ("toy", True, True, 0)
    }
    assert server.most == 2  # the second does not wait for the first, the third comes when both are over
    for each, (times, *_) in zip(ARRIVALS, found, strict=True):
        for index, when in enumerate(times):
            assert when >= each.at + (index + 1) * PAUSE - 1e-3
        assert times == sorted(times)


def test_so_many_clients_send_one_after_the_other(answering: Callable[..., Answers]) -> None:
    """Whatever the trace's times are; a request's time begins when it is sent."""
    server = answering()
    found = Server("s", server.url).serve(ARRIVALS * 3, PROMPTS * 3, clients=2)
    assert server.most == 2 and len(server.bodies) == 10
    firsts = sorted(got.sent for got in found)
    assert firsts[1] < PAUSE < firsts[2]
    assert all(got.tokens[0] - got.sent >= PAUSE - 1e-3 for got in found)
    assert max(got.tokens[-1] for got in found) >= sum(each.output for each in ARRIVALS * 3) * PAUSE / 2


def test_tokens_that_are_held_back_count_with_the_last(answering: Callable[..., Answers]) -> None:
    server = answering(silent=(1, 3))
    ((times, *_),) = Server("s", server.url).serve(ARRIVALS[:1], PROMPTS[:1])
    assert len(times) == 4 and times[1] == times[2] == times[3]


def test_whoever_is_not_let_in_tries_again(answering: Callable[..., Answers]) -> None:
    server = answering(closed=3)
    ((times, *_),) = Server("s", server.url).serve(ARRIVALS[:1], PROMPTS[:1])
    assert len(times) == 4 and len(server.bodies) == 5


@pytest.mark.parametrize(
    "changed, reason",
    [
        (lambda body: body | {"status": 503}, "says 503: .*no.*room"),
        (
            lambda body: body | {"max_tokens": body["max_tokens"] - 1},
            "answered 5 tokens by 1, and was asked 5 tokens for 2",
        ),
        (lambda body: body | {"prompt": [0, *body["prompt"]]}, "answered 6 tokens by 2, and was asked 5 tokens for 2"),
    ],
)
def test_what_a_server_does_not_do_is_said(
    answering: Callable[..., Answers], changed: Callable[[dict], dict], reason: str
) -> None:
    with pytest.raises(BadInput, match=reason):
        Server("s", answering(changed).url).serve(ARRIVALS, PROMPTS)


def test_one_request_that_fails_ends_the_trace(answering: Callable[..., Answers]) -> None:
    server = answering(lambda body: body | ({"status": 500} if body["prompt"] == PROMPTS[2] else {}))
    with pytest.raises(BadInput, match="says 500"):
        Server("s", server.url).serve(ARRIVALS, PROMPTS)


def test_nobody_there_is_said() -> None:
    with pytest.raises(BadInput, match="^nobody at http://127.0.0.1:9/v1: "):
        Server("nobody", "http://127.0.0.1:9/v1").serve(ARRIVALS, PROMPTS)


@pytest.mark.parametrize("text", ["", "x", "http://a", " =http://a", "a=ftp://b"])
def test_a_server_has_a_name_and_an_address(text: str) -> None:
    with pytest.raises(BadInput, match="NAME=URL"):
        Server.of(text)
    assert Server.of("a = b=http://c/v1/") == Server("a = b", "http://c/v1")


def test_a_trace_is_recorded(answering: Callable[..., Answers]) -> None:
    model = Model("toy", CONFIG, params(), tokenizer.bytes_encoding())
    job = serving.server_job(model, Server("s", answering().url), serving.Trace("t", ARRIVALS, 1, 0))
    (found,) = job.run()
    assert isinstance(found, Served) and (found.way, found.cache, found.output_tokens) == ("server", "s", 7)
    assert found.useful is None and found.found == 6 and found.first_ms[0] >= PAUSE * 1e3 - 1
    assert serving.table([found]).rows[0][:2] == ["server", "s"]
