"""A server of a toy in the test's own process, on a port of its own."""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import openai
import tiktoken
import uvicorn

from kvcascade.cache.spec import parse
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.pretrained import Model
from kvcascade.model.programs import traced
from kvcascade.serve import api
from kvcascade.serve.engine import Engine
from kvcascade.serve.engines import Room, starting
from kvcascade.serve.guard import Rules
from kvcascade.serve.metrics import Metrics
from kvcascade.serve.plan import Limits
from kvcascade.serve.propose import Propose
from kvcascade.serve.server import Server
from kvcascade.serve.worker import Worker

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=258, context=192)
CASCADE = "sink 2 | recent 14 | heavy 16@int8"
TEMPLATE = "{% for each in messages %}<|of|>{{ each.role }}: {{ each.content }}\n{% endfor %}<|of|>assistant:"
ROOM = Room(128, 64, Limits(tokens=32, rows=8))


@functools.cache
def toy() -> Model:
    """One token for each byte, and two that are special; its weights are larger than drawn, so that no two logits are near each other."""
    special = {"<|end|>": 256, "<|of|>": 257}
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("toy", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens=special)
    params = jax.tree.map(lambda x: x * 4 if x.ndim == 2 else x, gpt.init(CONFIG, 0))
    return Model("toy", CONFIG, params, encoding, TEMPLATE, {"eos_token": "<|end|>"}, end=frozenset({256}))


class Running:
    """A server that answers, and what is inside it."""

    def __init__(self, model: Model, specs: Sequence[str], rules: Rules, room: Room, propose: Propose | None = None):
        parsed = [*map(parse, specs)]
        metrics = Metrics(model.name)
        start = starting(model, parsed, room, metrics, traced, propose)
        self.worker: Worker[Engine] = Worker(start, self._ended, metrics.after)
        self.server = Server(model, parsed, self.worker, metrics, rules, room.context)
        config = uvicorn.Config(api.application(self.server), port=0, log_config=None, timeout_graceful_shutdown=5)
        self.http = uvicorn.Server(config)
        socket = config.bind_socket()
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        self.clients: dict[str, openai.OpenAI] = {}
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.http.run, args=([socket],), daemon=True)

    def _ended(self) -> None:
        self.http.should_exit = True

    def client(self, key: str = "any") -> openai.OpenAI:
        """OpenAI's own, one for each key, whichever thread asks first."""
        with self.lock:
            if key not in self.clients:
                self.clients[key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
            return self.clients[key]

    def until(self, holds, seconds: float = 20) -> None:
        """Wait for something to be so."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it has not come to be so"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(
    specs: Sequence[str] = ("full@f32 on blocks", CASCADE),
    rules: Rules | None = None,
    room: Room = ROOM,
    model: Model | None = None,
    propose: Propose | None = None,
) -> Iterator[Running]:
    """A server that is ready; it ends with the test."""
    running = Running(model or toy(), specs, rules or Rules(), room, propose)
    running.worker.start()
    running.thread.start()
    try:
        running.until(lambda: running.worker.ready.is_set() or running.worker.failed, 300)
        running.until(lambda: running.http.started)
        yield running
    finally:
        for client in running.clients.values():
            client.close()
        running.http.should_exit = True
        running.worker.stop()
        running.thread.join(10)
        running.worker.join(10)
