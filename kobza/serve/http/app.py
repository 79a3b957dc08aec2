"""The server's app: both interfaces, /health, /metrics, /openapi.json and a page at /, behind the guard.

Every error is one line in one JSON body: OpenAI's, or under /api Ollama's. A 4xx says what, the value, the limit and the remedy.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

from kobza import __version__
from kobza.config import InputError
from kobza.serve.http import ollama, openai
from kobza.serve.http.metrics import Metrics
from kobza.serve.http.service import Failed, Flow, Service, UnknownModel
from kobza.serve.http.strict import in_words
from kobza.serve.request import QueueFull
from kobza.web.guard import Guard, Guarded, error_body
from kobza.web.page import Pages, mount_static

STATUSES = {
    400: "What was sent cannot be done; one line says why.",
    401: "No key, or a wrong one.",
    403: "A Host or an Origin that is not let in.",
    404: "No such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    429: "Too much at once; ask again after Retry-After seconds.",
    503: "The server is shutting down.",
    504: "Not done in time.",
}
CODES = {UnknownModel: (404, "model_not_found"), QueueFull: (429, "queue_full")}
TEXT = "text/plain; version=0.0.4; charset=utf-8"


def make_app(service: Service, guard: Guard) -> FastAPI:
    """All of the server but the socket; web/run.py runs it."""
    responses: dict[int | str, dict[str, Any]] = {status: {"description": text} for status, text in STATUSES.items()}
    app = FastAPI(title="kobza", version=__version__, docs_url=None, redoc_url=None, responses=responses)
    metrics, pages = Metrics(service), Pages("kobza.serve.http")

    def seen(flow: Flow) -> None:
        metrics.flowed(flow, time.monotonic())

    mount_static(app)
    add_errors(app)
    app.include_router(openai.router(service, seen))
    app.include_router(ollama.router(service, seen))

    @app.get("/health", tags=["Server"])
    async def health() -> Response:
        """Whether it takes requests."""
        if guard.traffic.draining:
            return JSONResponse({"status": "draining"}, 503, {"retry-after": "5"})
        return JSONResponse({"status": "ready", "models": list(service.models)})

    @app.get("/metrics", tags=["Server"], response_class=PlainTextResponse)
    def numbers() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type=TEXT)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)  # Ollama's clients ask by HEAD who is here
    def index(request: Request) -> Response:
        """What is here."""
        models = list(service.models.values())
        return pages.render(request, "index.html", models=models, routes=rows(app), base=str(request.base_url))

    app.add_middleware(Guarded, guard=guard, on_end=metrics.answered)  # type: ignore[arg-type]
    if guard.origins:  # outside the guard: a browser asks whether it may before it sends the key
        own = list(guard.origins)
        app.add_middleware(CORSMiddleware, allow_origins=own, allow_methods=["GET", "POST"], allow_headers=["*"])
    mend_document(app.openapi(), service)
    return app


def mend_document(document: dict[str, Any], service: Service) -> None:
    """Make the OpenAPI document say what is so here: FastAPI's own 422 is a 400, models have names, contexts an end."""
    longest = max(served.max_seq_len for served in service.models.values())
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for schema in document["components"]["schemas"].values():
        fields = schema.get("properties", {})
        if "model" in fields:
            fields["model"] = {"type": "string", "enum": list(service.models)}
        for name in ("max_tokens", "max_completion_tokens", "num_predict", "num_ctx"):
            for part in fields.get(name, {}).get("anyOf", ()):
                part |= {"maximum": longest} if part["type"] == "integer" else {}


def rows(app: FastAPI) -> list[dict[str, str]]:
    """The routes, each with the first line about it."""
    paths = app.openapi()["paths"].items()
    return [
        {"method": method.upper(), "path": path, "what": about.get("description", "").split("\n")[0]}
        for path, methods in paths
        for method, about in methods.items()
    ]


def add_errors(app: FastAPI) -> None:
    """Every exception that a client can cause, as a status and one line."""

    def input_error(request: Request, error: Any) -> Response:
        status, code = CODES.get(type(error), (400, code_of(str(error))))
        headers = {"retry-after": "1"} if status == 429 else {}
        return answer(request, status, str(error), code, None, headers)

    def http_error(request: Request, error: Any) -> Response:
        path = request.url.path[:200]
        words = {404: f"nothing is at {path}; see /openapi.json", 405: f"{request.method} is not for {path}; see Allow"}
        standard = error.detail in ("Not Found", "Method Not Allowed")
        message = words[error.status_code] if standard else str(error.detail)
        return answer(request, error.status_code, message, None, None, error.headers)

    def invalid(request: Request, error: Any) -> Response:
        message, param = in_words(error)
        return answer(request, 400, message, None, param)

    def failed(request: Request, error: Any) -> Response:
        return answer(request, error.status, str(error))

    app.add_exception_handler(InputError, input_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Failed, failed)


def code_of(message: str) -> str | None:
    """OpenAI's code for a prompt that is too long, which clients look for."""
    long = any(words in message for words in ("but the context holds", "the context of", "tokens hold"))
    return "context_length_exceeded" if long else None


def answer(
    request: Request, status: int, message: str, code: str | None = None, param: str | None = None, headers: Any = None
) -> Response:
    """An error in the words of the interface that was asked."""
    message = message.encode("utf-8", "replace").decode()
    ours = request.url.path.startswith("/api/")
    body = {"error": message} if ours else error_body(status, message, code, param)
    return JSONResponse(body, status, headers)
