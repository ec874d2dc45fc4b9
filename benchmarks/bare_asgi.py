"""The ceiling for a proxy: an ASGI application that streams given bytes from memory, on the same server.

    python -m benchmarks.bare_asgi READY_FILE --events FILE --step-ms 20

`events` holds one recorded answer, an event a line. Every stream writes its next event when the step's clock
ticks (with ``--step-ms 0`` at once), so the pace is that of a decode step. It also answers whole bodies: the
path /whole gives all events in one piece.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

import uvicorn

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")],
}


class BareApp:
    """Reads the request's body, and knows nothing of it."""

    def __init__(self, parts: list[bytes], step_s: float) -> None:
        self._parts = parts
        self._step_s = step_s
        self._tick: asyncio.Future[None] | None = None
        self._clock: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        await send(START)
        if scope["path"] == "/whole":
            await send({"type": "http.response.body", "body": b"".join(self._parts)})
            return
        for part in self._parts:
            if self._step_s:
                await self._next_tick()
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _next_tick(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        if self._clock is None:
            self._clock = loop.create_task(self._run_clock())
        if self._tick is None:
            self._tick = loop.create_future()
        return self._tick

    async def _run_clock(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            tick, self._tick = self._tick, None
            if tick is not None:
                tick.set_result(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ready_file", type=Path)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--step-ms", type=float, default=20.0)
    args = parser.parse_args()
    parts = [bytes.fromhex(line) for line in args.events.read_text().split()]
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    partial = args.ready_file.with_suffix(".partial")
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    partial.write_text(json.dumps({"pid": os.getpid(), "http_address": address}))
    partial.replace(args.ready_file)
    config = uvicorn.Config(
        BareApp(parts, args.step_ms / 1e3),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
    )
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
