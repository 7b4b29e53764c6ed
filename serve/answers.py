"""Answers in OpenAI's form: choices, the chunks of a stream, log-probabilities, usage."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvcascade.serve.request import Event, Likely
from kvcascade.serve.visible import Visible

type Json = dict[str, Any]


@dataclasses.dataclass
class Told:
    """A token's text and log-probability, and those of the likeliest."""

    token: int
    logprob: float | None
    likely: Likely


@dataclasses.dataclass
class Choice:
    """One answer as it grows."""

    index: int
    visible: Visible
    text: str = ""
    tokens: int = 0
    found: int = 0
    reason: str | None = None
    offset: int = 0
    """Characters of the tokens whose log-probabilities a stream has told."""
    told: list[Told] = dataclasses.field(default_factory=list)

    def add(self, event: Event) -> str:
        """Take an event; the text that may be shown now. Of an end token, and of what comes after a stop text, nothing is shown."""
        assert event.token is not None
        self.tokens += 1
        self.found = event.found
        self.told.append(Told(event.token, event.logprob, event.likely))
        new = "" if event.finished == "stop" else self.visible.add(event.token)
        if self.visible.stopped:
            self.reason = "stop"
        elif event.finished:
            new += self.visible.end()
            self.reason = "stop" if self.visible.stopped else event.finished
        self.text += new
        return new


@dataclasses.dataclass(frozen=True)
class Form:
    """How the answers to one request are written."""

    chat: bool
    model: str
    likely: int | None
    """Of how many of the likeliest tokens to tell beside each; None: of no log-probabilities."""
    token_bytes: Callable[[int], bytes]
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: Json, before: Sequence[tuple[str, list[Told]]] = ()) -> Json:
        """The answer at once; `before` has the prompt of each choice, where it stands in front."""
        found = []
        for choice in choices:
            text, told = before[choice.index] if before else ("", [])
            body: Json = {
                "index": choice.index,
                "finish_reason": choice.reason,
                "logprobs": self.logprobs(told + choice.told),
            }
            if self.chat:
                body["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                body["text"] = text + choice.text
            found.append(body)
        return self._around("chat.completion" if self.chat else "text_completion") | {"choices": found, "usage": usage}

    def chunk(self, choice: Choice, new: str, told: list[Told]) -> Json:
        """A part of a stream."""
        logprobs = self.logprobs(told, choice.offset)
        choice.offset += sum(len(self._text(each.token)) for each in told)
        body: Json = {"index": choice.index, "finish_reason": choice.reason, "logprobs": logprobs}
        if self.chat:
            body["delta"] = {"content": new} if new or not choice.reason else {}
        else:
            body["text"] = new
        return self._around("chat.completion.chunk" if self.chat else "text_completion") | {"choices": [body]}

    def first(self, index: int) -> Json:
        """The chunk that says who speaks."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        choices = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]
        return self._around("chat.completion.chunk") | {"choices": choices}

    def last(self, usage: Json) -> Json:
        """The chunk that says what was used."""
        return self._around("chat.completion.chunk" if self.chat else "text_completion") | {
            "choices": [],
            "usage": usage,
        }

    def _around(self, kind: str) -> Json:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def logprobs(self, told: list[Told], at: int = 0) -> Json | None:
        """Log-probabilities of tokens as chat has them, or as completions have, where the first of them begins."""
        if self.likely is None:
            return None
        if self.chat:
            one = lambda token, logprob: self._named(token) | {"logprob": logprob}
            content = [
                one(each.token, each.logprob) | {"top_logprobs": [one(*pair) for pair in each.likely]} for each in told
            ]
            return {"content": content, "refusal": None}
        texts, offsets = [self._text(each.token) for each in told], []
        for text in texts:
            offsets.append(at)
            at += len(text)
        top = [{self._text(token): logprob for token, logprob in each.likely} or None for each in told]
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in told],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _named(self, token: int) -> Json:
        return {"token": self._text(token), "bytes": list(self.token_bytes(token))}

    def _text(self, token: int) -> str:
        content = self.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:  # a part of a character, as OpenAI writes it
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def usage(prompt: int, choices: Sequence[Choice], n: int) -> Json:
    """Tokens of the prompts, of the n answers to each, and how many of the prompts' were found."""
    generated = sum(each.tokens for each in choices)
    return {
        "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(each.found for each in choices[::n])},
    }  # fmt: skip
