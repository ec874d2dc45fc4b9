"""One router as a node sees it: dial, attach, listen, and dial again when the stream is lost."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from random import Random
from typing import Final, Protocol

import grpc

from kvrelay.codec.cluster import decode_router_frame, decode_welcome, encode_hello
from kvrelay.core.clock import Clock
from kvrelay.core.errors import KVRelayError, RouterUnavailable
from kvrelay.core.node_messages import NodeDescription, NodeLoad, Report, RouterFrame, Welcome
from kvrelay.node.attach_stream import AttachStream
from kvrelay.node.backoff import Backoff
from kvrelay.node.config import NodeConfig
from kvrelay.node.events import TokenColumns
from kvrelay.node.frame_writer import FrameWriter
from kvrelay.node.kv_feed import KVFeed

logger = logging.getLogger(__name__)

CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    # Every attempt dials anew: a channel shared with one that just failed would answer from its backoff.
    ("grpc.use_local_subchannel_pool", 1),
)
LEAVE_TIMEOUT_S: Final = 2.0


class LinkOwner(Protocol):
    """Who hears from a link. All calls come on the event loop."""

    def on_welcome(self, link: RouterLink, welcome: Welcome) -> None: ...

    def on_router_frame(self, router_epoch: int, frame: RouterFrame) -> None: ...

    def on_stream_lost(self, link: RouterLink, router_epoch: int) -> None: ...

    def current_load(self) -> NodeLoad: ...

    def on_crash(self, error: BaseException) -> None: ...


class RouterLink:
    """Keeps this node attached to the router at `address` until it is told to leave."""

    def __init__(
        self,
        address: str,
        config: NodeConfig,
        description: NodeDescription,
        tokenizer: bytes | None,
        kv_feed: KVFeed,
        owner: LinkOwner,
        clock: Clock,
        rng: Random,
    ) -> None:
        self.address = address
        self._config = config
        self._hello = encode_hello(description)
        self._tokenizer = tokenizer
        self._kv_feed = kv_feed
        self._owner = owner
        self._clock = clock
        self._backoff = Backoff(config.reconnect_initial_s, config.reconnect_max_s, rng)
        self._writer: FrameWriter | None = None
        self._close_reason: asyncio.Future[str] | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_leaving = False
        self._last_fault = ""

    def start(self) -> None:
        """Begin to dial."""
        self._task = asyncio.create_task(self._run(), name=f"router {self.address}")
        self._task.add_done_callback(self._on_done)

    def send(self, tokens: TokenColumns | None, reports: tuple[Report, ...]) -> None:
        """Tell the router; dropped if it is not attached. Ends the stream if the router reads too slowly."""
        if self._writer is None:
            return
        try:
            self._writer.send(tokens, reports)
        except KVRelayError as error:
            self.close_stream(error.message)

    def load_changed(self) -> None:
        """The node's load is to be told again."""
        if self._writer is not None:
            self._writer.load_changed()

    def kv_changed(self) -> None:
        """The feed has KV events that were not told yet."""
        if self._writer is not None:
            self._writer.kv_changed()

    def send_kv_snapshot(self) -> None:
        """Tell the router all that the prefix cache holds; dropped if it is not attached: a new stream begins
        with that."""
        if self._writer is not None:
            self._writer.send_kv_snapshot()

    def close_stream(self, reason: str) -> None:
        """End the stream that is open now, if there is one; the link dials again."""
        if self._close_reason is not None and not self._close_reason.done():
            self._close_reason.set_result(reason)

    async def leave(self, *, at_once: bool = False) -> None:
        """Send what waits, end the stream, and don't dial again. Bounded by `LEAVE_TIMEOUT_S`."""
        self._is_leaving = True
        if self._task is None:
            return
        if self._writer is not None and not at_once:
            self._writer.finish()
            await asyncio.wait([self._task], timeout=LEAVE_TIMEOUT_S)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._owner.on_crash(error)

    # ---- one stream after another ------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._is_leaving:
            attached_s = self._clock.now_s()
            try:
                fault = await self._attach()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, KVRelayError, TimeoutError) as error:
                fault = _describe(error)
            if self._is_leaving:
                return
            if self._clock.now_s() - attached_s > self._config.reconnect_max_s:
                self._backoff.reset()
            delay_s = self._backoff.next_delay_s()
            level = logging.DEBUG if fault == self._last_fault else logging.WARNING
            logger.log(level, "router=%s is not attached: %s; retrying", self.address, fault)
            self._last_fault = fault
            await asyncio.sleep(delay_s)

    async def _attach(self) -> str:
        """One stream from hello to its end; returns why it ended."""
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            stream = AttachStream(channel)
            try:
                async with asyncio.timeout(self._config.connect_timeout_s):
                    welcome = await self._greet(stream)
                return await self._serve(stream, welcome)
            finally:
                stream.cancel()

    async def _greet(self, stream: AttachStream) -> Welcome:
        await stream.write(self._hello)
        first = await stream.read()
        if first is None:
            raise RouterUnavailable(await stream.why_ended())
        return decode_welcome(first)

    async def _serve(self, stream: AttachStream, welcome: Welcome) -> str:
        config, epoch = self._config, welcome.router_epoch
        self._writer = FrameWriter(
            stream,
            welcome,
            self._owner.current_load,
            self._clock,
            max_pending_tokens=config.max_pending_tokens,
            load_interval_s=config.load_interval_s,
            tokenizer=self._tokenizer if welcome.wants_tokenizer else None,
            kv=self._kv_feed.cursor(),
        )
        self._close_reason = asyncio.get_running_loop().create_future()
        logger.info("attached router=%s router_id=%s epoch=%016x", self.address, welcome.router_id, epoch)
        self._last_fault = ""
        self._owner.on_welcome(self, welcome)
        try:
            return await self._until_ended(stream, self._writer, self._close_reason, epoch)
        finally:
            self._writer.stop()
            self._writer = self._close_reason = None
            self._owner.on_stream_lost(self, epoch)

    async def _until_ended(
        self, stream: AttachStream, writer: FrameWriter, close_reason: asyncio.Future[str], epoch: int
    ) -> str:
        reading = asyncio.create_task(self._read(stream, epoch))
        writing = asyncio.create_task(writer.run())
        ends: set[asyncio.Future[str] | asyncio.Future[None]] = {reading, writing, close_reason}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if close_reason.done():
                return close_reason.result()
            if writing.done() and not self._is_leaving:
                await writing
            return await reading
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)

    async def _read(self, stream: AttachStream, epoch: int) -> str:
        while (received := await stream.read()) is not None:
            self._owner.on_router_frame(epoch, decode_router_frame(received))
        return await stream.why_ended()


def _describe(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {error.details() or ''}".rstrip()
    if isinstance(error, KVRelayError):
        return error.message
    if isinstance(error, asyncio.InvalidStateError):
        return "the stream broke while it was written to"
    return "no answer within connect_timeout_s"
