"""Everything that lives on the owner thread of one service, and the order of its turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Final

from kvrelay.core.errors import KVRelayError, Overloaded, TransferFailed
from kvrelay.core.ids import BlockId, TransferId
from kvrelay.core.kv import DeviceKind, StagingMemory
from kvrelay.kv_transfer.choose_transport import ChosenTransport, choose_transport
from kvrelay.kv_transfer.interface import ExpectedTransfer, PushFailed, PushSpec, ReceiveFailed
from kvrelay.kv_transfer.kv_range import KVRange
from kvrelay.kv_transfer.local_node import LocalNode
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.kv_transfer.sender import Sender
from kvrelay.kv_transfer.slot_pool import SlotCounts
from kvrelay.kv_transfer.transport import SCRATCH_BYTES, PeerLost, TransportContext, TransportFactory

_MAX_TICK_S: Final = 0.1
_IDLE_TICK_S: Final = 1.0
_SPIN_S: Final = 2e-3
_CLOSED: Final = "this node's KV transfer is closed"


@dataclass(frozen=True, slots=True)
class TransferSnapshot:
    """What a service holds now. At rest: no transfers or offers, and all slots free."""

    num_pushes: int
    num_receives: int
    num_pending_offers: int
    num_outgoing_links: int
    num_incoming_links: int
    send_slots: SlotCounts
    receive_slots: SlotCounts


class TransferOwner:
    """A `ReactorClient`. Its commands (`open` .. `cancel`) run on the reactor's thread as well."""

    def __init__(self, node: LocalNode, transport_factory: TransportFactory | None) -> None:
        self._node = node
        self._config = node.config
        self._factory = transport_factory
        self._link_ids = count(1)
        self._tick_due_s = 0.0
        self._is_tick_deferred = False
        self._error: KVRelayError | None = None
        self._overflowed: set[TransferId] = set()
        self.port = 0
        self.transport_note = ""

    def begin(self) -> None:
        node, config = self._node, self._config
        send_staging = self._allocate(node.slots.num_send_slots)
        receive_staging = self._allocate(node.slots.num_receive_slots)
        self._listener = node.sockets.listen(config.bound_host, config.listen_port)
        try:
            chosen = self._choose(send_staging, receive_staging)
        except BaseException:
            self._listener.close()
            raise
        self._transport = chosen.transport
        self.transport_note = chosen.note
        self._sender = Sender(node, self._transport, send_staging)
        self._receiver = Receiver(node, self._transport, receive_staging)
        self.port = int(self._listener.getsockname()[1])
        node.watcher.watch(self._listener, 1, self._on_connection)

    def turn(self, now_s: float) -> bool:
        events = self._transport.poll()
        for event in events:
            self._sender.on_transport_event(event)
            if isinstance(event, PeerLost):
                self._receiver.on_peer_lost(event)
        has_scattered = self._receiver.end_scatters()
        has_granted = self._receiver.hand_out()
        has_written = self._sender.write_next()
        if self._transport.polls:
            self._sender.pump(now_s)
        self._tick_if_due(now_s)
        return bool(events) or has_scattered or has_granted or has_written

    def is_polling(self, now_s: float) -> bool:
        if self._has_copies:
            return True
        if not self._transport.polls:
            return False
        return self._transport.has_writes_in_flight or self._receiver.is_pumped(now_s)

    def spin_s(self) -> float:
        """A GPU's copies and writes take a fraction of a millisecond, and nothing tells of their end."""
        is_on_gpu = self._node.store.device_kind is DeviceKind.CUDA
        is_moving = self._has_copies or (is_on_gpu and self._transport.has_writes_in_flight)
        return _SPIN_S if is_moving else 0.0

    @property
    def _has_copies(self) -> bool:
        return self._sender.has_copies or self._receiver.has_copies

    def wait_s(self, now_s: float) -> float | None:
        if self._is_tick_deferred:
            return 0.0
        if self._is_active():
            return max(0.0, self._tick_due_s - now_s)
        return _IDLE_TICK_S if self._sender.num_links else None

    def end(self) -> None:
        self._error = self._error or TransferFailed(_CLOSED)
        self._sender.settle()
        self._receiver.settle()
        self._sender.close(self._error)
        self._receiver.close(self._error)
        self._node.watcher.unwatch(self._listener)
        self._listener.close()
        self._transport.close()

    def crashed(self, error: BaseException) -> None:
        self._error = TransferFailed(f"this node's KV transfer failed: {error!r}")

    def snapshot(self) -> TransferSnapshot:
        return TransferSnapshot(
            num_pushes=self._sender.num_transfers,
            num_receives=self._receiver.num_transfers,
            num_pending_offers=self._receiver.num_pending_offers,
            num_outgoing_links=self._sender.num_links,
            num_incoming_links=self._receiver.num_links,
            send_slots=self._sender.slots,
            receive_slots=self._receiver.slots,
        )

    def holder_of(self, receive_offset: int) -> TransferId | None:
        """Which transfer holds that part of the receive staging, in quarantine too; for tests."""
        return self._receiver.holder_of(receive_offset)

    def link_bytes_per_s(self) -> dict[str, float]:
        return self._sender.link_bytes_per_s

    def expect(self, expected: ExpectedTransfer) -> None:
        if self._error is not None:
            self._node.emit(ReceiveFailed(expected.transfer_id, self._error))
        else:
            self._receiver.expect(expected)

    def refuse(self, transfer_id: TransferId) -> None:
        if self._error is None:
            self._receiver.refuse(transfer_id)

    def open(self, spec: PushSpec) -> None:
        if self._error is not None:
            self._node.emit(PushFailed(spec.transfer_id, self._error))
        else:
            self._sender.open(spec)

    def connect(self, spec: PushSpec, host: str, port: int) -> None:
        if self._error is None:
            self._sender.connect(spec, host, port, next(self._link_ids))

    def report(self, transfer_id: TransferId, block_table: tuple[BlockId, ...], part: KVRange) -> None:
        self._sender.report(transfer_id, block_table, part)

    def finish(self, transfer_id: TransferId, output_token_id: int) -> None:
        self._sender.finish(transfer_id, output_token_id)

    def fail_push(self, transfer_id: TransferId, error: KVRelayError) -> None:
        """The receiver's address is no good."""
        self._sender.fail_unconnected(transfer_id, error)

    def cancel(self, transfer_id: TransferId, on_cancelled: Callable[[], None]) -> None:
        """End the transfer without an event; nothing uses its blocks when `on_cancelled` is called."""
        self._sender.give_up(transfer_id, None)
        self._receiver.give_up(transfer_id, None)
        on_cancelled()

    def overflow(self, transfer_id: TransferId) -> None:
        """From any thread: a report of this transfer was lost because the inbox is full."""
        self._overflowed.add(transfer_id)

    def _allocate(self, num_slots: int) -> StagingMemory:
        return self._node.store.allocate_staging(num_slots * self._node.slots.slot_bytes + SCRATCH_BYTES)

    def _choose(self, send_staging: StagingMemory, receive_staging: StagingMemory) -> ChosenTransport:
        context = TransportContext(
            name=f"{self._node.node_id}-{self._node.incarnation}",
            listen_host=self._config.bound_host,
            data_port=self._config.data_port,
            ucx_tls=self._config.ucx_tls,
            send_staging=send_staging,
            receive_staging=receive_staging,
            watcher=self._node.watcher,
            may_write=lambda link_id, offset, length: self._receiver.may_write(link_id, offset, length),
        )
        if self._factory is not None:
            transport = self._factory(context)
            return ChosenTransport(transport, f"{transport.name}: given by the caller")
        return choose_transport(self._config.transport, context)

    def _on_connection(self, _events: int) -> None:
        try:
            sock, _address = self._listener.accept()
        except OSError:
            return  # the peer has gone already, or descriptors are short: it will come again
        self._receiver.accept(sock, next(self._link_ids))

    def _tick_if_due(self, now_s: float) -> None:
        late_s = now_s - self._tick_due_s
        if late_s < 0:
            return
        # After a pause of this thread itself, what peers have sent meanwhile must be read, in one more
        # turn, before they are blamed for their silence.
        self._is_tick_deferred = late_s > self._tick_interval_s() and not self._is_tick_deferred
        if not self._is_tick_deferred:
            self._tick_due_s = now_s + self._tick_interval_s()
            self._tick(now_s)

    def _tick_interval_s(self) -> float:
        config = self._config
        shortest_s = min(
            config.progress_timeout_s,
            config.connect_timeout_s,
            config.pending_offer_timeout_s,
            config.quarantine_s,
        )
        return min(shortest_s / 8, _MAX_TICK_S)

    def _tick(self, now_s: float) -> None:
        while self._overflowed:
            transfer_id = self._overflowed.pop()
            self._sender.give_up(transfer_id, Overloaded("too many reports of ready KV wait"))
        self._sender.tick(now_s)
        self._receiver.tick(now_s)

    def _is_active(self) -> bool:
        sender, receiver = self._sender, self._receiver
        if sender.num_transfers or receiver.num_transfers or receiver.num_pending_offers:
            return True
        slots = (sender.slots, receiver.slots)
        return any(counts.held or counts.quarantined for counts in slots) or receiver.num_greeting > 0
