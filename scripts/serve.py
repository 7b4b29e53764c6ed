"""Serve a model to OpenAI's clients: `kvcascade serve --model smollm2 --weights int8 --cache "full@int8 on blocks"`; ready after a minute."""

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import record_files
from kvcascade.eval.records import Evaluation, of
from kvcascade.model.pretrained import Model
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, Seconds, arguments_of, foreseen
from kvcascade.serve.plan import Limits


@dataclasses.dataclass(frozen=True)
class Args:
    """Answer OpenAI's clients over HTTP, every program compiled before the first request; Ctrl-C and SIGTERM finish what runs."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A cache in one line, by default `full on blocks`; given several times, requests name theirs, and the first is for those that do not."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""
    name: str = ""
    """What clients call the model, by default as it is called here."""
    host: str = "127.0.0.1"
    port: CountOrNone = 8000
    """0: any that is free."""
    context: Count = 2048
    """Tokens of a prompt and its answer, at the most."""
    blocks: Count = 640
    """Blocks of a pool, of 16 tokens each; one of them is nobody's."""
    aside: CountOrNone = 0
    """Blocks of rows that had to stop that host memory has room for."""
    snapshots: CountOrNone = 256
    """MB of host memory for what rows had in slots of their own after chunks of their prompts; others that begin alike go on from there."""
    speculate: str = "none"
    """Foresee tokens and compute them along with the next: `ngram`, what followed the same tokens before; `self`, what the model finds by half of
    the bits of `full@planes on blocks`; `draft:MODEL`, what a smaller one finds (`distill`). The answers are the same ones."""
    ahead: Count = 3
    """How many tokens are foreseen, at most."""
    rows: Count = 32
    """Rows that run at once; those of a cache that is not wholly on blocks each have slots of their own."""
    tokens: Count = 128
    """Tokens of a step, at most."""
    keys: Path | None = None
    """A file with a tenant's name and a key on each line; without it everybody is let in."""
    body: Count = 2**20
    """Bytes of a request, at most."""
    queue: Count = 256
    """Answers that run or wait, at most; who comes then is told to come again."""
    per_key: Count = 128
    """The same for one tenant."""
    timeout: Seconds = 600.0
    """Seconds that an answer takes at most."""
    drain: Count = 30
    """Seconds in which what runs may end after SIGTERM."""
    records: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Records of `evaluate`, of which the page shows this model's caches."""
    log: Path | None = None
    """A file for the log's JSON lines; by default stderr."""


def main(arguments: list[str]) -> None:
    """Serve until a signal; status 1 where the engine has failed."""
    args = arguments_of(Args, "serve", arguments)
    specs = [*dict.fromkeys(map(parse, args.cache or ("full on blocks",)))]
    try:
        import uvicorn

        from kvcascade.serve import api, guard
        from kvcascade.serve.engine import Engine
        from kvcascade.serve.engines import Room, starting
        from kvcascade.serve.metrics import Metrics
        from kvcascade.serve.server import Server
        from kvcascade.serve.worker import Worker
    except ImportError as error:
        raise BadInput(f"{error.name} is not installed: pip install 'kvcascade[serve]'") from error
    keys = guard.read_keys(args.keys) if args.keys else {}
    propose, ahead = foreseen(args.speculate, args.ahead)
    rules = guard.Rules(keys, args.body, args.queue, args.per_key, args.timeout)
    guard.log_to(args.log)
    model = console.open_model(args.model, args.weights, specs)
    context = min(args.context, model.config.context)
    metrics = Metrics(args.name or model.name)
    room = Room(
        context,
        args.blocks,
        Limits(args.tokens, args.rows, aside=args.aside, snapshots=10**6 * args.snapshots, **ahead),
    )
    worker: Worker[Engine] = Worker(
        starting(model, specs, room, metrics, propose=propose, draft=console.open_draft(args.speculate, model)),
        lambda: setattr(http, "should_exit", True),
        metrics.after,
    )
    server = Server(model, specs, worker, metrics, rules, context, args.name, _points(args.records, model))

    class Http(uvicorn.Server):
        until = 0.0

        def handle_exit(self, sig, frame) -> None:
            # What runs may end, and /ready says meanwhile that nothing new may begin; at a second signal all ends.
            self.should_exit = self.force_exit = server.draining
            server.draining, self.until = True, time.monotonic() + args.drain

        async def on_tick(self, counter: int) -> bool:
            if server.draining and (not any(server.open.values()) or time.monotonic() > self.until):
                self.should_exit = True
            return await super().on_tick(counter)

    config = uvicorn.Config(
        api.application(server), args.host, args.port, log_config=None, access_log=False, timeout_graceful_shutdown=3, lifespan="on",
        h11_max_incomplete_event_size=2**16,
    )  # fmt: skip
    http = Http(config)
    socket = config.bind_socket()
    host, port = socket.getsockname()[:2]
    console.say(
        f"http://{host}:{port}/v1 when it is ready, a chat on http://{host}:{port}/ui, Prometheus' figures on /metrics"
    )
    worker.start()
    http.run([socket])
    worker.stop()
    worker.join(5)
    if isinstance(worker.failed, BadInput):
        raise worker.failed
    if worker.failed:
        console.say(f"the engine has failed: {type(worker.failed).__name__}: {worker.failed}")
        logging.shutdown()
        os._exit(1)


def _points(files: Sequence[Path], model: Model) -> list[dict[str, Any]]:
    """Bytes and perplexity of a model's caches, as they were recorded."""
    found = [each for file in files for each in of(record_files.read(file), Evaluation) if each.model == model.name]
    return [{"cache": each.cache, "kv_bytes": each.kv_bytes, "ppl": each.ppl} for each in found]
