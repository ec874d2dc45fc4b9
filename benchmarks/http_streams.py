"""Asks an HTTP server for streams as cheaply as can be, and counts their events.

    python -m benchmarks.http_streams HOST:PORT --streams 256 --seconds 8 --body FILE

Each connection sends the body and counts what comes back until time is up; a stream that ends is asked for
again. Prints one JSON object: events, answers, failures, seconds. The first second does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from pathlib import Path
from typing import cast

import uvloop

WARM_UP_S = 1.0


class Reader(asyncio.Protocol):
    """One connection: request after request."""

    def __init__(self, counts: Counts, request: bytes) -> None:
        self._counts = counts
        self._request = request
        self._transport: asyncio.Transport | None = None
        self._is_first = True
        self._is_whole = False
        self._num_bytes_left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        if self._is_first:
            self._begin(data)
        self._num_bytes_left -= len(data)
        self._counts.num_events += data.count(b"data: ")
        if self._num_bytes_left <= 0 if self._is_whole else data.endswith(b"0\r\n\r\n"):
            self._counts.num_answers += 1
            self._ask()

    def _begin(self, data: bytes) -> None:
        self._is_first = False
        head, _, _ = data.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            self._counts.fail(data)
        found = re.search(rb"content-length: (\d+)", head)
        self._is_whole = found is not None
        self._num_bytes_left = len(head) + 4 + int(found[1]) if found else 0

    def _ask(self) -> None:
        assert self._transport is not None
        self._is_first = True
        self._transport.write(self._request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Counts:
    """Of all connections."""

    def __init__(self) -> None:
        self.num_events = self.num_answers = self.num_failed = 0

    def fail(self, data: bytes) -> None:
        """An answer that is none; the first is shown."""
        self.num_failed += 1
        if self.num_failed == 1:
            print(data[:500], file=sys.stderr)


async def read_streams(args: argparse.Namespace) -> dict[str, float]:
    """Open the streams, wait, count."""
    host, port = args.address.rsplit(":", 1)
    body = args.body.read_bytes()
    head = (
        f"POST {args.path} HTTP/1.1\r\nhost: {args.address}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    counts = Counts()
    loop = asyncio.get_running_loop()
    readers = [Reader(counts, head.encode() + body) for _ in range(args.streams)]
    for reader in readers:
        await loop.create_connection(lambda reader=reader: reader, host, int(port))
    await asyncio.sleep(WARM_UP_S)
    began_s, before = time.perf_counter(), (counts.num_events, counts.num_answers)
    args.began.write_text("x")
    await asyncio.sleep(args.seconds)
    args.began.unlink()
    seconds = time.perf_counter() - began_s
    found = {
        "events": counts.num_events - before[0],
        "answers": counts.num_answers - before[1],
        "failed": counts.num_failed,
        "seconds": seconds,
    }
    for reader in readers:
        reader.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--body", type=Path, required=True)
    parser.add_argument("--began", type=Path, required=True, help="a file that is there while it counts")
    parser.add_argument("--path", default="/v1/chat/completions")
    print(json.dumps(uvloop.run(read_streams(parser.parse_args()))))


if __name__ == "__main__":
    main()
