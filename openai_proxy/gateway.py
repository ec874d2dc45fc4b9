"""What every request passes on its way in: an id, a limit on its size, its key; and what is counted of it.

Plain ASGI, since Starlette's own middleware base stands between a stream and its reader's disconnect.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Final
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvrelay.core.client_types import MAX_REQUEST_ID_CHARS
from kvrelay.openai_proxy.access import Access, Grant
from kvrelay.openai_proxy.errors import ApiError
from kvrelay.openai_proxy.event_stream import DIRECT_SEND
from kvrelay.openai_proxy.metrics import ProxyMetrics
from kvrelay.openai_proxy.sse import compact_json

logger = logging.getLogger("kvrelay.openai_proxy")

_ASKING_PATHS: Final = ("/v1/", "/tokenize", "/detokenize")
_REQUEST_ID: Final = re.compile(rf"[\x21-\x7e]{{1,{MAX_REQUEST_ID_CHARS - 8}}}")
_NUM_KNOWN_PATHS_MAX: Final = 64


class BodyTooLargeError(HTTPException):
    """Found out while the body is read, where the web framework lets only its own kind of error through."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, error.message, {"connection": "close"})
        self.error = error


class Gateway:
    """Wraps the application. `max_requests` are under way at once, each body has `max_body_bytes` at most.

    While `is_draining`, every answer says that its connection ends with it.
    """

    def __init__(
        self, app: ASGIApp, access: Access, metrics: ProxyMetrics, *, max_body_bytes: int, max_requests: int
    ) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._max_requests = max_requests
        self._num_requests = 0
        self.is_draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Passage(self, scope, receive, send).run()

    def enter(self, scope: Scope, headers: Headers) -> Grant:
        """Let a request in.

        Raises:
            ApiError: why not.
        """
        if not scope["path"].startswith(_ASKING_PATHS):
            return Grant()
        grant = self._access.admit(headers)
        if self._num_requests >= self._max_requests:
            grant.release()
            text = f"{self._max_requests} requests are under way in this proxy (max_requests_in_flight)"
            raise ApiError(429, text, code="rate_limit_exceeded", retry_after_s=1.0)
        return grant

    async def serve(self, passage: _Passage) -> None:
        """The application's part."""
        self._num_requests += 1
        self._metrics.begin()
        try:
            await self._app(passage.scope, passage.receive, passage.send)
        finally:
            self._num_requests -= 1
            route = passage.scope.get("route")
            path = str(getattr(route, "path", "other"))
            self._metrics.end(path, passage.status, time.perf_counter() - passage.began_s)

    def count_refusal(self, error: ApiError) -> None:
        """A request was not let in."""
        self._metrics.refuse(error.status)

    @property
    def max_body_bytes(self) -> int:
        return self._max_body_bytes


class _Passage:
    """One request on its way through."""

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.status = 499
        self.began_s = time.perf_counter()
        self._gateway = gateway
        self._receive = receive
        self._send = send
        self._headers = Headers(scope=scope)
        self._num_body_bytes = 0
        given = self._headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex

    async def run(self) -> None:
        state = self.scope.setdefault("state", {})
        state["request_id"] = self.request_id
        state[DIRECT_SEND] = self._send
        grant = Grant()
        try:
            self._check_length(int(self._headers.get("content-length") or 0))
            state["grant"] = grant = self._gateway.enter(self.scope, self._headers)
            await self._gateway.serve(self)
        except ApiError as error:
            if self.status == 499:
                self._gateway.count_refusal(error)
                await self._refuse(error)
        finally:
            grant.release()
            self._log(grant)

    async def receive(self) -> Message:
        """The application's `receive`; counts the body."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_body_bytes += len(message.get("body", b""))
            try:
                self._check_length(self._num_body_bytes)
            except ApiError as error:
                raise BodyTooLargeError(error) from None
        return message

    async def send(self, message: Message) -> None:
        """The application's `send`; names the request in its answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            if self._gateway.is_draining and self.status != 413:  # which says so anyway
                message["headers"].append((b"connection", b"close"))
        await self._send(message)

    def _check_length(self, num_bytes: int) -> None:
        most = self._gateway.max_body_bytes
        if num_bytes > most:
            raise ApiError(
                413, f"the body is larger than {most} bytes (max_body_bytes)", code="body_too_large"
            )

    async def _refuse(self, error: ApiError) -> None:
        body = compact_json(error.body())
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        if error.status == 401:
            raw.append((b"www-authenticate", b"Bearer"))
        if error.status == 413:
            raw.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})

    def _log(self, grant: Grant) -> None:
        level = logging.DEBUG if self.status < 400 else logging.INFO
        logger.log(
            level,
            "request=%s %s %s status=%d key=%s seconds=%.3f",
            self.request_id,
            self.scope["method"],
            self.scope["path"],
            self.status,
            grant.name or "-",
            time.perf_counter() - self.began_s,
        )
