"""The sender's end of a link: dials a receiver, exchanges `Hello`, and passes frames on to sessions."""

from __future__ import annotations

from typing import Protocol

from kvrelay.core.errors import KVRelayError, TransferFailed, error_from_code
from kvrelay.core.ids import TransferId
from kvrelay.kv_transfer.connection import Connection, unexpected
from kvrelay.kv_transfer.local_node import LocalNode
from kvrelay.kv_transfer.messages import (
    PROTOCOL_VERSION,
    Abort,
    Ack,
    Frame,
    Grant,
    Hello,
    Ping,
    Pong,
    Refuse,
    SlotsGranted,
)
from kvrelay.kv_transfer.peer_error import peer_error
from kvrelay.kv_transfer.push_events import (
    OfferGranted,
    PushAborted,
    PushAcked,
    PushEvent,
    RemoteSlotsGranted,
)
from kvrelay.kv_transfer.transport import KVTransport


class LinkOwner(Protocol):
    """Who hears of what comes over a link."""

    def on_peer_event(self, link: OutgoingLink, transfer_id: TransferId, event: PushEvent) -> None: ...

    def lose(self, link: OutgoingLink, error: KVRelayError) -> None: ...


class OutgoingLink:
    """Dials at once; usable when `is_ready`, which its owner sets when the transport has connected.

    Raises:
        OSError: the address can't even be dialled.
    """

    def __init__(
        self,
        node: LocalNode,
        transport: KVTransport,
        owner: LinkOwner,
        address: str,
        host: str,
        port: int,
        link_id: int,
    ) -> None:
        self.address = address
        self.link_id = link_id
        self.is_ready = False
        self.remote_slot_bytes = 0
        self.bytes_per_s: float | None = None
        self.dialled_s = self.last_used_s = node.clock()
        self.pumped_s = 0.0
        self._node = node
        self._transport = transport
        self._owner = owner
        self._host = host
        self._peer: Hello | None = None
        self.connection = Connection(
            node.sockets.dial(host, port),
            node.watcher,
            node.clock,
            on_frame=self._on_frame,
            on_lost=self._on_lost,
            is_connecting=True,
        )
        self.connection.send(node.hello(transport))

    @property
    def peer_name(self) -> str:
        """The receiver's node id and address."""
        return f"{self._peer.node_id} ({self.address})" if self._peer else self.address

    @property
    def is_trying(self) -> bool:
        """Whether the transport is connecting."""
        return self._peer is not None and not self.is_ready

    @property
    def max_message_bytes(self) -> int:
        """What fits a slot on either side."""
        return min(self.remote_slot_bytes, self._node.slots.slot_bytes)

    def _on_lost(self, error: KVRelayError) -> None:
        self._owner.lose(self, type(error)(f"{self.address}: {error.message}"))

    def _on_frame(self, frame: Frame) -> None:
        if self._peer is None:
            self._on_first_frame(frame)
            return
        match frame:
            case Grant():
                self._owner.on_peer_event(self, frame.transfer_id, OfferGranted(frame.first_token))
            case SlotsGranted():
                self._check_slots(frame)
                self._owner.on_peer_event(self, frame.transfer_id, RemoteSlotsGranted(frame.slots))
            case Ack():
                self._owner.on_peer_event(self, frame.transfer_id, PushAcked())
            case Abort():
                error = peer_error(frame.code, frame.message)
                self._owner.on_peer_event(self, frame.transfer_id, PushAborted(error))
            case Ping():
                self.connection.send(Pong())
            case Pong():
                pass
            case _:
                raise unexpected(frame)

    def _on_first_frame(self, frame: Frame) -> None:
        match frame:
            case Hello():
                self._on_hello(frame)
            case Refuse():
                refusal = peer_error(frame.code, frame.message)
                raise error_from_code(refusal.code, f"the link was refused: {frame.message}")
            case _:
                raise unexpected(frame)

    def _on_hello(self, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            raise TransferFailed(f"speaks version {hello.version}, this node {PROTOCOL_VERSION}")
        if hello.transport != self._transport.name:
            raise TransferFailed(f"moves KV by {hello.transport}, this node by {self._transport.name}")
        self._peer = hello
        self.remote_slot_bytes = hello.slot_bytes
        self._transport.connect(self.link_id, self._host, hello.endpoint, hello.ticket)

    def _check_slots(self, frame: SlotsGranted) -> None:
        assert self._peer is not None
        if max(frame.slots) >= self._peer.num_slots:
            raise unexpected(frame)
