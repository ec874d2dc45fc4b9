"""Nodes that compute nothing and cost as little as possible, in a process of their own: what remains is the
router's cost. They speak `Attach`, to a router or to the bare relay.

    python -m benchmarks.fake_nodes ROUTER_ADDRESS --decode-nodes 1 --step-ms 20
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import grpc
import uvloop

from kvrelay.codec.cluster import (
    TokenBatchEncoder,
    decode_router_frame,
    encode_hello,
    encode_node_frame,
    encode_token_batch,
)
from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.kv_events import KVChanges, KVEvent
from kvrelay.core.node_messages import (
    AttemptCommand,
    AttemptFinished,
    HandoffVerified,
    KVReleased,
    NodeDescription,
    NodeFrame,
    PrefillFinished,
    Report,
    Reserved,
    ReserveDecode,
    Role,
    SendKVSnapshot,
    StartPrefill,
    TokenBatch,
)
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.v1 import cluster_pb2_grpc

END = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs
HOLDS_NOTHING = NodeFrame(kv=KVEvent(1, 0, KVChanges(cleared=True)))
"""Or the router would hash every prompt to guess what the node holds."""
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 64 << 20),)


class FakeNodes:
    """One prefill and some decode nodes whose engines take no time but the paced step's. With `full_rows`
    every frame has all its columns, as the bare relay needs them."""

    def __init__(self, address: str, num_decode: int, step_s: float, *, full_rows: bool) -> None:
        self._address = address
        self._full_rows = full_rows
        self._num_decode = num_decode
        self._step_s = step_s
        self._prefilled: set[int] = set()
        self._reserved: dict[int, tuple[Any, TokenRequest]] = {}
        self._running: dict[Any, dict[int, list[int]]] = {}
        self._frames: dict[Any, asyncio.Queue[NodeFrame]] = {}

    async def run(self) -> None:
        stub = cluster_pb2_grpc.ClusterStub(  # type: ignore[no-untyped-call]
            grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        )
        nodes = [(Role.PREFILL, "p0")] + [(Role.DECODE, f"d{i}") for i in range(self._num_decode)]
        async with asyncio.TaskGroup() as group:
            for role, name in nodes:
                call = stub.Attach()
                await call.write(encode_hello(_describe(name, role)))
                await call.read()
                self._frames[call] = asyncio.Queue(maxsize=1024)
                await self._send(call, HOLDS_NOTHING)
                group.create_task(self._write(call))
                group.create_task(self._read(call))
                group.create_task(self._beat(call))
                if role is Role.DECODE:
                    self._running[call] = {}
                    group.create_task(self._decode(call))

    async def _write(self, call: Any) -> None:
        encode_tokens = encode_token_batch if self._full_rows else TokenBatchEncoder().encode
        while True:
            await call.write(encode_node_frame(await self._frames[call].get(), encode_tokens))

    async def _send(self, call: Any, frame: NodeFrame) -> None:
        await self._frames[call].put(frame)

    async def _read(self, call: Any) -> None:
        while (received := await call.read()) is not END:
            for command in decode_router_frame(received).commands:
                assert not isinstance(command, SendKVSnapshot), "nothing was missing"
                await self._obey(call, command)

    async def _obey(self, call: Any, command: AttemptCommand) -> None:
        attempt = command.attempt
        if isinstance(command, StartPrefill):
            batch = TokenBatch([attempt], [command.request.num_output_tokens], [1], [7])
            reports: tuple[Report, ...] = (PrefillFinished(attempt, 0, 0.0, 0.0), KVReleased(attempt))
            await self._send(call, NodeFrame(batch, reports))
            self._prefilled.add(attempt)
        elif isinstance(command, ReserveDecode):
            self._reserved[attempt] = (call, command.request)
            await self._send(call, NodeFrame(reports=(Reserved(attempt, 0),)))
        else:
            self._running.get(call, {}).pop(attempt, None)
            await self._send(call, NodeFrame(reports=(KVReleased(attempt),)))
        self._hand_off()

    def _hand_off(self) -> None:
        for attempt in self._prefilled & self._reserved.keys():
            self._prefilled.discard(attempt)
            call, request = self._reserved.pop(attempt)
            self._running[call][attempt] = [request.num_output_tokens + 1, request.sampling.max_tokens]

    async def _beat(self, call: Any) -> None:
        while True:
            await asyncio.sleep(1.0)
            await self._send(call, HOLDS_NOTHING)

    async def _decode(self, call: Any) -> None:
        running, verified = self._running[call], set[int]()
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + self._step_s, time.monotonic() - self._step_s)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if not running:
                continue
            fresh = running.keys() - verified
            verified |= fresh
            reports: list[Report] = [
                HandoffVerified(AttemptId(attempt), 1, 1, 0.0, "fake") for attempt in fresh
            ]
            attempts = list(running)
            indices = [state[0] for state in running.values()]
            for attempt in attempts:
                state = running[attempt]
                state[0] += 1
                if state[0] >= state[1]:
                    del running[attempt]
                    verified.discard(attempt)
                    reports.append(AttemptFinished(AttemptId(attempt), FinishReason.LENGTH))
            batch = TokenBatch(attempts, indices, [1] * len(attempts), [7] * len(attempts))
            await self._send(call, NodeFrame(batch, tuple(reports)))


def _describe(name: str, role: Role) -> NodeDescription:
    return NodeDescription(
        node_id=NodeId(name),
        incarnation=1,
        role=role,
        model="m",
        engine="fake",
        fingerprint=KVFingerprint("m", "float32", 1, 1, 1, ""),
        vocab_size=50_000,
        max_model_len=1 << 20,
        num_blocks=1 << 20,
        block_size=16,
        max_num_seqs=1024,
        transfer_address="127.0.0.1:9" if role is Role.DECODE else "",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--decode-nodes", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=20.0, help="a decode step; 0 is unpaced")
    parser.add_argument("--full-rows", action="store_true", help="for the bare relay")
    args = parser.parse_args()
    nodes = FakeNodes(args.address, args.decode_nodes, args.step_ms / 1e3, full_rows=args.full_rows)
    uvloop.run(nodes.run())


if __name__ == "__main__":
    main()
