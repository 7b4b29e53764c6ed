"""A server that speaks OpenAI's completions, asked for each request of a trace when it comes."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import aiohttp

from kvcascade.cache.errors import BadInput
from kvcascade.serve.trace import Arrival

PATIENCE = 3600.0
"""Seconds that a whole trace may take longer than its last arrival."""
TRIES, AGAIN = 100, 0.05
"""How often a request whose connection was cut is sent, and after how many seconds again: a server lets few in at once."""


@dataclasses.dataclass(frozen=True)
class Server:
    """What a server is called in tables, with its formats, and its address up to `/v1`."""

    name: str
    url: str

    @classmethod
    def of(cls, text: str) -> "Server":
        """From `NAME=URL`; BadInput for anything else."""
        name, equals, url = text.rpartition("=http")
        if not equals or not name.strip():
            raise BadInput(f"{text!r}: a server is written NAME=URL, such as llama.cpp=http://127.0.0.1:8080/v1")
        return cls(name.strip(), "http" + url.rstrip("/"))

    def serve(self, arrivals: Sequence[Arrival], prompts: Sequence[list[int]], clients: int = 0) -> "list[Answer]":
        """What each request got, which is sent when it comes, whoever is not answered yet; seconds are from the trace's begin.

        With `clients` so many send the requests instead, each its next when its last is answered.

        Before that the longest prompt is sent once with other tokens, for what a server does only once. A server may hold back a token that
        ends in the middle of a character: it counts with the one that brings the rest. BadInput for one that does not answer, or does not
        give every token, which needs `ignore_eos`, that llama.cpp, vLLM and SGLang know.
        """
        return asyncio.run(self._serve(arrivals, prompts, clients))

    async def _serve(self, arrivals: Sequence[Arrival], prompts: Sequence[list[int]], clients: int) -> "list[Answer]":
        limit = aiohttp.ClientTimeout(total=arrivals[-1].at + PATIENCE, sock_connect=10)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        try:
            async with aiohttp.ClientSession(timeout=limit, connector=connector) as session:
                async with session.get(f"{self.url}/models") as answer:
                    model = (await _said(answer))["data"][0]["id"]
                ask = lambda prompt, count: self._ask(session, model, prompt, count)
                await ask([*reversed(max(prompts, key=len))], 2)
                start = time.perf_counter()

                turn = asyncio.Semaphore(clients or len(prompts))

                async def one(each: Arrival, prompt: list[int]) -> Answer:
                    if not clients:
                        await asyncio.sleep(start + each.at - time.perf_counter())
                    async with turn:
                        sent = time.perf_counter() - start
                        got = await ask(prompt, each.output)
                    return got._replace(tokens=[when - start for when in got.tokens], sent=sent if clients else each.at)

                return await asyncio.gather(*(one(*pair) for pair in zip(arrivals, prompts, strict=True)))
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
            raise BadInput(f"{self.name} at {self.url}: {str(error) or type(error).__name__}") from None

    async def _ask(self, session: aiohttp.ClientSession, model: str, prompt: list[int], count: int) -> "Answer":
        """One answer; whoever is not let in tries again, as clients do."""
        body = {
            "model": model, "prompt": prompt, "max_tokens": count, "ignore_eos": True, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        tries = 1
        while True:
            try:
                async with session.post(f"{self.url}/completions", json=body) as answer:
                    return await self._answer(answer, prompt, count)
            except (aiohttp.ServerDisconnectedError, ConnectionResetError):
                if tries == TRIES:
                    raise
            await asyncio.sleep(AGAIN)
            tries += 1

    async def _answer(self, answer: aiohttp.ClientResponse, prompt: list[int], count: int) -> "Answer":
        when: list[float] = []
        used: dict[str, Any] = {}
        if answer.status != 200:
            await _said(answer)
        async for line in answer.content:
            if line.startswith(b"data: {"):
                said = json.loads(line[6:])
                if "error" in said:
                    raise BadInput(f"{self.name}: {said['error']}")
                used = said.get("usage") or used
                if any(choice.get("text") for choice in said.get("choices", ())):
                    when.append(time.perf_counter())
        made = used.get("completion_tokens", len(when))
        if not when or made != count or used.get("prompt_tokens", len(prompt)) != len(prompt):
            raise BadInput(
                f"{self.name} answered {used.get('prompt_tokens', len(prompt))} tokens by {made}, and was asked {len(prompt)} tokens for {count}"
            )
        found = (used.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Answer(when[:count] + [when[-1]] * (count - len(when)), found)


class Answer(NamedTuple):
    """When each token came, and how many of the prompt's the server had already, where it says so."""

    tokens: list[float]
    found: int | None
    sent: float = 0.0
    """When its request was sent, or was to be."""


async def _said(answer: aiohttp.ClientResponse) -> Any:
    """What it says, if it says that all is well."""
    text = await answer.text()
    if answer.status != 200:
        raise BadInput(f"{answer.url} says {answer.status}: {' '.join(text.split())[:200]}")
    return json.loads(text)
