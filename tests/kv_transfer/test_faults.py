"""Faulty bytes, faulty transports, and peers that do not keep to the protocol."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgpack
import pytest

from kvrelay.core.errors import ConfigError, TransferCorrupt, TransferFailed
from kvrelay.core.ids import AttemptId, TransferId
from kvrelay.kv_transfer.choose_transport import choose_transport
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.kv_transfer.frame_reader import FrameReader, frame_bytes
from kvrelay.kv_transfer.interface import ReceiveDone
from kvrelay.kv_transfer.messages import (
    PROTOCOL_VERSION,
    Ack,
    Chunk,
    Finish,
    Grant,
    Hello,
    Offer,
    Refuse,
    SlotsGranted,
    Want,
)
from kvrelay.kv_transfer.service import KVTransferService
from kvrelay.kv_transfer.transport import KVTransport, PeerLost, TransportContext, TransportEvent


class FaultyTransport:
    """Passes everything on, except what a subclass breaks."""

    def __init__(self, inner: KVTransport, context: TransportContext) -> None:
        self.inner = inner
        self.context = context
        self.num_writes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class FlipsABit(FaultyTransport):
    def post_write(self, link_id: int, local: int, remote: int, num_bytes: int) -> int:
        self.num_writes += 1
        if self.num_writes == 5:
            self.context.send_staging.host_view()[local + num_bytes // 2] ^= 1
        return self.inner.post_write(link_id, local, remote, num_bytes)


class LosesThePeer(FaultyTransport):
    def post_write(self, link_id: int, local: int, remote: int, num_bytes: int) -> int:
        self.num_writes += 1
        self.link_id = link_id
        return self.inner.post_write(link_id, local, remote, num_bytes)

    def poll(self) -> Sequence[TransportEvent]:
        if self.num_writes < 3:
            return self.inner.poll()
        self.num_writes = -(10**9)
        return [PeerLost(self.link_id, TransferFailed("the cable was cut"))]


class NeverCompletes(FaultyTransport):
    """Every write hangs, as with a peer that UCX can't reach any more."""

    def post_write(self, link_id: int, local: int, remote: int, num_bytes: int) -> int:
        return 10**9 + remote


def faulty(kind: type[FaultyTransport], transport: str) -> Any:
    return lambda context: kind(choose_transport(transport, context).transport, context)


async def assert_pair_works(pair: Any, kv: Any) -> None:
    for node in pair:
        await kv.eventually(lambda node=node: kv.at_rest(node), "slots leaked")
    handoff = kv.Handoff(*pair, num_tokens=64)
    handoff.start()
    await handoff.outcomes()
    handoff.assert_equal()


async def test_a_corrupted_message_is_never_reported_done(make_node: Any, kv: Any, transport: str) -> None:
    pair = (
        await make_node("prefill", factory=faulty(FlipsABit, transport)),
        await make_node("decode", 24),
    )
    handoff = kv.Handoff(*pair, num_tokens=100)
    handoff.start()
    pushed, received = await handoff.outcomes()
    for event in (pushed, received):
        assert isinstance(event.error, TransferCorrupt), event
        assert "checksum" in str(event.error)
    assert not any(isinstance(event, ReceiveDone) for event in pair[1].recorder.events)
    assert pair[1].store.num_scatters == 4
    await assert_pair_works(pair, kv)


async def test_a_lost_transport_fails_both_sides(make_node: Any, kv: Any, transport: str) -> None:
    pair = (
        await make_node("prefill", factory=faulty(LosesThePeer, transport)),
        await make_node("decode", 24),
    )
    handoff = kv.Handoff(*pair, num_tokens=100)
    handoff.start()
    pushed, received = await handoff.outcomes()
    assert "the cable was cut" in str(pushed.error)
    assert isinstance(received.error, TransferFailed)
    await assert_pair_works(pair, kv)


async def test_writes_that_hang_time_out_and_the_slots_come_back(
    make_node: Any, kv: Any, transport: str
) -> None:
    pair = (
        await make_node(
            "prefill",
            factory=faulty(NeverCompletes, transport),
            progress_timeout_s=0.2,
            pending_offer_timeout_s=0.1,
        ),
        await make_node("decode", 24),
    )
    handoff = kv.Handoff(*pair, num_tokens=100)
    handoff.start()
    pushed, received = await handoff.outcomes()
    assert pushed.error.code == "TRANSFER_TIMEOUT"
    assert received.error.code in ("TRANSFER_TIMEOUT", "TRANSFER_FAILED")
    for node in pair:
        await kv.eventually(lambda node=node: kv.at_rest(node), "slots leaked")


async def test_a_failing_store_ends_every_transfer(make_node: Any, kv: Any) -> None:
    pair = await make_node("prefill"), await make_node("decode", 24)

    def broken(*_arguments: Any) -> int:
        raise RuntimeError("the device is gone")

    pair[1].store.scatter = broken
    handoff, other = kv.Handoff(*pair, num_tokens=100), kv.Handoff(*pair, num_tokens=10)
    other.expect()
    handoff.start()
    pushed, received = await handoff.outcomes()
    assert "the device is gone" in str(received.error)
    assert isinstance(pushed.error, TransferFailed)
    assert "the device is gone" in str((await pair[1].recorder.outcome(other.transfer_id)).error)


class FakePeer:
    """Speaks to a receiver frame by frame, as a sender of its own making."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self._frames = FrameReader()
        self._pending: list[Any] = []

    def send(self, *frames: Any) -> None:
        for frame in frames:
            self.writer.write(frame_bytes(frame))

    async def hear(self) -> Any:
        """The next frame, None when the connection has ended."""
        async with asyncio.timeout(20):
            while not self._pending:
                try:
                    received = await self._reader.read(65536)
                except ConnectionError:
                    return None
                if not received:
                    return None
                self._pending = self._frames.feed(received)
        return self._pending.pop(0)


@pytest.fixture
async def dial() -> Any:
    writers: list[asyncio.StreamWriter] = []

    async def connect(address: str) -> FakePeer:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)
        return FakePeer(reader, writer)

    yield connect
    for writer in writers:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            continue


def hello(kv: Any, transport: str, **changes: Any) -> Hello:
    plain = Hello(PROTOCOL_VERSION, "stranger", "1", kv.FINGERPRINT, transport, b"", b"", 0, 0)
    return replace(plain, **changes)


async def test_another_protocol_version_is_refused(
    make_node: Any, kv: Any, transport: str, dial: Any
) -> None:
    node = await make_node("decode")
    peer = await dial(node.service.address)
    peer.send(hello(kv, transport, version=99))
    refusal = await peer.hear()
    assert isinstance(refusal, Refuse)
    assert "version" in refusal.message
    assert await peer.hear() is None


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 5) + b"\xff" * 5,
        struct.pack(">I", 2**31),
        struct.pack(">I", 1) + b"\x90",
        struct.pack(">I", 2) + msgpack.packb([99]),
        frame_bytes(Ack(TransferId(1, AttemptId(1)))),
    ],
)
async def test_garbage_closes_the_link_and_harms_nobody(
    pair: Any, kv: Any, dial: Any, garbage: bytes
) -> None:
    running = kv.Handoff(*pair, num_tokens=64)
    running.expect()
    running.open()
    running.ready(range(32))
    peer = await dial(pair[1].service.address)
    peer.writer.write(garbage)
    assert await peer.hear() is None
    running.ready(range(32, 64))
    running.finish()
    await running.outcomes()
    running.assert_equal()


async def granted_peer(kv: Any, node: Any, dial: Any, transport: str) -> tuple[FakePeer, Any]:
    """A stranger that was granted one transfer of 16 tokens and one slot."""
    transfer_id = kv.new_transfer_id()
    node.service.expect(kv.ExpectedTransfer(transfer_id, node.take_blocks(16), 16, 0, kv.DIGEST))
    peer = await dial(node.service.address)
    peer.send(
        hello(kv, transport),
        Offer(transfer_id, 16, kv.DIGEST, kv.FINGERPRINT.digest, 0),
        Want(transfer_id, 1),
    )
    assert isinstance(await peer.hear(), Hello)
    assert await peer.hear() == Grant(transfer_id, 0)
    return peer, await peer.hear()


@pytest.mark.parametrize(
    "wrong",
    [
        {"slot": 1},
        {"slot": 4000},
        {"sequence_number": 1},
        {"layers": range(0, 5)},
        {"tokens": range(1, 9)},
        {"tokens": range(0, 17)},
        {"num_bytes": 4097},
        {"checksum": 1},
    ],
)
async def test_a_wrong_chunk_is_refused(
    make_node: Any, kv: Any, transport: str, dial: Any, wrong: dict[str, Any]
) -> None:
    node = await make_node("decode", 24)
    peer, granted = await granted_peer(kv, node, dial, transport)
    assert isinstance(granted, SlotsGranted)
    right = Chunk(granted.transfer_id, 0, granted.slots[0], range(0, 4), range(0, 8), 4096, True, 0)
    other_slot = (granted.slots[0] + 1) % 3
    peer.send(replace(right, **({"slot": other_slot} if wrong == {"slot": 1} else wrong)))
    received = await node.recorder.outcome(granted.transfer_id)
    assert isinstance(received.error, TransferCorrupt)
    assert node.store.num_scatters == 0
    peer.writer.close()
    await kv.eventually(lambda: kv.at_rest(node), "slots leaked")


async def test_finishing_without_sending_is_corrupt(
    make_node: Any, kv: Any, transport: str, dial: Any
) -> None:
    node = await make_node("decode", 24)
    peer, granted = await granted_peer(kv, node, dial, transport)
    peer.send(Finish(granted.transfer_id, 0, 0, 42))
    received = await node.recorder.outcome(granted.transfer_id)
    assert isinstance(received.error, TransferCorrupt)
    assert "too early" in str(received.error)


async def test_wanting_more_slots_than_any_sender_has_is_refused(
    make_node: Any, kv: Any, transport: str, dial: Any
) -> None:
    node = await make_node("decode", 24)
    peer, granted = await granted_peer(kv, node, dial, transport)
    peer.send(Want(granted.transfer_id, 4096))
    peer.send(Want(granted.transfer_id, 4096))
    received = await node.recorder.outcome(granted.transfer_id)
    assert isinstance(received.error, TransferCorrupt)


async def test_a_sender_that_holds_slots_and_sends_nothing_times_out(
    make_node: Any, kv: Any, transport: str, dial: Any
) -> None:
    node = await make_node("decode", 24, progress_timeout_s=0.2, pending_offer_timeout_s=0.1)
    _peer, granted = await granted_peer(kv, node, dial, transport)
    received = await node.recorder.outcome(granted.transfer_id)
    assert received.error.code == "TRANSFER_TIMEOUT"
    await kv.eventually(lambda: kv.at_rest(node), "slots leaked")


async def test_a_stranger_that_says_nothing_is_dropped(make_node: Any, kv: Any, dial: Any) -> None:
    node = await make_node("decode", connect_timeout_s=0.05)
    peer = await dial(node.service.address)
    assert await peer.hear() is None


async def test_a_receiver_that_answers_nothing_fails_the_push(make_node: Any, kv: Any) -> None:
    node = await make_node("prefill", connect_timeout_s=0.05)
    server = await asyncio.start_server(lambda _reader, writer: writers.append(writer), "127.0.0.1", 0)
    writers: list[asyncio.StreamWriter] = []
    async with server:
        port = server.sockets[0].getsockname()[1]
        transfer_id = kv.new_transfer_id()
        node.service.open_push(kv.PushSpec(transfer_id, f"127.0.0.1:{port}", 8, kv.DIGEST))
        pushed = await node.recorder.outcome(transfer_id)
        assert pushed.error.code == "TRANSFER_TIMEOUT"
        for writer in writers:
            writer.close()


async def test_a_taken_port_is_a_config_error(make_node: Any, kv: Any, config: KVTransferConfig) -> None:
    node = await make_node("decode")
    port = int(node.service.address.rpartition(":")[2])
    service = KVTransferService(
        "second", kv.NumpyStore(16), kv.FINGERPRINT, replace(config, listen_port=port), kv.Recorder()
    )
    with pytest.raises(ConfigError, match="can't listen"):
        await service.start()
    await service.close()


def test_a_slot_too_small_for_one_token_is_a_config_error(kv: Any, config: KVTransferConfig) -> None:
    with pytest.raises(ConfigError, match="slot_bytes must be at least 128"):
        KVTransferService(
            "node", kv.NumpyStore(16), kv.FINGERPRINT, replace(config, slot_bytes=127), kv.Recorder()
        )
