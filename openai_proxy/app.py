"""The application: paths, error handlers, and a client that lives as long as it does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvrelay import __version__
from kvrelay.client import AsyncClient, ClientConfig
from kvrelay.core.errors import KVRelayError
from kvrelay.openai_proxy.access import Access
from kvrelay.openai_proxy.chat import chat_completions
from kvrelay.openai_proxy.completions import completions
from kvrelay.openai_proxy.config import ProxyConfig
from kvrelay.openai_proxy.errors import ApiError, from_kvrelay, from_validation
from kvrelay.openai_proxy.event_stream import ClientGoneError
from kvrelay.openai_proxy.gateway import BodyTooLargeError, Gateway
from kvrelay.openai_proxy.metrics import ProxyMetrics
from kvrelay.openai_proxy.responses import create_response
from kvrelay.openai_proxy.service import ProxyService
from kvrelay.openai_proxy.small_endpoints import (
    detokenize,
    get_model,
    health,
    list_models,
    metrics,
    tokenize,
)
from kvrelay.openai_proxy.sse import compact_json

logger = logging.getLogger(__name__)

Handler = Callable[[Request, Any], Awaitable[Response]]
Companion = Callable[[AsyncClient], Coroutine[None, None, None]]
"""Runs beside the application until it is cancelled, with the application's client."""


class ErrorDetail(BaseModel):
    """What went wrong, and in which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorDetail


_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "A field can't be served; `param` names it",
        401: "No such API key",
        404: "No such model",
        409: "A live request has this id",
        413: "The body is too large",
        429: "No room now; Retry-After says when to come back",
        499: "Cancelled",
        500: "A bug",
        503: "The cluster can't serve this now",
        504: "The request's time ran out",
    }.items()
}


def make_app(
    config: ProxyConfig,
    access: Access,
    metrics_of_worker: ProxyMetrics,
    companion: Companion | None = None,
) -> Gateway:
    """One worker's application. Its client dials no router before it, or `companion`, asks for something."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        client_config = ClientConfig(
            max_requests_in_flight=config.max_requests_in_flight * config.max_choices
        )
        async with AsyncClient(config.routers, config=client_config) as client:
            app.state.service = ProxyService(config, client, metrics_of_worker)
            beside = asyncio.create_task(companion(client)) if companion else None
            yield
            if beside is not None:
                beside.cancel()
                await asyncio.wait([beside])

    app = FastAPI(
        title="kvrelay",
        version=__version__,
        description="The OpenAI API over a kvrelay cluster.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    _add_routes(app)
    _add_error_handlers(app)
    return Gateway(
        app,
        access,
        metrics_of_worker,
        max_body_bytes=config.max_body_bytes,
        max_requests=config.max_requests_in_flight,
    )


def _add_routes(app: FastAPI) -> None:
    posts = {
        "/v1/chat/completions": chat_completions,
        "/v1/completions": completions,
        "/v1/responses": create_response,
        "/tokenize": tokenize,
        "/detokenize": detokenize,
    }
    gets = {
        "/v1/models": list_models,
        "/v1/models/{model:path}": get_model,
        "/health": health,
        "/metrics": metrics,
    }
    for paths, method in ((posts, "POST"), (gets, "GET")):
        for path, endpoint in cast("dict[str, Callable[..., Any]]", paths).items():
            app.add_api_route(path, endpoint, methods=[method], responses=_ERRORS, response_model=None)


def _add_error_handlers(app: FastAPI) -> None:
    async def on_api_error(request: Request, error: ApiError) -> Response:
        request_id = request.scope["state"]["request_id"]
        logger.info("request=%s refused param=%s error=%r", request_id, error.param, error.message)
        content = compact_json(error.body())  # texts of callers are in it, perhaps not valid Unicode
        return Response(content, error.status, error.headers(), "application/json")

    async def on_kvrelay_error(request: Request, error: KVRelayError) -> Response:
        return await on_api_error(request, from_kvrelay(error, request.scope["state"].get("params")))

    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        return await on_api_error(request, from_validation(error.errors()))

    async def on_http_error(request: Request, error: HTTPException) -> Response:
        found = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        answer = await on_api_error(request, found)
        answer.headers.update(error.headers or {})
        return answer

    async def on_large_body(request: Request, error: BodyTooLargeError) -> Response:
        answer = await on_api_error(request, error.error)
        answer.headers.update(error.headers or {})
        return answer

    async def on_gone(_: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)

    async def on_bug(request: Request, error: Exception) -> Response:
        return await on_api_error(request, ApiError(500, "the proxy failed; its log says why"))

    handlers: dict[type[Exception], Handler] = {
        ApiError: on_api_error,
        KVRelayError: on_kvrelay_error,
        RequestValidationError: on_invalid,
        HTTPException: on_http_error,
        BodyTooLargeError: on_large_body,
        ClientGoneError: on_gone,
        Exception: on_bug,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
