"""What a node says of itself to every peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from kvrelay.core.kv import KVFingerprint, KVLayout, KVStore, StagingMemory
from kvrelay.kv_transfer.config import KVTransferConfig, StagingSlots
from kvrelay.kv_transfer.interface import TransferEvent
from kvrelay.kv_transfer.messages import PROTOCOL_VERSION, Hello
from kvrelay.kv_transfer.sockets import Sockets
from kvrelay.kv_transfer.transport import KVTransport, Watcher


@dataclass(frozen=True, slots=True)
class LocalNode:
    """Both directions of one service share it. `emit` reports a transfer's end; `clock` gives seconds;
    `sockets` makes control connections.

    `incarnation` is drawn when the service starts: the same node with another one has restarted.
    """

    node_id: str
    incarnation: str
    fingerprint: KVFingerprint
    store: KVStore
    config: KVTransferConfig
    slots: StagingSlots
    watcher: Watcher
    sockets: Sockets
    clock: Callable[[], float]
    emit: Callable[[TransferEvent], None]

    @property
    def layout(self) -> KVLayout:
        return self.store.layout

    def hello(self, transport: KVTransport, *, endpoint: bytes = b"", ticket: bytes = b"") -> Hello:
        """The first frame to a peer; with `endpoint` and `ticket` from a receiver."""
        is_receiver = bool(endpoint)
        return Hello(
            version=PROTOCOL_VERSION,
            node_id=self.node_id,
            incarnation=self.incarnation,
            fingerprint=self.fingerprint,
            transport=transport.name,
            endpoint=endpoint,
            ticket=ticket,
            slot_bytes=self.slots.slot_bytes if is_receiver else 0,
            num_slots=self.slots.num_receive_slots if is_receiver else 0,
        )


def checksum_of(staging: StagingMemory, offset: int, num_bytes: int) -> int:
    """xxh3-64 of that part of host memory."""
    return int(xxh3_64_intdigest(staging.host_view()[offset : offset + num_bytes]))
