"""How an answer leaves: as a stream whose first part decides the status, or as one JSON object."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kvrelay.core.errors import KVRelayError
from kvrelay.openai_proxy.errors import ApiError, from_kvrelay
from kvrelay.openai_proxy.event_stream import EventStream, while_connected
from kvrelay.openai_proxy.sse import compact_json, event

logger = logging.getLogger(__name__)

ErrorEvent = Callable[[ApiError], bytes]


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
    return EventStream(_all(first, parts, on_error))


async def _first(parts: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(parts)


async def _all(
    first: bytes, parts: AsyncGenerator[bytes, None], on_error: ErrorEvent
) -> AsyncGenerator[bytes, None]:
    try:
        yield first
        async for part in parts:
            yield part
    except KVRelayError as error:
        yield on_error(from_kvrelay(error))
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except Exception:  # the stream's outermost frame: its reader is told, the log has the rest
        logger.exception("a stream failed")
        yield on_error(ApiError(500, "the proxy failed; its log says why"))
    finally:
        await parts.aclose()
