"""A router in this process, on free ports, and fake nodes that speak `Attach` to it."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field, replace

import grpc
import pytest

from kvrelay.codec.client_api import SessionUpdateDecoder, encode_session_ask
from kvrelay.codec.cluster import (
    decode_router_frame,
    decode_welcome,
    encode_hello,
    encode_node_frame,
)
from kvrelay.core.client_types import GenerateCall, SessionAsk
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.node_messages import (
    AttemptFinished,
    HandoffVerified,
    KVReleased,
    NodeDescription,
    NodeFrame,
    PrefillFinished,
    ReleaseKV,
    Reserved,
    ReserveDecode,
    Role,
    StartPrefill,
    TokenBatch,
)
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.core.tokenizer_chunk import split_tokenizer
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.server import RouterServer
from kvrelay.router.server_config import RouterConfig
from kvrelay.v1 import cluster_pb2_grpc, router_pb2_grpc

FINGERPRINT = KVFingerprint("m", "float32", 2, 2, 8, "r")
PATIENCE_S = 20.0
"""How long a test waits for what must happen; it is never waited out in a passing test."""


class MonotonicClock:
    def now_s(self):
        return time.monotonic()


def expected_token(request, index):
    """What a fake node draws: a function of prompt and index, so that a continuation can be checked."""
    return (sum(request.token_ids[: request.num_prompt_tokens]) * 31 + index * 7) % 997 + 1


def expected_output(prompt, max_tokens):
    request = TokenRequest(tuple(prompt), len(prompt), SamplingParams())
    return [expected_token(request, index) for index in range(max_tokens)]


def describe(node_id, role, **changes):
    node = NodeDescription(
        node_id=node_id,
        incarnation=1,
        role=role,
        model="m",
        engine="fake",
        fingerprint=FINGERPRINT,
        vocab_size=1000,
        max_model_len=4096,
        num_blocks=4096,
        block_size=16,
        max_num_seqs=512,
        eos_token_ids=(0,),
        transfer_address="127.0.0.1:9" if role is Role.DECODE else "",
        host="test",
        pid=7,
    )
    return replace(node, **changes)


@dataclass
class Held:
    """One attempt on one fake node."""

    request: TokenRequest
    next_index: int
    is_verified: bool = False


@dataclass
class FakeNode:
    """One end of an `Attach` stream that follows the node contract, as far as its cluster lets it."""

    cluster: "FakeCluster"
    description: NodeDescription
    tokenizer: bytes = b""
    held: dict = field(default_factory=dict)
    commands: asyncio.Queue = field(default_factory=asyncio.Queue)
    frames: asyncio.Queue = field(default_factory=asyncio.Queue)
    num_heartbeats: int = 0
    is_deaf: bool = False

    async def attach(self, address):
        self.channel = grpc.aio.insecure_channel(address)
        stub = cluster_pb2_grpc.ClusterStub(self.channel)
        self.call = stub.Attach()
        await self.call.write(encode_hello(self.description))
        self.welcome = decode_welcome(await self.call.read())
        if self.welcome.wants_tokenizer:
            for chunk in split_tokenizer(self.tokenizer):
                self.send(NodeFrame(tokenizer=chunk))
        self.tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]
        return self

    def send(self, frame):
        self.frames.put_nowait(encode_node_frame(frame))

    def send_raw(self, pb):
        self.frames.put_nowait(pb)

    async def _write(self):
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while (frame := await self.frames.get()) is not None:
                await self.call.write(frame)
            await self.call.done_writing()

    async def _read(self):
        with contextlib.suppress(grpc.aio.AioRpcError):
            while (received := await self.call.read()) is not grpc.aio.EOF:
                frame = decode_router_frame(received)
                self.num_heartbeats += not frame.commands
                for command in frame.commands:
                    self.commands.put_nowait(command)
                    if not self.is_deaf:
                        self.cluster.obey(self, command)

    async def next_command(self, kind):
        async with asyncio.timeout(PATIENCE_S):
            while not isinstance(command := await self.commands.get(), kind):
                pass
        return command

    async def end_status(self):
        async with asyncio.timeout(PATIENCE_S):
            return await self.call.code(), await self.call.details()

    async def die(self):
        """Vanish in the middle of everything."""
        self.call.cancel()
        await self.close()

    async def close(self):
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.call.cancel()
        await self.channel.close()


class FakeCluster:
    """Fake nodes and what passes between them. `stop_before` holds every attempt at that stage."""

    def __init__(self):
        self.nodes = []
        self.stop_before = ""
        self.tokens_per_frame = 1

    async def add(self, address, node_id, role, tokenizer=b"", **changes):
        node = FakeNode(self, describe(node_id, role, **changes), tokenizer)
        self.nodes.append(await node.attach(address))
        return node

    def obey(self, node, command):
        if isinstance(command, ReleaseKV):
            node.held.pop(command.attempt, None)
            node.send(NodeFrame(reports=(KVReleased(command.attempt),)))
        elif isinstance(command, ReserveDecode):
            node.held[command.attempt] = Held(command.request, command.request.num_output_tokens + 1)
            node.send(NodeFrame(reports=(Reserved(command.attempt, 0),)))
            self.advance(command.attempt)
        elif isinstance(command, StartPrefill):
            node.held[command.attempt] = Held(command.request, command.request.num_output_tokens)
            self.advance(command.attempt)

    def holder(self, attempt, role):
        for node in self.nodes:
            if node.description.role is role and attempt in node.held:
                return node
        return None

    def resume(self, stop_before=""):
        """Let everything run on, up to that stage."""
        self.stop_before = stop_before
        for attempt in sorted({attempt for node in self.nodes for attempt in node.held}):
            self.advance(attempt)

    def advance(self, attempt):
        prefill, decode = self.holder(attempt, Role.PREFILL), self.holder(attempt, Role.DECODE)
        if prefill is not None and not prefill.held[attempt].is_verified and self.stop_before != "prefill":
            self._prefill(prefill, attempt)
        if prefill is None or decode is None or attempt not in prefill.held:
            if decode is not None and decode.held[attempt].is_verified and not self.stop_before:
                self._decode(decode, attempt)
            return
        if prefill.held[attempt].is_verified and self.stop_before not in ("prefill", "handoff"):
            decode.held[attempt].is_verified = True
            decode.send(NodeFrame(reports=(HandoffVerified(attempt, 1000, 2, 0.001, "fake"),)))
            del prefill.held[attempt]
            prefill.send(NodeFrame(reports=(KVReleased(attempt),)))
            if not self.stop_before:
                self._decode(decode, attempt)

    def _prefill(self, node, attempt):
        held = node.held[attempt]
        held.is_verified = True
        batch = token_frame(attempt, held, held.next_index, 1)
        if held.request.num_remaining_tokens == 1:
            del node.held[attempt]
            node.send(NodeFrame(batch, (AttemptFinished(attempt, FinishReason.LENGTH),)))
            return
        node.send(NodeFrame(batch, (PrefillFinished(attempt, 0, 0.0, 0.001),)))

    def _decode(self, node, attempt):
        held = node.held[attempt]
        last = held.request.sampling.max_tokens
        while held.next_index < last:
            count = min(self.tokens_per_frame, last - held.next_index)
            node.send(NodeFrame(token_frame(attempt, held, held.next_index, count)))
            held.next_index += count
        del node.held[attempt]
        node.send(NodeFrame(reports=(AttemptFinished(attempt, FinishReason.LENGTH),)))

    async def close(self):
        for node in self.nodes:
            await node.close()


def token_frame(attempt, held, first, count):
    ids = [expected_token(held.request, first + offset) for offset in range(count)]
    return TokenBatch([attempt], [first], [count], ids)


@dataclass
class Router:
    """A router under test. `stub` speaks to its client-facing service."""

    server: RouterServer
    address: str
    stub: router_pb2_grpc.RouterStub
    channel: grpc.aio.Channel

    async def until(self, condition):
        """Wait for something that another task does; the loop turns meanwhile."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def until_settled(self):
        """All requests have ended and no node is thought to hold anything."""
        await self.until(
            lambda: (
                not (status := self.server.shell.status()).num_unsettled_attempts
                and not status.num_requests_by_state["queued"]
            )
        )
        assert not self.server.shell.sessions.session_of


@pytest.fixture
async def make_router():
    """Start a router with these settings; closed at the end, which no bug may have hastened. It knows at once
    that what is not attached is not there, unless `attach_wait_s` says otherwise."""
    running = []

    async def make(core=None, *, attach_wait_s=0.0, **settings):
        config = RouterConfig(
            listen_host="127.0.0.1",
            grpc_port=0,
            http_port=0,
            core=core or RouterCoreConfig(),
            attach_wait_s=attach_wait_s,
            **settings,
        )
        server = RouterServer(config, MonotonicClock())
        await server.start()
        address = f"127.0.0.1:{server.grpc_port}"
        channel = grpc.aio.insecure_channel(address)
        router = Router(server, address, router_pb2_grpc.RouterStub(channel), channel)
        running.append(router)
        return router

    yield make
    for router in running:
        await router.channel.close()
        await router.server.stop(0.0)
        assert not router.server.shell.bug.done(), router.server.shell.bug.result()


@pytest.fixture
async def router(make_router):
    return await make_router()


@pytest.fixture
async def cluster():
    fake = FakeCluster()
    yield fake
    await fake.close()


@pytest.fixture
async def pair(router, cluster):
    """One prefill and one decode node, attached."""
    prefill = await cluster.add(router.address, "p0", Role.PREFILL)
    decode = await cluster.add(router.address, "d0", Role.DECODE)
    return prefill, decode


def make_call(prompt=(1, 2, 3), max_tokens=8, request_id="", model="m", **sampling):
    request = TokenRequest(tuple(prompt), len(prompt), SamplingParams(max_tokens=max_tokens, **sampling))
    return GenerateCall(request_id, model, request)


@dataclass
class SessionClient:
    """The client's end of one `Session`, which keeps what it was told by stream id."""

    call: object
    accepted: dict = field(default_factory=dict)
    tokens: dict = field(default_factory=dict)
    finished: dict = field(default_factory=dict)
    failed: dict = field(default_factory=dict)
    num_messages: int = 0
    _decoder: SessionUpdateDecoder = field(default_factory=SessionUpdateDecoder)

    async def ask(self, *calls, cancel=(), finish=()):
        ask = SessionAsk(tuple(calls), tuple(cancel), tuple(finish))
        await self.call.write(encode_session_ask(ask))

    async def until_ended(self, *stream_ids):
        async with asyncio.timeout(PATIENCE_S):
            while any(one not in self.finished and one not in self.failed for one in stream_ids):
                await self.read()

    async def until_tokens(self, stream_id, number):
        async with asyncio.timeout(PATIENCE_S):
            while len(self.tokens.get(stream_id, ())) < number:
                await self.read()

    async def read(self):
        update = self._decoder.decode(await self.call.read())
        self.num_messages += 1
        start = 0
        self.accepted.update(update.accepted)
        for stream_id, count in zip(update.stream_ids, update.counts, strict=True):
            self.tokens.setdefault(stream_id, []).extend(update.token_ids[start : start + count])
            start += count
        for ended, what in ((self.finished, update.finished), (self.failed, update.failed)):
            for stream_id, value in what:
                assert stream_id not in self.finished
                assert stream_id not in self.failed, "a stream ends once"
                ended[stream_id] = value


@pytest.fixture
def open_session():
    return lambda router: SessionClient(router.stub.Session())


@pytest.fixture
async def open_narrow_session():
    """A session over a channel whose flow-control window stays small."""
    channels = []

    def open_(router):
        options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 14))
        channels.append(grpc.aio.insecure_channel(router.address, options=options))
        return SessionClient(router_pb2_grpc.RouterStub(channels[-1]).Session())

    yield open_
    for channel in channels:
        await channel.close()


@pytest.fixture
def call():
    return make_call


@pytest.fixture
def output():
    return expected_output
