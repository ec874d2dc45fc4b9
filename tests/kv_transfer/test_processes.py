"""Two processes: content, a killed peer, a stopped peer, and both of them coming back."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvrelay.core.errors import TransferFailed, TransferTimeout
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.kv_transfer.interface import PushDone, ReceiveDone

SCRIPT = str(Path(__file__).parent / "peer_process.py")
DEADLINE_S = 20.0


class RemotePeer:
    """The other end of `peer_process.py`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.address = ""

    async def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            line = await self.process.stdout.readline()
        assert line, "the peer process ended"
        return dict(json.loads(line))

    async def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        await self.process.stdin.drain()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        if self.process.stdin is not None:
            self.process.stdin.close()
        await self.process.wait()


PeerMaker = Callable[..., Awaitable[RemotePeer]]


@pytest.fixture(params=["tcp", "ucx", "ucx without shared memory"])
def transport_options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """UCX's own TCP lanes behave differently: the target takes part in each write."""
    if request.param == "tcp":
        return {"transport": "tcp"}
    if sys.platform != "linux":
        pytest.skip("NIXL has wheels for Linux alone; there it has to be installed")
    return {"transport": "ucx", "ucx_tls": "" if request.param == "ucx" else "self,tcp"}


@pytest.fixture
def config(transport_options: dict[str, Any]) -> KVTransferConfig:
    return KVTransferConfig(
        **transport_options, slot_bytes=4096, num_send_slots=2, num_receive_slots=3, quarantine_s=0.05
    )


@pytest.fixture
async def make_peer(transport_options: dict[str, Any]) -> AsyncIterator[PeerMaker]:
    peers: list[RemotePeer] = []

    async def make(name: str, **options: Any) -> RemotePeer:
        settings = {"name": name, **transport_options, "slot_bytes": 4096, "num_receive_slots": 3}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            SCRIPT,
            json.dumps({**settings, **options}),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        peer = RemotePeer(process)
        peers.append(peer)
        peer.address = (await peer.hear())["address"]
        return peer

    yield make
    for peer in peers:
        await peer.kill()


class RemoteAddress:
    """Stands in for the receiving `Node` of a `Handoff`."""

    def __init__(self, peer: RemotePeer) -> None:
        self.service = peer

    def take_blocks(self, num_tokens: int) -> tuple[int, ...]:
        return ()


def digest_of(kv: Any, handoff: Any) -> str:
    content = handoff.sender.store.read(handoff.sent_blocks, range(kv.NUM_LAYERS), range(handoff.num_tokens))
    return sha256(np.ascontiguousarray(content).tobytes()).hexdigest()


async def begin_push(kv: Any, node: Any, peer: RemotePeer, num_tokens: int = 400) -> Any:
    handoff = kv.Handoff(node, RemoteAddress(peer), num_tokens=num_tokens)
    await peer.tell(op="expect", attempt=handoff.transfer_id.attempt, num_tokens=num_tokens)
    handoff.open()
    return handoff


async def assert_push_works(kv: Any, node: Any, peer: RemotePeer) -> None:
    handoff = await begin_push(kv, node, peer)
    handoff.ready(range(400))
    handoff.finish()
    pushed = await node.recorder.outcome(handoff.transfer_id)
    assert isinstance(pushed, PushDone), pushed
    assert (await peer.hear())["digest"] == digest_of(kv, handoff)
    await kv.eventually(lambda: kv.at_rest(node), "slots leaked")


async def assert_receive_works(kv: Any, node: Any, peer: RemotePeer) -> None:
    transfer_id, table = await begin_receive(kv, node, peer, num_ready=400)
    heard = await peer.hear()
    assert heard["event"] == "PushDone", heard
    received = await node.recorder.outcome(transfer_id)
    assert isinstance(received, ReceiveDone), received
    content = np.random.default_rng(transfer_id.attempt).standard_normal(
        (kv.NUM_LAYERS, 2, 400, 2, 8), dtype=np.float32
    )
    np.testing.assert_array_equal(node.store.read(table, range(kv.NUM_LAYERS), range(400)), content)
    await kv.eventually(lambda: kv.at_rest(node), "slots leaked")


async def begin_receive(kv: Any, node: Any, peer: RemotePeer, num_ready: int) -> tuple[Any, Any]:
    transfer_id, table = kv.new_transfer_id(), node.take_blocks(400)
    node.service.expect(kv.ExpectedTransfer(transfer_id, table, 400, 0, kv.DIGEST))
    await peer.tell(
        op="push",
        attempt=transfer_id.attempt,
        num_tokens=400,
        num_ready=num_ready,
        address=node.service.address,
    )
    return transfer_id, table


async def test_content_arrives_in_another_process(make_node: Any, make_peer: PeerMaker, kv: Any) -> None:
    node, peer = await make_node("prefill"), await make_peer("decode")
    await assert_push_works(kv, node, peer)


async def test_content_arrives_from_another_process(make_node: Any, make_peer: PeerMaker, kv: Any) -> None:
    node, peer = await make_node("decode"), await make_peer("prefill")
    await assert_receive_works(kv, node, peer)


async def test_a_killed_receiver_fails_the_push_and_can_come_back(
    make_node: Any, make_peer: PeerMaker, kv: Any
) -> None:
    node, peer = await make_node("prefill"), await make_peer("decode")
    handoff = await begin_push(kv, node, peer)
    handoff.ready(range(200))
    await kv.eventually(lambda: node.store.num_gathers >= 4, "nothing moved")
    await peer.kill()
    pushed = await node.recorder.outcome(handoff.transfer_id)
    assert isinstance(pushed.error, TransferFailed)
    assert not isinstance(pushed.error, TransferTimeout), "loss of the link shows at once"
    port = int(peer.address.rpartition(":")[2])
    again = await make_peer("decode", listen_port=port)
    assert again.address == peer.address
    await assert_push_works(kv, node, again)


async def test_a_killed_sender_fails_the_receive_and_can_come_back(
    make_node: Any, make_peer: PeerMaker, kv: Any
) -> None:
    node, peer = await make_node("decode"), await make_peer("prefill")
    transfer_id, _ = await begin_receive(kv, node, peer, num_ready=200)
    await kv.eventually(lambda: node.store.num_scatters >= 4, "nothing moved")
    await peer.kill()
    received = await node.recorder.outcome(transfer_id)
    assert isinstance(received.error, TransferFailed)
    assert not isinstance(received.error, TransferTimeout), "loss of the link shows at once"
    await kv.eventually(lambda: kv.at_rest(node), "slots leaked")
    await assert_receive_works(kv, node, await make_peer("prefill"))


async def test_a_stopped_receiver_times_the_push_out_and_can_come_back(
    make_node: Any, make_peer: PeerMaker, kv: Any
) -> None:
    node = await make_node("prefill", progress_timeout_s=1.0, pending_offer_timeout_s=0.5)
    peer = await make_peer("decode")
    await assert_push_works(kv, node, peer)
    peer.process.send_signal(signal.SIGSTOP)
    handoff = await begin_push(kv, node, peer)
    handoff.ready(range(400))
    pushed = await node.recorder.outcome(handoff.transfer_id)
    assert isinstance(pushed.error, TransferTimeout), pushed.error
    await kv.eventually(lambda: kv.at_rest(node), "slots leaked")
    peer.process.send_signal(signal.SIGCONT)
    await assert_push_works_after_events(kv, node, peer)


async def assert_push_works_after_events(kv: Any, node: Any, peer: RemotePeer) -> None:
    """As `assert_push_works`, where the peer may report older transfers first."""
    handoff = await begin_push(kv, node, peer)
    handoff.ready(range(400))
    handoff.finish()
    pushed = await node.recorder.outcome(handoff.transfer_id)
    assert isinstance(pushed, PushDone), pushed
    while (heard := await peer.hear())["attempt"] != handoff.transfer_id.attempt:
        assert heard["event"] == "ReceiveFailed"
    assert heard["digest"] == digest_of(kv, handoff)


async def test_a_sender_stopped_in_the_middle_times_the_receive_out(
    make_node: Any, make_peer: PeerMaker, kv: Any
) -> None:
    node = await make_node("decode", progress_timeout_s=1.0, pending_offer_timeout_s=0.5)
    peer = await make_peer("prefill")
    transfer_id, _ = await begin_receive(kv, node, peer, num_ready=200)
    await kv.eventually(lambda: node.store.num_scatters >= 4, "nothing moved")
    peer.process.send_signal(signal.SIGSTOP)
    received = await node.recorder.outcome(transfer_id)
    assert isinstance(received.error, TransferTimeout), received.error
    await kv.eventually(lambda: kv.at_rest(node), "slots leaked")
    peer.process.send_signal(signal.SIGCONT)
    assert (await peer.hear())["event"] == "PushFailed"
    await assert_receive_works(kv, node, peer)
