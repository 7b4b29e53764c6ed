"""Requests as OpenAI's clients write them, with our own fields beside theirs; what cannot be done is refused, nothing is ignored in silence."""

import math
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from kvcascade.cache.errors import BadInput
from kvcascade.cache.retention import Retention
from kvcascade.model.sampling import BIASES, Sampling
from kvcascade.serve.request import TOP

MOST_ROWS = 64
"""Continuations of one prompt, and prompts of one request, at the most."""


type Fast[T] = Annotated[list[T], Field(fail_fast=True)]
"""A list of which the first wrong item is told: to tell of a million would take as long as they are many."""


def _none(default: object):
    """A field that may be null, which is then what it is by default."""
    return BeforeValidator(lambda value: default if value is None else value)


class Refused(BadInput):
    """A request that is not answered: an HTTP status, and words in OpenAI's form."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.kind = status, code, param, kind

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """An object with these fields and no others."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Keep(Strict):
    """How long blocks with a range of the prompt's tokens are kept when nobody uses them (TensorRT-LLM's retention)."""

    start: Annotated[int, Field(ge=0, le=2**31 - 1)]
    stop: Annotated[int, Field(ge=1, le=2**31 - 1)]
    priority: Annotated[int, Field(ge=0, le=100)]
    seconds: Annotated[float, Field(ge=0)] | None = None
    """None: for good."""

    def retention(self) -> Retention:
        """What the engine takes."""
        return Retention(self.start, self.stop, self.priority, math.inf if self.seconds is None else self.seconds)


class Schema(Strict):
    """OpenAI's `json_schema`."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class Format(Strict):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _whole(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, which needs it")
        return self


class StreamOptions(Strict):
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Random characters beside the text: there are none."""


class Asked(Strict):
    """What chat and completions have in common."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=100), _none(1.0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1), _none(1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1), _none(0)] = 0
    """0 or -1: all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1), _none(0.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100), _none(1.0)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Without one each request draws its own."""
    n: Annotated[int, Field(ge=1, le=MOST_ROWS), _none(1)] = 1
    stop: str | Fast[str] | None = None
    stream: Annotated[bool, _none(False)] = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    """vLLM's: go on after an end token, which is what a measurement of speed wants."""
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: Format | None = None
    presence_penalty: Annotated[Literal[0], BeforeValidator(lambda value: value or 0)] = 0
    """There is `repetition_penalty` instead."""
    frequency_penalty: Annotated[Literal[0], BeforeValidator(lambda value: value or 0)] = 0
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """These say nothing about the answer."""

    cache: str | None = None
    """Ours: which of the caches that are served, in one line."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    """Ours, as vLLM's: the lowest goes first."""
    retention: Annotated[list[Keep], Field(max_length=16)] = []
    """Ours: what of the prompt is kept how long for others to find."""
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    """Only requests of the same salt, and the same key, share prefixes."""
    speculate: bool = True
    """Ours: whether tokens may be computed that are only foreseen, where the server foresees any; the answer is the same."""
    watch: bool = False
    """Ours: whether each event of a stream tells which tier holds each token."""

    @model_validator(mode="after")
    def _together(self):
        if self.stream_options and not self.stream:
            raise ValueError("stream_options goes with stream")
        if self.watch and not (self.stream and self.n == 1):
            raise ValueError("watch goes with stream, and one answer")
        if len(self.stops) > 16 or any(not 0 < len(stop) <= 256 for stop in self.stops):
            raise ValueError("stop has up to 16 texts of 1 to 256 characters")
        if self.logit_bias and len(self.logit_bias) > BIASES:
            raise ValueError(f"logit_bias has up to {BIASES} tokens")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return tuple([self.stop] if isinstance(self.stop, str) else self.stop or ())

    @property
    def bias(self) -> tuple[tuple[int, float], ...]:
        """What is added to the logits of some tokens."""
        return tuple((self.logit_bias or {}).items())

    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        seed = secrets.randbits(32) if self.seed is None else self.seed % 2**32
        return Sampling(self.temperature, max(self.top_k, 0), self.top_p, self.min_p, self.repetition_penalty, seed)


class Part(Strict):
    """A part of a message: text."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Fast[Part]
    refusal: None = None
    """Some clients send back what an answer had."""

    @property
    def text(self) -> str:
        """Its content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Asked):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """An older name of the same."""
    logprobs: Annotated[bool, _none(False)] = False
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None

    @model_validator(mode="after")
    def _counted(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs")
        return self

    @property
    def count(self) -> int | None:
        """Tokens at the most, where it says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def likely(self) -> int | None:
        """Of how many of the likeliest tokens to tell; None: of no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Asked):
    """A request to /v1/completions."""

    prompt: str | Fast[int] | Fast[str] | Fast[Fast[int]]
    max_tokens: Annotated[int, Field(ge=0), _none(16)] = 16
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None
    echo: Annotated[bool, _none(False)] = False
    """Whether the prompt stands in front of the answer, with its log-probabilities if they are asked for."""
    best_of: Annotated[Literal[1], _none(1)] = 1
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _told(self):
        if self.echo and self.stream:
            raise ValueError("echo does not go with stream")
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens of 0 goes with echo")
        if self.watch and len(self.prompts) != 1:
            raise ValueError("watch goes with one prompt")
        if not self.prompts or len(self.prompts) > MOST_ROWS:
            raise ValueError(f"a request has 1 to {MOST_ROWS} prompts")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[each for each in self.prompt if isinstance(each, int)]]
        return [each for each in self.prompt if isinstance(each, str | list)]

    @property
    def count(self) -> int:
        """Tokens at the most."""
        return self.max_tokens

    @property
    def likely(self) -> int | None:
        """As in `Chat`."""
        return self.logprobs


class Tokenize(Strict):
    """A request to /tokenize: a text, or the messages of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Fast[Message] | None = None
    add_special_tokens: bool = True
    parse_special: bool = True
    """Whether the text of a special token is taken for it, as vLLM does here; a prompt to be completed is read without."""

    @model_validator(mode="after")
    def _one(self):
        if (self.prompt is None) == (not self.messages):
            raise ValueError("there is either a prompt or messages")
        return self


class Detokenize(Strict):
    """A request to /detokenize."""

    model: str | None = None
    tokens: Fast[Annotated[int, Field(ge=0)]]
