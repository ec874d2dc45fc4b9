"""Events of many streams, sent in bursts.

In steady decode a step brings one token to every stream. Making all their events first and sending them all
afterwards keeps what each of the two needs in the processor's caches, and a reader of many streams awake.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from starlette.types import Send

from kvrelay.openai_proxy.eager import start_now


class Burst:
    """What one worker's streams have to send. Used on one event loop."""

    def __init__(self) -> None:
        self._writers: list[BurstWriter] = []

    def add(self, writer: BurstWriter) -> None:
        """Flush this writer once everything that is ready now has run."""
        if not self._writers:
            asyncio.get_running_loop().call_soon(self._flush)
        self._writers.append(writer)

    def _flush(self) -> None:
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.flush()


class BurstWriter:
    """Writes one stream's body. Bounded: `write` asks to be waited for while the connection is full."""

    __slots__ = ("_burst", "_error", "_events", "_send", "_waits")

    def __init__(self, send: Send, burst: Burst) -> None:
        self._send = send
        self._burst = burst
        self._events = b""
        self._waits: Awaitable[None] | None = None
        self._error: Exception | None = None

    def write(self, event: bytes) -> Awaitable[None] | None:
        """Have it sent soon; returns what to wait for before the next one, None: nothing.

        Raises what sending an earlier one raised.
        """
        if self._error is not None:
            raise self._error
        if not self._events:
            self._burst.add(self)
        self._events += event
        return None if self._waits is None else self.drain()

    def flush(self) -> None:
        """Send what there is, unless the connection is full."""
        if self._waits is not None or not self._events:
            return
        events, self._events = self._events, b""
        try:
            self._waits = start_now(
                self._send({"type": "http.response.body", "body": events, "more_body": True})
            )
        except Exception as error:  # it is this stream's alone; the other writers go on
            self._error = error

    async def drain(self) -> None:
        """Return when all has been sent. Raises what sending raises."""
        while self._waits is not None or self._events:
            if self._waits is not None:
                await self._waits
                self._waits = None
            self.flush()
        if self._error is not None:
            raise self._error
