"""A numpy KV cache, a recording listener, and pairs of services, for every transport."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvrelay.core.block_hash import BlockHash
from kvrelay.core.ids import AttemptId, BlockId, TransferId
from kvrelay.core.kv import DeviceKind, FinishedCopy, KVFingerprint, KVLayout
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.kv_transfer.interface import (
    ExpectedTransfer,
    PushSpec,
    TransferEvent,
)
from kvrelay.kv_transfer.service import KVTransferService
from kvrelay.kv_transfer.transport import TransportFactory

NUM_LAYERS = 4
FINGERPRINT = KVFingerprint("tiny", "float32", NUM_LAYERS, 2, 8, "rope")
DIGEST = BlockHash(b"p" * 32)
TIMEOUT_S = 20.0


class NumpyStaging:
    device_kind = DeviceKind.CPU
    device_index = 0

    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, num_bytes)
        self._array = np.frombuffer(self._map, dtype=np.uint8)
        self.num_bytes = num_bytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def host_view(self) -> memoryview:
        return memoryview(self._array)


class NumpyStore:
    """Cache of `[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]` float32."""

    device_kind = DeviceKind.CPU

    def __init__(self, block_size: int, num_blocks: int = 512, num_layers: int = NUM_LAYERS) -> None:
        self.layout = KVLayout(num_layers, num_blocks, block_size, 2, 8, "float32", 4)
        self.cache = np.zeros((num_layers, 2, num_blocks, block_size, 2, 8), dtype=np.float32)
        self.num_gathers = 0
        self.num_scatters = 0

    def allocate_staging(self, num_bytes: int) -> NumpyStaging:
        return NumpyStaging(num_bytes)

    def slots(self, block_table: Sequence[BlockId], tokens: range) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(tokens.start, tokens.stop)
        blocks = np.asarray(block_table)[positions // self.layout.block_size]
        return blocks, positions % self.layout.block_size

    def read(self, block_table: Sequence[BlockId], layers: range, tokens: range) -> np.ndarray:
        blocks, within = self.slots(block_table, tokens)
        return self.cache[layers.start : layers.stop][:, :, blocks, within]

    def gather(
        self, block_table: Sequence[BlockId], layers: range, tokens: range, out: NumpyStaging, offset: int
    ) -> FinishedCopy:
        self.num_gathers += 1
        data = np.ascontiguousarray(self.read(block_table, layers, tokens)).view(np.uint8).reshape(-1)
        out.host_view()[offset : offset + data.size] = data.data
        return FinishedCopy(data.size)

    def scatter(
        self, block_table: Sequence[BlockId], layers: range, tokens: range, source: NumpyStaging, offset: int
    ) -> FinishedCopy:
        self.num_scatters += 1
        num_bytes = len(layers) * len(tokens) * self.layout.token_bytes_per_layer
        data = np.frombuffer(source.host_view()[offset : offset + num_bytes], dtype=np.float32)
        blocks, within = self.slots(block_table, tokens)
        self.cache[layers.start : layers.stop][:, :, blocks, within] = data.reshape(
            len(layers), 2, len(tokens), 2, 8
        )
        return FinishedCopy(num_bytes)


@dataclass
class Recorder:
    """A listener; `outcome` waits for one transfer's event."""

    events: list[TransferEvent] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, event: TransferEvent) -> None:
        self.events.append(event)
        self._changed.set()

    async def outcome(self, transfer_id: TransferId) -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                found = [event for event in self.events if event.transfer_id == transfer_id]
                if found:
                    assert len(found) == 1, f"more than one event: {found}"
                    return found[0]
                self._changed.clear()
                await self._changed.wait()


@dataclass
class Node:
    service: KVTransferService
    store: NumpyStore
    recorder: Recorder
    _next_block: int = 0

    def take_blocks(self, num_tokens: int) -> tuple[BlockId, ...]:
        """Blocks that no other transfer of this test uses, in a scattered order."""
        num_blocks = -(-num_tokens // self.store.layout.block_size)
        taken = range(self._next_block, self._next_block + num_blocks)
        self._next_block += num_blocks
        return tuple(BlockId(block) for block in reversed(taken))


NodeMaker = Callable[..., Any]
_attempts = count(1)


def new_transfer_id() -> TransferId:
    return TransferId(7, AttemptId(next(_attempts)))


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for what no event tells of; the deadline only ends a hopeless wait."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():  # noqa: ASYNC110 - another thread or process makes it true
                await asyncio.sleep(0.002)
    except TimeoutError:
        pytest.fail(what)


def at_rest(node: Node) -> bool:
    now = node.service.snapshot()
    slots = (now.send_slots, now.receive_slots)
    return (
        (now.num_pushes, now.num_receives, now.num_pending_offers) == (0, 0, 0)
        and all(counts.held == 0 and counts.quarantined == 0 for counts in slots)
        and now.send_slots.free > 0
    )


@dataclass
class Handoff:
    """One transfer between two nodes, with random content on the sender's side."""

    sender: Node
    receiver: Node
    num_tokens: int
    first_token: int = 0
    transfer_id: TransferId = field(default_factory=new_transfer_id)

    def __post_init__(self) -> None:
        self.sent_blocks = self.sender.take_blocks(self.num_tokens)
        self.received_blocks = self.receiver.take_blocks(self.num_tokens)
        blocks, within = self.sender.store.slots(self.sent_blocks, range(self.num_tokens))
        shape = (NUM_LAYERS, 2, self.num_tokens, 2, 8)
        random = np.random.default_rng(self.transfer_id.attempt)
        self.sender.store.cache[:, :, blocks, within] = random.standard_normal(shape, dtype=np.float32)

    def expect(self, digest: BlockHash = DIGEST) -> None:
        self.receiver.service.expect(
            ExpectedTransfer(
                self.transfer_id, self.received_blocks, self.num_tokens, self.first_token, digest
            )
        )

    def open(self, digest: BlockHash = DIGEST) -> None:
        address = self.receiver.service.address
        self.sender.service.open_push(PushSpec(self.transfer_id, address, self.num_tokens, digest))

    def ready(self, tokens: range, layers: range = range(NUM_LAYERS)) -> None:
        self.sender.service.push_ready(self.transfer_id, self.sent_blocks, layers, tokens)

    def finish(self, output_token_id: int = 42) -> None:
        self.sender.service.finish_push(self.transfer_id, output_token_id)

    def start(self) -> None:
        self.expect()
        self.open()
        self.ready(range(self.num_tokens))
        self.finish()

    async def outcomes(self) -> tuple[Any, Any]:
        pushed = await self.sender.recorder.outcome(self.transfer_id)
        return pushed, await self.receiver.recorder.outcome(self.transfer_id)

    def assert_equal(self) -> None:
        tokens, layers = range(self.first_token, self.num_tokens), range(NUM_LAYERS)
        sent = self.sender.store.read(self.sent_blocks, layers, tokens)
        np.testing.assert_array_equal(self.receiver.store.read(self.received_blocks, layers, tokens), sent)


@pytest.fixture(params=["memory", "tcp", "ucx"])
def transport(request: pytest.FixtureRequest) -> str:
    if request.param == "ucx" and sys.platform != "linux":
        pytest.skip("NIXL has wheels for Linux alone; there it has to be installed")
    return str(request.param)


@pytest.fixture
def config(transport: str) -> KVTransferConfig:
    """Small slots: a token of all layers is 512 bytes, so a slot holds eight."""
    return KVTransferConfig(
        transport=transport, slot_bytes=4096, num_send_slots=2, num_receive_slots=3, quarantine_s=0.05
    )


@pytest.fixture
async def make_node(config: KVTransferConfig) -> AsyncIterator[NodeMaker]:
    nodes: list[Node] = []

    async def make(
        name: str,
        block_size: int = 16,
        fingerprint: KVFingerprint = FINGERPRINT,
        factory: TransportFactory | None = None,
        store: NumpyStore | None = None,
        **changes: Any,
    ) -> Node:
        store, recorder = store or NumpyStore(block_size), Recorder()
        service = KVTransferService(
            name, store, fingerprint, replace(config, **changes), recorder, transport_factory=factory
        )
        await service.start()
        node = Node(service, store, recorder)
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        await node.service.close()


@pytest.fixture
async def pair(make_node: NodeMaker) -> tuple[Node, Node]:
    """Prefill and decode node, with block sizes that are no multiples of each other."""
    return await make_node("prefill", 16), await make_node("decode", 24)


@pytest.fixture
def kv() -> ModuleType:
    """This file's names, for tests."""
    import sys

    return sys.modules[__name__]
