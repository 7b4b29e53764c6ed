# pyright: reportMissingImports=false
"""The server on Ray Serve: replicas by how many requests there are, each the same application as one process has, found by how a prompt begins.

serve run kvcascade.scripts.replicas:application model=smollm2 weights=int8 cache="full@int8 on blocks" replicas=2
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, RequestRouter

from kvcascade.cache.spec import parse
from kvcascade.model.pretrained import Model
from kvcascade.serve import api
from kvcascade.serve.engines import Room, starting
from kvcascade.serve.guard import Rules, read_keys
from kvcascade.serve.metrics import Metrics
from kvcascade.serve.plan import Limits
from kvcascade.serve.server import Server
from kvcascade.serve.worker import Worker

BEGINNING = 64
"""Characters by which requests are told apart, as in deploy/haproxy.cfg."""
TRIES = 3


class ByBeginning(FIFOMixin, RequestRouter):
    """Requests that begin alike go to the same replica, unless it has no room (rendezvous hashing)."""

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        """The replicas by how a request's beginning ranks them."""
        beginning = pending_request.kwargs.get("beginning", "") if pending_request else ""
        rank = lambda each: hashlib.sha256(f"{beginning}\0{each.replica_id.unique_id}".encode()).digest()
        return [[each] for each in sorted(candidate_replicas, key=rank)]


class Replica:
    """An engine and its application, in a process of its own."""

    def __init__(self, open_model: Callable[..., Model], about: Mapping[str, Any]):
        model = open_model(about["model"], weights=about.get("weights", "float32"))
        specs = [*map(parse, str(about.get("cache", "full on blocks")).split("&"))]
        context = min(int(about.get("context", 2048)), model.config.context)
        rules = Rules(read_keys(Path(about["keys"])) if "keys" in about else {})
        room = Room(
            context, int(about.get("blocks", 640)), Limits(int(about.get("tokens", 128)), int(about.get("rows", 32)))
        )
        metrics = Metrics(model.name)
        self.worker = Worker(starting(model, specs, room, metrics), after_step=metrics.after)
        self.worker.start()
        while not self.worker.ready.wait(1):
            self.check_health()
        self.app = api.application(Server(model, specs, self.worker, metrics, rules, context))

    def check_health(self) -> None:
        """Raise where the engine is not alive: Ray then puts another replica in its place."""
        if self.worker.failed or not self.worker.is_alive():
            raise RuntimeError(f"the engine has failed: {self.worker.failed}")

    async def answer(self, scope: Mapping[str, Any], body: bytes, beginning: str) -> AsyncIterator[dict[str, Any]]:
        """What the application sends."""
        sent: asyncio.Queue = asyncio.Queue()
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return asked.pop() if asked else await asyncio.Event().wait()

        async def run() -> None:
            try:
                await self.app(dict(scope), receive, sent.put)
            finally:
                await sent.put(None)

        task = asyncio.ensure_future(run())
        try:
            while message := await sent.get():
                yield message
        finally:
            task.cancel()


def front(replicas: DeploymentHandle):
    """An ASGI application that hands each request, once it is there, to the replica for its beginning; another one if that dies."""

    async def app(scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")[
                : Rules().body + 1 - len(body)
            ]  # one byte too many is refused as a million are
            if not message.get("more_body"):
                break
        kept = (
            "type",
            "http_version",
            "method",
            "path",
            "raw_path",
            "query_string",
            "headers",
            "root_path",
            "scheme",
            "asgi",
        )
        about = {name: scope[name] for name in kept if name in scope}
        began = False
        for _ in range(TRIES):
            stream = replicas.answer.options(stream=True).remote(about, body, beginning=_beginning(body))
            try:
                async for message in stream:
                    began = True
                    await send(message)
                return
            except RayError:
                if began:
                    raise
            finally:
                stream.cancel()
        raise RuntimeError("no replica answers")

    return app


@serve.ingress()
class Front:
    """What Ray's proxy asks."""

    def __init__(self, replicas: DeploymentHandle):
        self._replicas = replicas

    def __serve_build_asgi_app__(self):
        return front(self._replicas)


def _beginning(body: bytes) -> str:
    """What a request begins with: its prompt, or its first message."""
    try:
        asked = json.loads(body)
        text = asked["prompt"] if "prompt" in asked else asked["messages"][0]["content"]
    except (ValueError, LookupError, TypeError):
        return ""
    return str(text)[:BEGINNING]


def application(open_model: Callable[..., Model], about: Mapping[str, Any]) -> serve.Application:
    """A model that is opened by name, behind Ray Serve.

    `about` has `model`, and any of `weights`, `cache` (several with & between), `context`, `blocks`, `rows`, `tokens`, `keys`, `cpus` of a replica,
    and how many there are, `replicas` at least and `most`.
    """
    least = int(about.get("replicas", 1))
    scaling = {
        "min_replicas": least,
        "max_replicas": max(least, int(about.get("most", least))),
        "target_ongoing_requests": 16,
    }
    replica = serve.deployment(
        Replica,
        name="replica",
        autoscaling_config=scaling,
        max_ongoing_requests=256,
        health_check_period_s=1,
        request_router_config=RequestRouterConfig(request_router_class=ByBeginning),
        ray_actor_options={"num_cpus": float(about.get("cpus", 0.5))},
    )
    return serve.deployment(name="front", max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0})(Front).bind(
        replica.bind(open_model, dict(about))
    )
