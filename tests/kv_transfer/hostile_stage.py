"""KV transfer of honest nodes on a virtual clock, beside a peer that says and writes what a test draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from kvrelay.core.block_hash import BlockHash
from kvrelay.core.ids import AttemptId, BlockId, TransferId
from kvrelay.core.kv import KVFingerprint, KVLayout
from kvrelay.engine.host_kv import HostKVStore, HostStaging
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.kv_transfer.frame_reader import FrameReader, frame_bytes
from kvrelay.kv_transfer.interface import ExpectedTransfer, PushSpec, TransferEvent
from kvrelay.kv_transfer.memory import MemoryTransport
from kvrelay.kv_transfer.messages import (
    PROTOCOL_VERSION,
    Abort,
    Ack,
    Chunk,
    Finish,
    Frame,
    Grant,
    Hello,
    Offer,
    Ping,
    Pong,
    Pump,
    Refuse,
    Released,
    SlotsGranted,
    SlotsReturned,
    Want,
)
from kvrelay.kv_transfer.transport import TransportContext
from kvrelay.simulator.faults.network import End, Network
from kvrelay.simulator.faults.process import Process
from kvrelay.simulator.faults.transfer_thread import SimTransfers
from kvrelay.simulator.faults.world import World

NUM_LAYERS, BLOCK_SIZE, NUM_BLOCKS, TOKEN_BYTES = 2, 4, 32, 8
FINGERPRINT = KVFingerprint("m", "float32", NUM_LAYERS, 1, 2, "r")
LAYOUT = KVLayout(NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, 1, 2, "float32", 4)
NUM_TOKENS, SLOT_BYTES, NUM_SLOTS = 32, 256, 4
DIGEST = BlockHash(b"p" * 32)
CONFIG = KVTransferConfig(
    transport="memory", slot_bytes=SLOT_BYTES, num_send_slots=4, num_receive_slots=NUM_SLOTS,
    slots_per_transfer=2, max_pending_offers=3, connect_timeout_s=1.0, pending_offer_timeout_s=1.0,
    progress_timeout_s=3.0, quarantine_s=0.5, link_idle_s=2.0,
)  # fmt: skip
HONEST, OWN, NOBODYS = (TransferId(7, AttemptId(number)) for number in (1, 2, 3))
HONEST_BLOCKS = tuple(BlockId(block) for block in range(8))
OWN_BLOCKS = tuple(BlockId(block) for block in range(8, 16))


class HonestNode:
    """One node's transfers, and what became of them."""

    def __init__(self, world: World, network: Network, name: str) -> None:
        self.process = Process(world, name)
        self.process.start()
        shape = (NUM_LAYERS, 2, NUM_BLOCKS * BLOCK_SIZE, TOKEN_BYTES)
        self.cache = np.zeros(shape, dtype=np.uint8)
        self.events: list[TransferEvent] = []
        self.transfers = SimTransfers(
            self.process,
            network,
            HostKVStore(LAYOUT, self.cache),
            FINGERPRINT,
            replace(CONFIG, listen_host=name),
            self.events.append,
            lambda _thread: MemoryTransport,
        )

    def blocks(self, table: tuple[BlockId, ...]) -> np.ndarray:
        """The bytes of these blocks' tokens, in order."""
        return self.cache.reshape(NUM_LAYERS, 2, NUM_BLOCKS, BLOCK_SIZE, TOKEN_BYTES)[:, :, list(table)]

    def outcomes(self, transfer_id: TransferId) -> list[TransferEvent]:
        return [event for event in self.events if event.transfer_id == transfer_id]

    def assert_at_rest(self) -> None:
        snapshot = self.transfers.owner.snapshot()
        assert (snapshot.num_pushes, snapshot.num_receives, snapshot.num_pending_offers) == (0, 0, 0)
        assert (snapshot.send_slots.free, snapshot.receive_slots.free) == (4, NUM_SLOTS), snapshot


class Peer:
    """What is said and heard over one control connection."""

    def __init__(self, end: End) -> None:
        self.end = end
        self.heard: list[Frame] = []
        self.is_lost = False
        reader = FrameReader()
        end.on_message = lambda data: self.heard.extend(reader.feed(data))
        end.on_lost = lambda _reason: setattr(self, "is_lost", True)

    def say(self, what: Frame | bytes) -> None:
        self.end.send(what if isinstance(what, bytes) else frame_bytes(what))

    @property
    def ticket(self) -> int:
        """The link under which the node knows it; 0 before its hello."""
        hellos = [frame for frame in self.heard if isinstance(frame, Hello)]
        return int.from_bytes(hellos[0].ticket, "big") if hellos else 0


@dataclass
class Stage:
    """An honest prefill node ``p`` and decode node ``d``, and the process ``h`` of the hostile peer."""

    world: World = field(default_factory=lambda: World(1))

    def __post_init__(self) -> None:
        self.network = Network(self.world)
        self.sender = HonestNode(self.world, self.network, "p")
        self.receiver = HonestNode(self.world, self.network, "d")
        self.hostile = Process(self.world, "h")
        self.hostile.start()
        self.sender.cache[:] = ord("s")
        self.num_ready = 0
        random = np.random.default_rng(1)
        table = list(HONEST_BLOCKS)
        blocks = self.sender.cache.reshape(NUM_LAYERS, 2, NUM_BLOCKS, BLOCK_SIZE, TOKEN_BYTES)
        blocks[:, :, table] = random.integers(128, 256, blocks[:, :, table].shape, dtype=np.uint8)

    def start_honest(self) -> None:
        """A handoff from ``p`` to ``d``, granted and under way."""
        self.receiver.transfers.expect(ExpectedTransfer(HONEST, HONEST_BLOCKS, NUM_TOKENS, 0, DIGEST))
        self.sender.transfers.open_push(PushSpec(HONEST, "d:1", NUM_TOKENS, DIGEST))
        self.go_on()
        self.pass_s(0.3)

    def go_on(self) -> None:
        """The next tokens of the honest handoff are computed."""
        if self.num_ready < NUM_TOKENS:
            tokens = range(self.num_ready, self.num_ready + BLOCK_SIZE)
            self.num_ready = tokens.stop
            self.sender.transfers.push_ready(HONEST, HONEST_BLOCKS, range(NUM_LAYERS), tokens)
            if self.num_ready == NUM_TOKENS:
                self.sender.transfers.finish_push(HONEST, 42)

    def finish_honest(self) -> None:
        while self.num_ready < NUM_TOKENS:
            self.go_on()
        self.pass_s(1.0)

    def assert_honest_arrived(self) -> None:
        assert [type(event).__name__ for event in self.receiver.outcomes(HONEST)] == ["ReceiveDone"]
        assert [type(event).__name__ for event in self.sender.outcomes(HONEST)] == ["PushDone"]
        received, sent = (node.blocks(HONEST_BLOCKS) for node in (self.receiver, self.sender))
        np.testing.assert_array_equal(received, sent)

    def pass_s(self, seconds: float) -> None:
        self.world.run(self.world.now_s + seconds)

    def dial(self) -> Peer:
        """A connection of the hostile peer to ``d``."""
        made: list[Peer] = []
        self.network.dial(self.hostile, "d:kv", lambda end: made.append(Peer(end)), _unexpected)
        self.pass_s(0.1)
        return made[0]

    def listen(self) -> list[Peer]:
        """The connections to the hostile peer's own address, ``h:1``, as they come."""
        made: list[Peer] = []
        self.network.listen("h:kv", self.hostile, lambda end: made.append(Peer(end)))
        return made


def staging_of(node: HonestNode) -> MemoryTransport:
    """The transport through which a peer writes into a node's staging."""
    transport = node.transfers.owner._transport
    assert isinstance(transport, MemoryTransport)
    return transport


def hostile_staging(may_write: Callable[[int, int, int], bool]) -> tuple[MemoryTransport, HostStaging]:
    """Where honest senders write to, who were told of it by the hostile peer."""
    staging = HostStaging(NUM_SLOTS * SLOT_BYTES * 4)
    watcher: Any = None
    context = TransportContext("h", "h", 0, "", staging, staging, watcher, may_write)
    return MemoryTransport(context), staging


def hello(**changes: Any) -> Hello:
    fields = {
        "node_id": "stranger",
        "endpoint": b"",
        "ticket": b"",
        "slot_bytes": 0,
        "num_slots": 0,
    } | changes
    return Hello(
        version=PROTOCOL_VERSION, incarnation="1", fingerprint=FINGERPRINT, transport="memory", **fields
    )


def _unexpected(reason: str) -> None:
    raise AssertionError(reason)


# ---- what a peer may say -------------------------------------------------------------------------------

IDS = st.sampled_from((HONEST, OWN, OWN, OWN, NOBODYS))
SMALL = st.integers(0, 5)
SLOTS = st.lists(st.integers(0, NUM_SLOTS + 1), min_size=1, max_size=3, unique=True).map(tuple)
DIGESTS = st.sampled_from((DIGEST, b"x" * 32))
CODES = st.sampled_from(("TRANSFER_FAILED", "TRANSFER_CORRUPT", "INTERNAL", "NO SUCH CODE"))
SPANS = st.builds(lambda start, length: range(start, start + length), st.integers(0, 34), st.integers(1, 9))
NUM_BYTES = st.sampled_from((16, 32, 64, 128, 256, 257, 1 << 34))
TEXTS = st.text(max_size=5)
FRAMES: st.SearchStrategy[Frame] = st.one_of(
    st.builds(Offer, IDS, st.sampled_from((1, 31, 32, 33)), DIGESTS, st.just(FINGERPRINT.digest), SMALL),
    st.builds(Grant, IDS, st.sampled_from((0, 5, 31, 32, 33))),
    st.builds(Want, IDS, st.sampled_from((1, 2, 4096))),
    st.builds(SlotsGranted, IDS, SLOTS),
    st.builds(SlotsReturned, IDS, SLOTS),
    st.builds(
        Chunk, IDS, SMALL, st.integers(0, NUM_SLOTS + 1), st.sampled_from((range(2), range(1), range(1, 3))),
        SPANS, NUM_BYTES, st.booleans(), st.integers(0, 2**64 - 1),
    ),
    st.builds(Finish, IDS, SMALL, st.sampled_from((0, 64, 1024)), SMALL),
    st.builds(Ack, IDS),
    st.builds(Abort, IDS, CODES, TEXTS),
    st.builds(Released, IDS),
    st.builds(Refuse, CODES, TEXTS),
    st.builds(hello),
    st.sampled_from((Pump(), Ping(), Pong())),
)  # fmt: skip
NOISE = st.binary(min_size=1, max_size=40)
"""What breaks the framing."""
