"""How an answer leaves: as a stream whose first part decides the status, or as one JSON object."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kvrelay.openai_proxy.errors import ApiError
from kvrelay.openai_proxy.event_stream import ErrorEvent, EventStream, while_connected
from kvrelay.openai_proxy.sse import compact_json, event


def json_answer(value: dict[str, Any]) -> Response:
    """One JSON object."""
    return Response(compact_json(value), media_type="application/json")


def error_event(error: ApiError) -> bytes:
    """What OpenAI's clients raise when they meet it in a stream."""
    return event(error.body())


async def stream_answer(
    request: Request, parts: AsyncGenerator[bytes, None], on_error: ErrorEvent = error_event
) -> EventStream:
    """A stream of `parts`, once its first is here: until then an error still has a status of its own.

    Raises:
        KVRelayError: the request can't be served.
        ClientGoneError: the caller has gone; `parts` is closed.
    """
    try:
        first = await while_connected(request, _first(parts))
    except BaseException:
        await parts.aclose()
        raise
    return EventStream(first, parts, on_error)


async def _first(parts: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(parts)
