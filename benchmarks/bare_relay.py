"""A relay that does nothing but relay: what grpc.aio itself costs, to set the router's figures beside.

It takes the same frames from the same fake nodes and sends the same columns to the same client, but keeps
no books, checks nothing and survives nothing. One session, one prefill and some decode nodes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import grpc
import uvloop

from kvrelay.v1 import cluster_pb2, cluster_pb2_grpc, router_pb2, router_pb2_grpc

_END = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs


class BareRelay(cluster_pb2_grpc.ClusterServicer, router_pb2_grpc.RouterServicer):
    """Both services, as far as the benchmark calls them. A stream's id serves as its attempt's."""

    def __init__(self) -> None:
        self._prefill: Any = None
        self._decode: list[Any] = []
        self._updates: asyncio.Queue[router_pb2.SessionResponse] = asyncio.Queue()

    async def Attach(self, requests: Any, context: Any) -> None:  # noqa: N802
        hello = (await context.read()).hello
        welcome = cluster_pb2.Welcome(router_id="bare", router_epoch=1, heartbeat_s=1.0, lease_s=15.0)
        await context.write(cluster_pb2.RouterFrame(welcome=welcome))
        if hello.role == cluster_pb2.ROLE_PREFILL:
            self._prefill = context
        else:
            self._decode.append(context)
        while (frame := await context.read()) is not _END:
            if frame.HasField("tokens"):
                tokens = frame.tokens
                update = router_pb2.SessionResponse(
                    stream_ids=tokens.attempts, counts=tokens.counts, token_ids=tokens.token_ids
                )
                self._updates.put_nowait(update)

    async def Session(self, requests: Any, context: Any) -> None:  # noqa: N802
        ask = await context.read()
        starts: list[cluster_pb2.Command] = []
        reserves: list[list[cluster_pb2.Command]] = [[] for _ in self._decode]
        for entry in ask.generate:
            request = cluster_pb2.TokenRequest(
                token_ids=entry.request.prompt_token_ids,
                num_prompt_tokens=len(entry.request.prompt_token_ids),
                sampling=entry.request.sampling,
            )
            attempt = entry.stream_id + 1
            start = cluster_pb2.StartPrefill(request=request, decode_address="x")
            reserve = cluster_pb2.ReserveDecode(request=request)
            starts.append(cluster_pb2.Command(attempt=attempt, start_prefill=start))
            reserves[attempt % len(reserves)].append(
                cluster_pb2.Command(attempt=attempt, reserve_decode=reserve)
            )
        for node, commands in zip(self._decode, reserves, strict=True):
            await node.write(cluster_pb2.RouterFrame(commands=commands))
        await self._prefill.write(cluster_pb2.RouterFrame(commands=starts))
        while True:
            await context.write(await self._updates.get())

    async def WatchCluster(self, request: Any, context: Any) -> None:  # noqa: N802
        while True:
            nodes = [router_pb2.NodeState(node_id=f"d{i}", role="decode") for i in range(len(self._decode))]
            if self._prefill is not None:
                nodes.append(router_pb2.NodeState(node_id="p0", role="prefill"))
            await context.write(router_pb2.ClusterState(nodes=nodes))
            await asyncio.sleep(0.1)


async def serve(ready_file: Path) -> None:
    """Serve on a free port until killed."""
    server = grpc.aio.server()
    relay = BareRelay()
    cluster_pb2_grpc.add_ClusterServicer_to_server(relay, server)  # type: ignore[no-untyped-call]
    router_pb2_grpc.add_RouterServicer_to_server(relay, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gc.freeze()
    partial = ready_file.with_suffix(".partial")
    partial.write_text(json.dumps({"pid": os.getpid(), "grpc_address": f"127.0.0.1:{port}"}))
    partial.replace(ready_file)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1])))
