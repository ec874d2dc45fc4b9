"""One router address: its channel, dialled when first needed and again after a loss, and its session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import grpc

from kvrelay.client.config import ClientConfig
from kvrelay.client.router_stub import RouterStub, make_router_stub
from kvrelay.client.session import Session
from kvrelay.core.errors import RouterUnavailable
from kvrelay.v1 import router_pb2

_READY: Final = grpc.ChannelConnectivity.READY
_HOPELESS: Final = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)


class RouterLink:
    """Used on one event loop. Who dials is shared: any number may `connect` at once."""

    def __init__(self, address: str, config: ClientConfig, now_s: Callable[[], float]) -> None:
        self.address = address
        self._config = config
        self._now_s = now_s
        self._channel: grpc.aio.Channel | None = None
        self._stub: RouterStub | None = None
        self._sessions: list[Session] = []
        self._dialling: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Return once there is a connection.

        Raises:
            RouterUnavailable: there is none to be had; says why.
        """
        if self._channel is not None and self._channel.get_state() is _READY:
            return
        if self._dialling is None:
            self._dialling = asyncio.create_task(self._dial(), name=f"kvrelay dial {self.address}")
            self._dialling.add_done_callback(self._dialled)
        await asyncio.shield(self._dialling)

    @property
    def stub(self) -> RouterStub:
        """For unary calls, after `connect`."""
        assert self._stub is not None, "connect first"
        return self._stub

    def session(self) -> Session:
        """The stream that all requests share, opened if there is none. After `connect`."""
        if not self._sessions or not self._sessions[-1].takes_calls:
            self._sessions.append(Session(self.stub.Session(), self.address, self._now_s))
        return self._sessions[-1]

    async def close(self) -> None:
        """End everything; calls in flight are cancelled."""
        if self._dialling is not None:
            self._dialling.cancel()
            await asyncio.wait([self._dialling])
        await self._drop_channel()

    async def _dial(self) -> None:
        await self._drop_channel()
        channel = grpc.aio.insecure_channel(self.address, options=_channel_options(self._config))
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                await _wait_ready(channel)
        except TimeoutError:
            await channel.close(None)
            raise RouterUnavailable(f"no answer within {self._config.connect_timeout_s:g} s") from None
        except BaseException:
            await channel.close(None)
            raise
        self._channel, self._stub = channel, make_router_stub(channel)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dialling = None
        if not task.cancelled():
            task.exception()  # those who wait have it; nobody may be left to wait

    async def _drop_channel(self) -> None:
        sessions, self._sessions = self._sessions, []
        channel, self._channel, self._stub = self._channel, None, None
        for session in sessions:
            await session.close()
        if channel is not None:
            await channel.close(None)


async def _wait_ready(channel: grpc.aio.Channel) -> None:
    state = channel.get_state(try_to_connect=True)
    while state is not _READY:
        if state in _HOPELESS:
            raise RouterUnavailable(await _why_not(channel))
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)


async def _why_not(channel: grpc.aio.Channel) -> str:
    """A channel's state says nothing of the reason; a call that fails on it does."""
    stub = make_router_stub(channel)
    try:
        await stub.ListModels(router_pb2.ListModelsRequest(), timeout=1.0)
    except grpc.aio.AioRpcError as error:
        return error.details() or error.code().name
    return "it was unreachable for a moment"


def _channel_options(config: ClientConfig) -> list[tuple[str, int]]:
    return [
        # Each dial is a fresh try: gRPC's own back-off would otherwise live on in a shared connection.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", round(config.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        # What ends the connection when no answer comes; a minute unless given, whatever stands above.
        ("grpc.http2.ping_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        # Pings go out only while a call is open, as often as wanted.
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
    ]
