"""One `Attach` call, typed: what the link and the writer need of gRPC."""

from __future__ import annotations

from typing import Final, cast

import grpc

from kvrelay.v1 import cluster_pb2, cluster_pb2_grpc

_END: Final[object] = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs


class AttachStream:
    """Reads, writes and ends one call on `channel`.

    `read` and `write` raise `grpc.aio.AioRpcError` or `asyncio.InvalidStateError` on a broken call.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        stub = cluster_pb2_grpc.ClusterStub(channel)  # type: ignore[no-untyped-call]
        self._call: grpc.aio.StreamStreamCall[cluster_pb2.NodeFrame, cluster_pb2.RouterFrame] = stub.Attach()

    async def read(self) -> cluster_pb2.RouterFrame | None:
        """The router's next frame; None when it has ended the call."""
        received: object = await self._call.read()
        return None if received is _END else cast(cluster_pb2.RouterFrame, received)

    async def write(self, frame: cluster_pb2.NodeFrame) -> None:
        """Returns when gRPC has taken the frame: this is where a slow router is felt."""
        await self._call.write(frame)

    async def done_writing(self) -> None:
        """End this side; the router ends the other."""
        await self._call.done_writing()

    async def why_ended(self) -> str:
        """The router's status, readable."""
        code, details = await self._call.code(), await self._call.details()
        return f"the router ended the stream: {code.name} {details or ''}".rstrip()

    def cancel(self) -> None:
        """End both sides now; no-op on a call that has ended."""
        self._call.cancel()
