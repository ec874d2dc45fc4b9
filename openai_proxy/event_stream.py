"""Answers that notice when their reader goes: server-sent events, and answers in one piece."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvrelay.core.errors import KVRelayError
from kvrelay.openai_proxy.burst_writer import Burst, BurstWriter
from kvrelay.openai_proxy.errors import ApiError, from_kvrelay

T = TypeVar("T")
ErrorEvent = Callable[[ApiError], bytes]
"""How a stream says that it failed."""
Write = Callable[[bytes], Awaitable[None] | None]
"""Writes an event; returns what to wait for before the next one, None: nothing."""
DIRECT_SEND: Final = "direct_send"
"""Where the gateway leaves the server's own `send`, in the scope's state."""
logger = logging.getLogger(__name__)
_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class ClientGoneError(Exception):
    """The caller closed the connection; there is nobody to answer."""


class EventSource(Protocol):
    """Where a stream's events come from."""

    async def first(self) -> bytes:
        """The first event.

        Raises:
            KVRelayError: the request can't be served.
        """
        ...

    async def rest(self, write: Write) -> None:
        """Write all that follow. Raises as `first`."""
        ...

    async def aclose(self) -> None:
        """Cancel what is under way."""
        ...


class EventStream(Response):
    """Writes `first`, then the other events of `source` as they come, and what goes wrong as an event of its
    own. However it ends, `source` is closed, which frees what its request holds; when the reader goes, at
    once."""

    def __init__(self, first: bytes, source: EventSource, on_error: ErrorEvent, burst: Burst) -> None:
        super().__init__()
        self._first = first
        self._source = source
        self._on_error = on_error
        self._burst = burst

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Only the start concerns the layers in between; each of them would cost every token a call.
        write_body = scope["state"].get(DIRECT_SEND, send)
        writing = asyncio.ensure_future(self._write(send, write_body))
        leaving = asyncio.ensure_future(wait_gone(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            await end_tasks(writing, leaving)
            await self._source.aclose()

    async def _write(self, send: Send, write_body: Send) -> None:
        headers = [*_HEADERS, *(pair for pair in self.raw_headers if pair[0] != b"content-length")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await write_body({"type": "http.response.body", "body": self._first, "more_body": True})
        writer = BurstWriter(write_body, self._burst)
        try:
            await self._source.rest(writer.write)
        except KVRelayError as error:
            writer.write(self._on_error(from_kvrelay(error)))
        except Exception:  # the stream's outermost frame: its reader is told, the log has the rest
            logger.exception("a stream failed")
            writer.write(self._on_error(ApiError(500, "the proxy failed; its log says why")))
        await writer.drain()
        await write_body({"type": "http.response.body", "body": b""})


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The outcome of `work`, which is cancelled when the caller goes.

    Raises:
        ClientGoneError: the caller has gone.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(wait_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        await end_tasks(working, leaving)


async def wait_gone(receive: Receive) -> None:
    """Return when the connection is closed. To be called once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def end_tasks(*tasks: asyncio.Future[Any]) -> None:
    """Cancel and await; no outcome goes unread."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
