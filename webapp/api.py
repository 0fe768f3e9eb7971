"""The OpenAI-compatible API as an application of its own: routes, with checks and limits in front.

Served beside the page or alone. Source: OpenAI's API reference.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from qwen.backend import DeferredBackend, ListedModel
from qwen.errors import QwenError
from webapp.activity import Activity
from webapp.api_auth import AccessControl
from webapp.api_errors import (
    ApiError,
    describe_error,
    describe_http_error,
    describe_invalid_body,
)
from webapp.api_limits import (
    AccessLog,
    BodyLimit,
    KeyCheck,
    OriginCheck,
    RequestGate,
    error_response,
)
from webapp.api_replies import ChatShape, CompletionShape, ReplyHead
from webapp.api_requests import build_chat_request, build_completion_request, find_model
from webapp.api_schemas import (
    ChatCompletion,
    ChatCompletionRequest,
    CompletionRequest,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    TextCompletion,
)
from webapp.api_stream import ReplyResponse
from webapp.settings import ApiOptions

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

#: What the API answers, wherever it is served. The last two are for balancers and Prometheus.
API_PREFIX = "/v1"
HEALTH_PATH, METRICS_PATH = "/health", "/metrics"
CHAT_PATH, COMPLETIONS_PATH, MODELS_PATH = (
    f"{API_PREFIX}/chat/completions",
    f"{API_PREFIX}/completions",
    f"{API_PREFIX}/models",
)
#: The schema itself.
OPENAPI_PATH = f"{API_PREFIX}/openapi.json"

#: Threads beside those of waiting replies, for everything else on the same event loop.
SPARE_THREADS = 40

_WHOLE_OR_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorBody}}


def build_api(
    backend: DeferredBackend,
    options: ApiOptions,
    access: AccessControl,
    activity: Activity,
    *,
    max_request_bytes: int,
) -> FastAPI:
    """Build the API as an application of its own, with its checks and limits in front.

    Args:
        backend: Answers the requests.
        options: Limits and allowed origins.
        access: Who may use it.
        activity: What counts requests; its figures are at `/metrics`.
        max_request_bytes: The largest body.
    """
    known = (CHAT_PATH, COMPLETIONS_PATH, MODELS_PATH, HEALTH_PATH, METRICS_PATH, OPENAPI_PATH)
    middleware = [
        Middleware(AccessLog, count=activity.count_http, known_paths=known),
        Middleware(OriginCheck, allowed=options.cors_origins),
        Middleware(
            RequestGate,
            max_requests=options.max_requests,
            max_per_client=options.max_requests_per_client,
        ),
        Middleware(KeyCheck, access=access, open_paths=(HEALTH_PATH,)),
        Middleware(BodyLimit, max_bytes=max_request_bytes),
        Middleware(Threads, num_threads=options.max_requests + SPARE_THREADS),
    ]
    if options.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
        middleware.insert(1, cors)
    api = FastAPI(
        title="Qwen Chat",
        summary="OpenAI-compatible API",
        openapi_url=OPENAPI_PATH,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=middleware,
        responses=_ERRORS,
    )
    _add_error_handlers(api)
    _add_completions(api, backend)
    _add_models(api, backend)
    _add_probes(api, backend, activity)
    return api


def belongs_to_api(path: str) -> bool:
    """Tell whether a path is the API's, where page and API share a port."""
    return path in (HEALTH_PATH, METRICS_PATH, API_PREFIX) or path.startswith(API_PREFIX + "/")


def _add_error_handlers(api: FastAPI) -> None:
    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(describe_invalid_body(error.errors(), error.body))

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        answer = error_response(describe_http_error(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    @api.exception_handler(ApiError)
    @api.exception_handler(QwenError)
    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return error_response(describe_error(error))


def _add_completions(api: FastAPI, backend: DeferredBackend) -> None:
    @api.post(CHAT_PATH, response_model=ChatCompletion, responses=_WHOLE_OR_STREAM)
    async def create_chat_completion(body: ChatCompletionRequest) -> Response:
        """Answer a conversation; with `stream`, as server-sent events."""
        info = backend.info
        model = find_model(body.model, info).name
        shape = ChatShape(
            _new_head("chatcmpl", model),
            has_logprobs=bool(body.logprobs),
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            legacy_functions=bool(body.functions),
        )
        other = "" if model == info.name else model
        request = build_chat_request(body, info.default_params, model=other)
        return ReplyResponse(backend, request, shape, streams=bool(body.stream))

    @api.post(COMPLETIONS_PATH, response_model=TextCompletion, responses=_WHOLE_OR_STREAM)
    async def create_completion(body: CompletionRequest) -> Response:
        """Continue raw text, without a chat template; with `stream`, as server-sent events."""
        info = backend.info
        model = find_model(body.model, info).name
        shape = CompletionShape(
            _new_head("cmpl", model),
            has_logprobs=body.logprobs is not None,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )
        other = "" if model == info.name else model
        request = build_completion_request(body, info.default_params, model=other)
        return ReplyResponse(backend, request, shape, streams=bool(body.stream))


def _add_models(api: FastAPI, backend: DeferredBackend) -> None:
    started = int(time.time())

    def card(model: ListedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": started,
            "owned_by": "qwen",
            "context_length": model.context_length,
        }

    @api.get(MODELS_PATH, response_model=ModelList)
    async def list_models() -> Response:
        """Name the models that a request may name; the first one is the default."""
        return JSONResponse({"object": "list", "data": list(map(card, backend.info.models))})

    @api.get(MODELS_PATH + "/{model:path}", response_model=ModelCard)
    async def retrieve_model(model: str) -> Response:
        """Describe a model, asked for by its name; "Qwen" is the default."""
        return JSONResponse(card(find_model(model, backend.info)))


def _add_probes(api: FastAPI, backend: DeferredBackend, activity: Activity) -> None:
    @api.head(HEALTH_PATH, include_in_schema=False)
    @api.get(HEALTH_PATH, response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Tell whether replies can be had: 200 when they can, else 503. Needs no key."""
        stage = "stopping" if activity.is_stopping else backend.status.stage
        status = "ok" if stage == "ready" else stage
        return JSONResponse({"status": status}, 200 if stage == "ready" else 503)

    @api.get(
        METRICS_PATH, responses={200: {"content": {"text/plain": {}}, "description": "Prometheus"}}
    )
    async def metrics() -> Response:
        """Tell figures in Prometheus' text form."""
        return Response(generate_latest(activity.registry), media_type=CONTENT_TYPE_LATEST)


def _new_head(prefix: str, model: str) -> ReplyHead:
    return ReplyHead(f"{prefix}-{secrets.token_hex(12)}", model, int(time.time()))


class Threads:
    """Sees to it that the event loop has a worker thread for every reply that may be under way.

    A reply that waits for its turn holds a thread. Were there fewer threads than replies, those
    that wait could keep the one that runs from going on, for ever.

    Args:
        app: What gets the request.
        num_threads: At least so many.
    """

    def __init__(self, app: ASGIApp, *, num_threads: int) -> None:
        self._app = app
        self._num_threads = num_threads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        limiter = anyio.to_thread.current_default_thread_limiter()
        if limiter.total_tokens < self._num_threads:
            limiter.total_tokens = self._num_threads
        await self._app(scope, receive, send)
