"""Answers that notice when their reader goes: server-sent events, and answers in one piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import suppress
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class ClientGoneError(Exception):
    """The caller closed the connection; there is nobody to answer."""


class EventStream(Response):
    """Writes the events of `parts` as they come. However it ends, `parts` is closed, which frees what its
    request holds; when the reader goes, at once."""

    def __init__(self, parts: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(wait_gone(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            await end_tasks(writing, leaving)
            await self._parts.aclose()

    async def _write(self, send: Send) -> None:
        headers = [*_HEADERS, *(pair for pair in self.raw_headers if pair[0] != b"content-length")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


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
