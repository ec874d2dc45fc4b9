"""How an answer leaves: as a stream whose first part decides the status, or as one JSON object."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kvrelay.openai_proxy.errors import ApiError
from kvrelay.openai_proxy.event_stream import ErrorEvent, EventSource, EventStream, Write, while_connected
from kvrelay.openai_proxy.sse import compact_json, event


def json_answer(value: dict[str, Any]) -> Response:
    """One JSON object."""
    return Response(compact_json(value), media_type="application/json")


def error_event(error: ApiError) -> bytes:
    """What OpenAI's clients raise when they meet it in a stream."""
    return event(error.body())


async def stream_answer(
    request: Request, source: EventSource, on_error: ErrorEvent = error_event
) -> EventStream:
    """A stream of the source's events, once its first is here: until then an error still has a status of
    its own.

    Raises:
        KVRelayError: the request can't be served.
        ClientGoneError: the caller has gone; `source` is closed.
    """
    try:
        first = await while_connected(request, source.first())
    except BaseException:
        await source.aclose()
        raise
    return EventStream(first, source, on_error, request.app.state.service.burst)


class GeneratedEvents:
    """The events of a generator."""

    def __init__(self, parts: AsyncGenerator[bytes, None]) -> None:
        self._parts = parts

    async def first(self) -> bytes:
        """The first event."""
        return await anext(self._parts)

    async def rest(self, write: Write) -> None:
        """Write all that follow."""
        async for part in self._parts:
            pending = write(part)
            if pending is not None:
                await pending

    async def aclose(self) -> None:
        """End the generator."""
        await self._parts.aclose()
