"""What stands before every request: its number, who asks, how large it is, and a line in the log when it is over."""

import dataclasses
import hmac
import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcascade.cache.errors import BadInput
from kvcascade.serve.tracing import span
from kvcascade.serve.wire import Refused

log = logging.getLogger("kvcascade.serve.access")

OPEN = ("/health", "/ready", "/version", "/metrics", "/ui", "/favicon.ico", "/openapi.json", "/docs")
"""What is answered without a key."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """How much is taken in, and from whom."""

    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The tenant of each key; without any everybody is one tenant."""
    body: int = 2**20
    """Bytes of a request."""
    queue: int = 256
    """Rows that run or wait, of all."""
    per_key: int = 128
    """Rows that run or wait, of one tenant."""
    timeout: float = 600.0
    """Seconds that a request takes at most."""


def read_keys(path: Path) -> dict[str, str]:
    """The keys of a file with a tenant's name and a key on each line; BadInput for another, without saying what is in it."""
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if len(words) != 2 or words[1] in found:
            raise BadInput(f"{path}, line {number}: there are a tenant's name and a key of its own on each line")
        found[words[1]] = words[0]
    if not found:
        raise BadInput(f"{path} has no key")
    return found


def tenant(keys: Mapping[str, str], header: str) -> str:
    """Whose key an Authorization header has; Refused for nobody's."""
    if not keys:
        return ""
    given = header.removeprefix("Bearer ").encode() if header.startswith("Bearer ") else b""
    # All are compared, whichever fits, so that the time says nothing.
    fitting = [name for key, name in keys.items() if hmac.compare_digest(key.encode(), given)]
    if not fitting:
        raise Refused("there is no such API key", 401, "invalid_api_key", kind="authentication_error")
    return fitting[0]


class Guard:
    """ASGI: numbers and measures requests, refuses those without a key and those that are too large."""

    def __init__(self, app, rules: Rules, refuse):
        """`refuse` is called with the reason of each refusal."""
        self.app, self.rules, self.refuse = app, rules, refuse

    async def __call__(self, scope, receive, send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        asked = headers.get(b"x-request-id", "")
        number = asked if re.fullmatch(r"[\w.-]{1,64}", asked) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state |= {"request_id": number, "tenant": "", "told": {}}
        start, status, began = time.monotonic(), 0, False

        large = False

        async def answer(message) -> None:
            nonlocal status, began, large
            if large:  # whatever the framework has made of it
                if message["type"] == "http.response.start" and not began:
                    large = False
                    await respond(answer, _large(self.rules.body))
                    large = True
                return
            if message["type"] == "http.response.start":
                status, began = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        received = 0

        async def bounded():
            nonlocal received, large
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.rules.body:
                large = True
                raise _large(self.rules.body)
            return message

        length, told = headers.get(b"content-length", "0"), {"request": number}
        try:
            if length.isdigit() and int(length) > self.rules.body:
                raise _large(self.rules.body)
            if scope["path"] not in OPEN:
                state["tenant"] = tenant(self.rules.keys, headers.get(b"authorization", ""))
            named = {name.decode("latin-1"): value for name, value in headers.items()}
            with span(f"{scope['method']} {scope['path']}", named, told):
                await self.app(scope, bounded, answer)
                told |= {"status": status, **state["told"]}
        except Refused as refused:
            self.refuse("key" if refused.status == 401 else "body")
            if not began:
                await respond(answer, refused)
        finally:
            line = {
                "request": number, "method": scope["method"], "path": scope["path"], "status": status,
                "ms": round(1e3 * (time.monotonic() - start), 1), "tenant": state["tenant"], **state["told"],
            }  # fmt: skip
            log.info("request", extra={"fields": line})


def _large(most: int) -> Refused:
    return Refused(f"a request has {most:,} bytes at most", 413, "request_too_large")


async def respond(send, refused: Refused, headers: tuple = ()) -> None:
    """Answer with an error."""
    content = json.dumps(refused.body()).encode()
    about = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), *headers]
    await send({"type": "http.response.start", "status": refused.status, "headers": about})
    await send({"type": "http.response.body", "body": content})


class Lines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        told |= getattr(record, "fields", {})
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


def log_to(file: Path | None) -> None:
    """Write what the server says as JSON lines to a file, or to stderr; a disk that is full loses lines, and nothing else."""
    logging.raiseExceptions = False
    handler = logging.FileHandler(file, encoding="utf-8") if file else logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    root = logging.getLogger("kvcascade.serve")
    root.handlers, root.propagate = [handler], False
    root.setLevel(logging.INFO)
