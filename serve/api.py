"""The server's routes: OpenAI's chat and completions, tokens, health and metrics; see docs/server.md."""

import importlib.metadata
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from kvcascade.cache.errors import BadInput
from kvcascade.model import tokenizer
from kvcascade.serve.answers import Json
from kvcascade.serve.guard import Guard
from kvcascade.serve.server import Failed, Gone, Server
from kvcascade.serve.story import PAGE
from kvcascade.serve.view import card
from kvcascade.serve.wire import Chat, Completion, Detokenize, Refused, Tokenize
from kvcascade.serve.worker import Ended


def application(server: Server) -> Any:
    """The server as an ASGI application."""
    version = importlib.metadata.version("kvcascade")
    app = FastAPI(title="kvcascade", version=version)

    @app.exception_handler(BadInput)
    async def bad(http: Request, error: BadInput) -> Response:
        refused = error if isinstance(error, Refused) else Refused(str(error))
        if refused.status == 400:
            server.metrics.refuse("invalid")
        headers = {"retry-after": "1"} if refused.status in (429, 503) else {}
        return JSONResponse(refused.body(), refused.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return await bad(http, Refused("the body is not JSON"))
        place = ".".join(str(each) for each in first["loc"][1:])
        return await bad(http, Refused(f"{place}: {first['msg']}" if place else first["msg"], param=place or None))

    @app.exception_handler(HTTPException)
    async def other(http: Request, error: HTTPException) -> Response:
        return JSONResponse(Refused(str(error.detail)).body(), error.status_code, error.headers)

    @app.exception_handler(TimeoutError)
    async def late(http: Request, error: TimeoutError) -> Response:
        server.metrics.refuse("timeout")
        return await bad(http, Failed(f"the request took more than {server.rules.timeout:g} s", 504))

    @app.exception_handler(Ended)
    async def ended(http: Request, error: Ended) -> Response:
        return await bad(http, Failed("the engine has ended"))

    @app.exception_handler(Exception)
    async def unforeseen(http: Request, error: Exception) -> Response:
        return await bad(http, Failed("something has gone wrong that was not foreseen"))

    @app.exception_handler(Gone)
    async def gone(http: Request, error: Gone) -> Response:
        return Response(status_code=499)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request, asked: Chat):
        """OpenAI's chat, with our fields beside theirs."""
        server.known(asked.model)
        prompt = await server.texts(lambda: server.conversation(asked.messages))
        return await server.answer(http, asked, [prompt], True)

    @app.post("/v1/completions")
    async def completions(http: Request, asked: Completion):
        """OpenAI's completions."""
        server.known(asked.model)
        prompts = await server.texts(lambda: [*map(server.numbers, asked.prompts)])
        return await server.answer(http, asked, prompts, False)

    @app.post("/v1/embeddings")
    async def embeddings():
        """There are none."""
        raise Refused("this server generates text; it has no embeddings", code="unsupported")

    def model_card() -> Json:
        about = {
            "max_model_len": server.context,
            "caches": [card(server.model, spec, server.context) for spec in server.specs.values()],
        }
        return {"id": server.name, "object": "model", "created": server.created, "owned_by": "kvcascade"} | about

    @app.get("/v1/models")
    async def models():
        """The one model."""
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str):
        """The model by its name."""
        server.known(name)
        return model_card()

    @app.post("/tokenize")
    async def tokenize(asked: Tokenize):
        """The tokens of a text or of a conversation."""
        server.known(asked.model)

        def work() -> list[int]:
            if asked.messages:
                return server.conversation(asked.messages)
            text, model = asked.prompt or "", server.model
            if asked.parse_special:
                tokens = list(model.encoding.encode(text, allowed_special="all"))
                return [*model.before, *tokens, *model.after] if asked.add_special_tokens else tokens
            return model.encode(text) if asked.add_special_tokens else tokenizer.encode_within(model.encoding, text)

        tokens = await server.texts(work)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": server.context}

    @app.post("/detokenize")
    async def detokenize(asked: Detokenize):
        """The text of tokens."""
        server.known(asked.model)
        if any(token >= server.model.encoding.n_vocab for token in asked.tokens):
            raise Refused(f"tokens are numbers below {server.model.encoding.n_vocab}", param="tokens")
        try:
            return {"prompt": await server.texts(lambda: server.model.encoding.decode(asked.tokens))}
        except KeyError:  # some vocabularies have numbers that no token has
            raise Refused("one of the tokens is none", param="tokens") from None

    @app.get("/tokenizer_info")
    async def tokenizer_info():
        """What vLLM tells of its tokeniser: the texts of special tokens, the chat template."""
        special, template = server.model.special, server.model.chat_template
        texts = {name: special.get(name) for name in ("bos_token", "eos_token", "pad_token")}
        return texts | {"chat_template": template, "model_max_length": server.context}

    @app.get("/health")
    async def health():
        """Whether the engine is alive."""
        return Response(status_code=200 if server.worker.is_alive() else 500)

    @app.get("/ready")
    async def ready():
        """Whether requests are taken in."""
        return Response(status_code=200 if server.worker.ready.is_set() and not server.draining else 503)

    @app.get("/version")
    async def told_version():
        """The library's version."""
        return {"version": version}

    @app.get("/metrics")
    async def metrics():
        """For Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/points")
    async def points():
        """What was recorded of caches: bytes of a row, perplexity."""
        return server.points

    @app.get("/ui")
    async def page():
        """The page: a chat, and where its tokens are."""
        return HTMLResponse(PAGE.read_text("utf-8"))

    return Guard(app, server.rules, server.metrics.refuse)
