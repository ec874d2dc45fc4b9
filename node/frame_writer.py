"""The one writer of an `Attach` stream: merges what waits, heartbeats, adds load and KV events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvrelay.codec.cluster import TokenBatchEncoder, encode_node_frame
from kvrelay.core.clock import Clock
from kvrelay.core.node_messages import NodeFrame, NodeLoad, Report, Welcome
from kvrelay.core.tokenizer_chunk import split_tokenizer
from kvrelay.node.attach_stream import AttachStream
from kvrelay.node.events import TokenColumns
from kvrelay.node.kv_feed import KVCursor
from kvrelay.node.next_frame import NextFrame


class FrameWriter:
    """Writes from `run` until it is cancelled, or until `finish` and all that waits is out.

    `read_load` gives the node's load when a frame is to carry it, `kv` at most one KV event for each frame.
    `tokenizer`, if given, goes first.
    """

    def __init__(
        self,
        stream: AttachStream,
        welcome: Welcome,
        read_load: Callable[[], NodeLoad],
        clock: Clock,
        *,
        max_pending_tokens: int,
        load_interval_s: float,
        tokenizer: bytes | None,
        kv: KVCursor,
    ) -> None:
        self._stream = stream
        self._heartbeat_s = welcome.heartbeat_s
        self._tokenizer = tokenizer
        self._next = NextFrame(
            read_load,
            clock,
            max_pending_tokens=max_pending_tokens,
            load_interval_s=load_interval_s,
            kv=kv,
        )
        self._load_ride_s = load_interval_s / 2
        self._wake = asyncio.Event()
        self._load_timer: asyncio.TimerHandle | None = None
        self._is_finishing = False

    def send(self, tokens: TokenColumns | None, reports: tuple[Report, ...]) -> None:
        """Queue for the next frame.

        Raises:
            Overloaded: the router reads too slowly.
        """
        self._next.add(tokens, reports)
        self._wake.set()

    def load_changed(self) -> None:
        """Tell the load as soon as it may be told again: with the next frame, or by itself if none comes
        within half a load interval."""
        if self._load_timer is None and not self._next.is_load_due:
            delay_s = self._next.load_due_in_s()
            self._load_timer = asyncio.get_running_loop().call_later(delay_s, self._on_load_due)

    def kv_changed(self) -> None:
        """There are KV events to be told."""
        self._wake.set()

    def send_kv_snapshot(self) -> None:
        """Tell all that the node's prefix cache holds."""
        self._next.restart_kv()
        self._wake.set()

    def finish(self) -> None:
        """End this side of the stream when all that waits is out."""
        self._is_finishing = True
        self._wake.set()

    def stop(self) -> None:
        """Nothing more is written."""
        self._forget_load_timer()

    def _forget_load_timer(self) -> None:
        if self._load_timer is not None:
            self._load_timer.cancel()
            self._load_timer = None

    def _on_load_due(self) -> None:
        self._next.is_load_due = True
        self._load_timer = asyncio.get_running_loop().call_later(self._load_ride_s, self._on_no_ride)

    def _on_no_ride(self) -> None:
        self._load_timer = None
        self._wake.set()

    async def run(self) -> None:
        """Write until told to end.

        Raises:
            grpc.aio.AioRpcError: the stream is broken.
        """
        encode_tokens = TokenBatchEncoder().encode
        if self._tokenizer is not None:
            for chunk in split_tokenizer(self._tokenizer):
                await self._stream.write(encode_node_frame(NodeFrame(tokenizer=chunk)))
        while True:
            is_heartbeat = not await self._woken()
            frame = self._next_frame(is_heartbeat)
            if frame is not None:
                await self._stream.write(encode_node_frame(frame, encode_tokens))
            if self._is_finishing and self._next.is_outbox_empty:
                await self._stream.done_writing()
                return

    async def _woken(self) -> bool:
        """False if there was nothing to tell for a whole heartbeat."""
        if self._next.has_more_kv:
            return True
        try:
            async with asyncio.timeout(self._heartbeat_s):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        return True

    def _next_frame(self, is_heartbeat: bool) -> NodeFrame | None:
        if is_heartbeat or self._next.is_load_due:
            self._forget_load_timer()
        return self._next.take(is_heartbeat=is_heartbeat)
