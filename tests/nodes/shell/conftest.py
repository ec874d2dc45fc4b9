"""Whole nodes in one process: real gRPC and KV transfer, the simulated engine, a router that is a script."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from random import Random

import grpc
import pytest_asyncio

from kvrelay.codec.cluster import (
    TokenBatchDecoder,
    decode_hello,
    decode_node_frame,
    encode_router_frame,
    encode_welcome,
)
from kvrelay.core.ids import AttemptId
from kvrelay.core.kv_events import KVEvent
from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptRefused,
    Command,
    KVReleased,
    NodeDescription,
    NodeFrame,
    NodeLoad,
    ReleaseKV,
    Report,
    ReserveDecode,
    Role,
    RouterFrame,
    StartPrefill,
    Welcome,
)
from kvrelay.core.request import TokenRequest
from kvrelay.core.tokenizer_chunk import TokenizerAssembly
from kvrelay.decode_node.core import DecodeNodeCore
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.engine.sim.engine import SimEngine
from kvrelay.engine.sim.timing import INSTANT, SimTiming
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.kv_transfer.service import KVTransferService
from kvrelay.node.config import NodeConfig
from kvrelay.node.core import NodeCoreConfig
from kvrelay.node.monotonic_clock import MonotonicClock
from kvrelay.node.service import NodeService
from kvrelay.prefill_node.core import PrefillNodeCore
from kvrelay.v1 import cluster_pb2, cluster_pb2_grpc

WAIT_S = 30.0
TERMINAL = (AttemptRefused, AttemptFinished, AttemptFailed, KVReleased)
Outgoing = cluster_pb2.RouterFrame | None
"""None ends the stream."""


@dataclass
class AttachedNode:
    """What a router knows of one stream."""

    description: NodeDescription
    outgoing: asyncio.Queue[Outgoing]
    reports: list[Report] = field(default_factory=list)
    tokens: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    load: NodeLoad | None = None
    num_frames: int = 0
    tokenizer: bytes | None = None
    kv_events: list[KVEvent] = field(default_factory=list)
    is_gone: bool = False

    def send(self, *commands: Command) -> None:
        self.load = None  # what it said before tells nothing of these
        self.outgoing.put_nowait(encode_router_frame(RouterFrame(commands)))

    def terminals(self, attempt: int) -> list[Report]:
        return [
            report for report in self.reports if isinstance(report, TERMINAL) and report.attempt == attempt
        ]

    def has(self, kind: type, attempt: int | None = None) -> bool:
        return any(
            isinstance(report, kind) and (attempt is None or getattr(report, "attempt", None) == attempt)
            for report in self.reports
        )


class FakeRouter(cluster_pb2_grpc.ClusterServicer):
    """Speaks `Attach` and decides nothing: tests send commands and wait for what nodes say."""

    def __init__(self, epoch: int, *, heartbeat_s: float, lease_s: float, wants_tokenizer: bool) -> None:
        self.epoch = epoch
        self.welcome = Welcome(f"router{epoch}", epoch, heartbeat_s, lease_s, wants_tokenizer)
        self.is_silent = False
        self.nodes: dict[str, AttachedNode] = {}
        self.num_streams = 0
        self.address = ""
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None
        self._port = 0

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        cluster_pb2_grpc.add_ClusterServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self.address = f"127.0.0.1:{self._port}"
        await self._server.start()

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.stop(None)
        await self._server.wait_for_termination()

    async def Attach(  # noqa: N802
        self, request_iterator: AsyncIterator[cluster_pb2.NodeFrame], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[cluster_pb2.RouterFrame]:
        description = decode_hello(await anext(request_iterator))
        node = AttachedNode(description, asyncio.Queue())
        self.nodes[description.node_id] = node
        self.num_streams += 1
        yield encode_welcome(self.welcome)
        await self._notify()
        reading = asyncio.create_task(self._read(node, request_iterator))
        try:
            while (frame := await self._next(node)) is not None:
                yield frame
        finally:
            reading.cancel()
            node.is_gone = True
            with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await reading
            await self._notify()

    async def _next(self, node: AttachedNode) -> Outgoing:
        while True:
            try:
                async with asyncio.timeout(self.welcome.heartbeat_s):
                    return await node.outgoing.get()
            except TimeoutError:
                if not self.is_silent:
                    return cluster_pb2.RouterFrame()

    async def _read(self, node: AttachedNode, frames: AsyncIterator[cluster_pb2.NodeFrame]) -> None:
        assembly = TokenizerAssembly(node.description.tokenizer_digest)
        decode_tokens = TokenBatchDecoder().decode
        async for received in frames:
            frame = decode_node_frame(received, decode_tokens)
            if frame.tokenizer is not None:
                node.tokenizer = assembly.add(frame.tokenizer)
            _take(node, frame)
            await self._notify()
        node.outgoing.put_nowait(None)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is looked at whenever a node has said something."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(condition)

    async def node(self, node_id: str) -> AttachedNode:
        await self.until(lambda: node_id in self.nodes and not self.nodes[node_id].is_gone)
        return self.nodes[node_id]

    async def until_idle(self, *nodes: AttachedNode) -> None:
        """Wait until these nodes hold nothing, by their own account."""
        await self.until(lambda: all(_is_idle(node.load) for node in nodes))


def _take(node: AttachedNode, frame: NodeFrame) -> None:
    node.num_frames += 1
    if frame.tokens is not None:
        batch, position = frame.tokens, 0
        for attempt, first, count in zip(batch.attempts, batch.first_indices, batch.counts, strict=True):
            for index in range(first, first + count):
                assert index not in node.tokens[attempt], "a token came twice"
                node.tokens[attempt][index] = batch.token_ids[position]
                position += 1
    node.reports += frame.reports
    node.load = frame.load or node.load
    if frame.kv is not None:
        node.kv_events.append(frame.kv)


def _is_idle(load: NodeLoad | None) -> bool:
    return load is not None and not any(
        (
            load.num_attempts,
            load.num_open_transfers,
            load.num_held_blocks,
            load.num_running,
            load.num_waiting,
            load.num_reserved,
        )
    )


@dataclass
class Workshop:
    """Makes routers and nodes, and closes them when the test ends."""

    stack: AsyncExitStack
    num_routers: int = 0
    services: dict[str, NodeService] = field(default_factory=dict)
    engines: dict[str, SimEngine] = field(default_factory=dict)

    async def router(
        self, *, heartbeat_s: float = 0.1, lease_s: float = 10.0, wants_tokenizer: bool = False
    ) -> FakeRouter:
        self.num_routers += 1
        router = FakeRouter(
            1000 + self.num_routers, heartbeat_s=heartbeat_s, lease_s=lease_s, wants_tokenizer=wants_tokenizer
        )
        await router.start()
        self.stack.push_async_callback(router.stop)
        return router

    async def node(
        self,
        role: Role,
        routers: Iterable[str],
        *,
        timing: SimTiming = INSTANT,
        transport: str = "tcp",
        tokenizer: bytes | None = None,
        engine: SimEngine | None = None,
        **settings: object,
    ) -> NodeService:
        node_id = f"{role.value}{len(self.services)}"
        engine_config = EngineConfig(
            "sim", EngineKind.SIM, num_blocks=256, max_num_seqs=32, max_model_len=2048, sim_timing=timing
        )
        engine = engine if engine is not None else SimEngine(engine_config)
        config = NodeConfig(
            role,
            engine_config,
            routers=tuple(routers),
            transfer=KVTransferConfig(transport=transport, slot_bytes=1 << 16),
            node_id=node_id,
            reconnect_initial_s=0.02,
            reconnect_max_s=0.1,
            load_interval_s=0.02,
        )
        config = replace(config, **settings)  # type: ignore[arg-type]
        core_config = NodeCoreConfig(config.max_attempts_in_flight, engine.info.fingerprint.digest)
        core = PrefillNodeCore(core_config) if role is Role.PREFILL else DecodeNodeCore(core_config)
        service = NodeService(
            config,
            core,
            engine,
            KVTransferService,
            clock=MonotonicClock(),
            tokenizer=tokenizer,
            rng=Random(1),
        )
        await service.start()
        self.services[node_id], self.engines[node_id] = service, engine
        self.stack.push_async_callback(service.close)
        return service


@pytest_asyncio.fixture
async def workshop() -> AsyncIterator[Workshop]:
    async with AsyncExitStack() as stack:
        made = Workshop(stack)
        yield made
        failures = [service.failed.result() for service in made.services.values() if service.failed.done()]
    assert not failures, failures


@dataclass
class Pair:
    """One router, one prefill node, one decode node."""

    router: FakeRouter
    p: AttachedNode
    d: AttachedNode
    p_service: NodeService
    d_service: NodeService
    next_attempt: int = 1

    def start(self, request: TokenRequest) -> int:
        """Dispatch a request to both nodes, as a router does."""
        attempt = AttemptId(self.next_attempt)
        self.next_attempt += 1
        self.d.send(ReserveDecode(attempt, request))
        self.p.send(StartPrefill(attempt, request, self.d_service.transfer_address))
        return attempt

    def release(self, attempt: int) -> None:
        self.d.send(ReleaseKV(AttemptId(attempt)))
        self.p.send(ReleaseKV(AttemptId(attempt)))

    async def until_ended(self, *attempts: int) -> None:
        """Wait until both nodes have given their terminal report of each."""
        await self.router.until(
            lambda: all(self.p.terminals(attempt) and self.d.terminals(attempt) for attempt in attempts)
        )

    async def until_idle(self) -> None:
        await self.router.until_idle(self.p, self.d)

    def output(self, attempt: int) -> list[int]:
        tokens = {**self.p.tokens[attempt], **self.d.tokens[attempt]}
        assert sorted(tokens) == list(range(len(tokens)))
        return [tokens[index] for index in range(len(tokens))]


MakePair = Callable[..., "asyncio.Future[Pair]"]


@pytest_asyncio.fixture
async def make_pair(workshop: Workshop) -> Callable[..., object]:
    """`await make_pair(timing=..., transport=..., **node settings)`."""

    async def make(*, lease_s: float = 10.0, **settings: object) -> Pair:
        router = await workshop.router(lease_s=lease_s)
        p_service = await workshop.node(Role.PREFILL, [router.address], **settings)  # type: ignore[arg-type]
        d_service = await workshop.node(Role.DECODE, [router.address], **settings)  # type: ignore[arg-type]
        p, d = await router.node(p_service.node_id), await router.node(d_service.node_id)
        return Pair(router, p, d, p_service, d_service)

    return make
