"""The router's HTTP side: ``/metrics``, ``/health``, ``/ready``, ``/status``. Read-only."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Final

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from kvrelay.core.cluster_view import ClusterState

MAX_HTTP_CONNECTIONS: Final = 256


def make_app(
    read_metrics: Callable[[], bytes],
    read_state: Callable[[], ClusterState],
    is_serving: Callable[[], bool],
    is_ready: Callable[[], bool],
) -> Starlette:
    """The application; each answer is read when asked for."""

    async def metrics(_: Request) -> Response:
        return Response(read_metrics(), media_type=CONTENT_TYPE_LATEST)

    async def health(_: Request) -> Response:
        is_well = is_serving()
        return PlainTextResponse("serving\n" if is_well else "shutting down\n", 200 if is_well else 503)

    async def ready(_: Request) -> Response:
        if is_serving() and is_ready():
            return PlainTextResponse("ready\n")
        return PlainTextResponse("no model has both a prefill and a decode node\n", 503)

    async def status(_: Request) -> Response:
        return JSONResponse(asdict(read_state()))

    pages = {"/metrics": metrics, "/health": health, "/ready": ready, "/status": status}
    return Starlette(routes=[Route(path, page, methods=["GET"]) for path, page in pages.items()])


class HttpServer:
    """Serves an application on a listening socket, on the running loop, until stopped."""

    def __init__(self, app: Starlette, listening: socket.socket) -> None:
        self._socket = listening
        self._server = _QuietServer(
            uvicorn.Config(
                app,
                loop="none",
                http="h11",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                limit_concurrency=MAX_HTTP_CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http")

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()


class _QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers: the router's own decide when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
