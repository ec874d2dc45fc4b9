"""The sending half of a service: links to receivers, push sessions, and the messages under way."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from kvrelay.core.errors import KVRelayError, Overloaded, TransferFailed, TransferTimeout
from kvrelay.core.ids import BlockId, TransferId
from kvrelay.core.kv import DeviceKind, StagingMemory
from kvrelay.kv_transfer.copies import Copies
from kvrelay.kv_transfer.interface import PushDone, PushFailed, PushSpec, TransferStats
from kvrelay.kv_transfer.kv_range import KVRange
from kvrelay.kv_transfer.link_probe import floor_gb_per_s, slow_link_text
from kvrelay.kv_transfer.local_node import LocalNode, checksum_of
from kvrelay.kv_transfer.messages import Pump
from kvrelay.kv_transfer.outgoing_link import OutgoingLink
from kvrelay.kv_transfer.push_events import (
    FinishRequested,
    KVReported,
    LinkOpened,
    PushEvent,
    PushGivenUp,
    PushLinkLost,
    PushTicked,
    ReportPush,
    SendToReceiver,
    WriteFinished,
    WriteMessage,
)
from kvrelay.kv_transfer.push_session import PushPhase, PushSession
from kvrelay.kv_transfer.slot_pool import SlotCounts, SlotPool
from kvrelay.kv_transfer.transport import (
    KVTransport,
    LinkTried,
    PeerConnected,
    PeerLost,
    TransportEvent,
    WriteCompleted,
)

_PUMP_INTERVAL_S: Final = 0.01
_log = logging.getLogger(__name__)
_Job = tuple[TransferId, int]


@dataclass(frozen=True, slots=True)
class _Gather:
    """Of `message` into the local `slot`."""

    job: _Job
    slot: int
    message: WriteMessage


class Sender:
    """Runs on the owner's thread only."""

    def __init__(self, node: LocalNode, transport: KVTransport, staging: StagingMemory) -> None:
        self._node = node
        self._transport = transport
        self._staging = staging
        self._config = node.config
        self._slot_bytes = node.slots.slot_bytes
        self._sessions: dict[TransferId, PushSession] = {}
        self._link_of: dict[TransferId, OutgoingLink] = {}
        self._links: dict[str, OutgoingLink] = {}
        self._pool: SlotPool[_Job] = SlotPool(node.slots.num_send_slots)
        self._waiting: dict[_Job, WriteMessage] = {}
        self._gathers: Copies[_Gather] = Copies()
        self._writing: dict[int, tuple[_Job, int, int | None]] = {}
        self._checks = node.config.verify_checksums and staging.device_kind is DeviceKind.CPU

    @property
    def num_transfers(self) -> int:
        return len(self._sessions)

    @property
    def num_links(self) -> int:
        return len(self._links)

    @property
    def has_copies(self) -> bool:
        """Whether gathers are under way."""
        return bool(self._gathers)

    @property
    def link_bytes_per_s(self) -> dict[str, float]:
        """What the open links gave when they were made, by the receiver's address, where measured."""
        return {link.address: link.bytes_per_s for link in list(self._links.values()) if link.bytes_per_s}

    @property
    def slots(self) -> SlotCounts:
        return self._pool.counts

    def open(self, spec: PushSpec) -> None:
        """Begin a transfer; `connect` must follow."""
        self._sessions[spec.transfer_id] = PushSession(
            spec,
            self._node.layout,
            self._node.fingerprint.digest,
            slots_per_transfer=self._node.slots.slots_per_transfer,
            progress_timeout_s=self._config.progress_timeout_s,
            now_s=self._node.clock(),
        )

    def connect(self, spec: PushSpec, host: str, port: int, link_id: int) -> None:
        """Offer the transfer to an IP address; `link_id` is used if that needs a new link."""
        session = self._sessions.get(spec.transfer_id)
        if session is None:
            return
        link = self._links.get(spec.peer_address) or self._dial(spec, host, port, link_id)
        if link is None:
            return
        self._link_of[spec.transfer_id] = link
        if link.is_ready:
            self._handle(session, LinkOpened(link.max_message_bytes))

    def report(self, transfer_id: TransferId, block_table: tuple[BlockId, ...], part: KVRange) -> None:
        self._feed(transfer_id, KVReported(block_table, part))

    def finish(self, transfer_id: TransferId, output_token_id: int) -> None:
        self._feed(transfer_id, FinishRequested(output_token_id))

    def give_up(self, transfer_id: TransferId, error: KVRelayError | None) -> None:
        """End the transfer; with None without an event."""
        self._feed(transfer_id, PushGivenUp(error))

    def on_transport_event(self, event: TransportEvent) -> None:
        match event:
            case PeerConnected():
                for link in list(self._links.values()):
                    if link.link_id == event.link_id:
                        self._on_connected(link, event.bytes_per_s)
            case PeerLost():
                for link in list(self._links.values()):
                    if link.link_id == event.link_id:
                        self.lose(link, event.error)
            case LinkTried():
                return
            case WriteCompleted():
                self._on_written(event.write_id)

    def write_next(self) -> bool:
        """Post what is gathered, and begin one gather if there is a message and a slot for it.

        Returns whether it did something.
        """
        has_posted = False
        while (gather := self._gathers.pop_done()) is not None:
            has_posted = True
            self._post(gather)
        for job, slot in self._pool.grant(limit=1):
            self._begin(_Gather(job, slot, self._waiting.pop(job)))
            return True
        return has_posted

    def settle(self) -> None:
        """Wait for all gathers."""
        self._gathers.settle()

    def tick(self, now_s: float) -> None:
        """Deadlines, keep-alive, idle links."""
        self._pool.expire(now_s)
        for transfer_id in list(self._sessions):
            self._feed(transfer_id, PushTicked())
        for link in list(self._links.values()):
            self._tick_link(link, now_s)

    def pump(self, now_s: float) -> None:
        """Ask receivers to poll while writes to them are under way."""
        for link in self._links.values():
            has_writes = any(self._link_of.get(job[0]) is link for job, _, _ in self._writing.values())
            if (has_writes or link.is_trying) and now_s - link.pumped_s >= _PUMP_INTERVAL_S:
                link.pumped_s = now_s
                link.connection.send(Pump())

    def close(self, error: KVRelayError) -> None:
        """End every transfer, each with its event."""
        for transfer_id in list(self._sessions):
            self.give_up(transfer_id, error)
        for link in list(self._links.values()):
            self.lose(link, error)

    def lose(self, link: OutgoingLink, error: KVRelayError) -> None:
        """Drop the link; all its transfers fail with `error`."""
        if self._links.get(link.address) is link:
            del self._links[link.address]
        link.connection.close()
        self._transport.disconnect(link.link_id)
        lost = {transfer_id for transfer_id, used in self._link_of.items() if used is link}
        self._drop_writes(lost)
        for transfer_id in lost:
            self._feed(transfer_id, PushLinkLost(error))

    def fail_unconnected(self, transfer_id: TransferId, error: KVRelayError) -> None:
        """The address can't be connected to at all."""
        self._feed(transfer_id, PushLinkLost(error))

    def _dial(self, spec: PushSpec, host: str, port: int, link_id: int) -> OutgoingLink | None:
        try:
            if len(self._links) >= self._config.max_links:
                raise Overloaded(f"{self._config.max_links} links are open already")
            link = OutgoingLink(self._node, self._transport, self, spec.peer_address, host, port, link_id)
        except (OSError, Overloaded) as error:
            failed = TransferFailed(f"can't connect to {spec.peer_address}: {error}")
            self._feed(spec.transfer_id, PushLinkLost(failed))
            return None
        self._links[spec.peer_address] = link
        return link

    def _on_connected(self, link: OutgoingLink, bytes_per_s: float | None) -> None:
        link.bytes_per_s = bytes_per_s
        if bytes_per_s is not None and (fault := self._fault_of(link, bytes_per_s)) is not None:
            _log.warning("%s", fault)
            if self._config.refuse_slow_links:
                self.lose(link, TransferFailed(f"{fault}; refuse_slow_links is set"))
                return
        self._on_ready(link)

    def _fault_of(self, link: OutgoingLink, bytes_per_s: float) -> str | None:
        node_id, is_on_gpus = self._node.node_id, self._staging.device_kind is DeviceKind.CUDA
        floor = floor_gb_per_s(
            self._config.link_floor_gb_per_s,
            is_on_gpus=is_on_gpus,
            is_one_host=link.connection.is_to_this_host,
        )
        _log.info("the KV link from %s to %s gives %.1f GB/s", node_id, link.peer_name, bytes_per_s / 1e9)
        return slow_link_text((node_id, link.peer_name), bytes_per_s, floor, is_on_gpus=is_on_gpus)

    def _on_ready(self, link: OutgoingLink) -> None:
        link.is_ready = True
        for transfer_id in [key for key, used in self._link_of.items() if used is link]:
            self._feed(transfer_id, LinkOpened(link.max_message_bytes))

    def on_peer_event(self, link: OutgoingLink, transfer_id: TransferId, event: PushEvent) -> None:
        """A frame about one transfer came over `link`."""
        if self._link_of.get(transfer_id) is link:
            self._feed(transfer_id, event)

    def _feed(self, transfer_id: TransferId, event: PushEvent) -> None:
        session = self._sessions.get(transfer_id)
        if session is not None:
            self._handle(session, event)

    def _handle(self, session: PushSession, event: PushEvent) -> None:
        transfer_id = session.spec.transfer_id
        link = self._link_of.get(transfer_id)
        effects = session.handle(event, self._node.clock())
        stopped = [] if session.is_live else self._stop_gathers(transfer_id)
        frames = [effect.frame for effect in effects if isinstance(effect, SendToReceiver)]
        if frames and link is not None:
            link.connection.send(*frames)
        for effect in effects:
            match effect:
                case WriteMessage():
                    job = (transfer_id, effect.sequence_number)
                    self._waiting[job] = effect
                    self._pool.request(job, 1)
                case ReportPush():
                    self._report(session.spec, effect)
        if session.phase is PushPhase.ENDED and self._sessions.get(transfer_id) is session:
            del self._sessions[transfer_id]
            self._link_of.pop(transfer_id, None)
            if link is not None:
                link.last_used_s = self._node.clock()
        for sequence_number in stopped:
            self._handle(session, WriteFinished(sequence_number, None))

    def _stop_gathers(self, transfer_id: TransferId) -> list[int]:
        """Nothing reads the transfer's blocks once its end is told; returns the numbers of the messages."""
        stopped = self._gathers.take(transfer_id)
        for gather in stopped:
            self._pool.free(gather.slot)
        return [gather.job[1] for gather in stopped]

    def _report(self, spec: PushSpec, effect: ReportPush) -> None:
        if effect.error is not None:
            self._node.emit(PushFailed(spec.transfer_id, effect.error))
            return
        stats = TransferStats(effect.num_bytes, effect.num_messages, effect.seconds, self._transport.name)
        self._node.emit(PushDone(spec.transfer_id, stats))

    def _begin(self, gather: _Gather) -> None:
        job, message, part = gather.job, gather.message, gather.message.part
        session = self._sessions.get(job[0])
        if session is None or not session.is_live:
            self._pool.free(gather.slot)
            self._feed(job[0], WriteFinished(message.sequence_number, None))
            return
        offset = gather.slot * self._slot_bytes
        copy = self._node.store.gather(message.block_table, part.layers, part.tokens, self._staging, offset)
        assert copy.num_bytes == message.num_bytes, f"gathers {copy.num_bytes} of {message.num_bytes} bytes"
        if copy.is_done():
            self._post(gather)
        else:
            self._gathers.add(job[0], copy, gather)

    def _post(self, gather: _Gather) -> None:
        """Of a live session alone: `_stop_gathers` has taken out all others."""
        link = self._link_of[gather.job[0]]
        offset, num_bytes = gather.slot * self._slot_bytes, gather.message.num_bytes
        checksum = checksum_of(self._staging, offset, num_bytes) if self._checks else None
        remote_offset = gather.message.slot * link.remote_slot_bytes
        write_id = self._transport.post_write(link.link_id, offset, remote_offset, num_bytes)
        self._writing[write_id] = (gather.job, gather.slot, checksum)

    def _on_written(self, write_id: int) -> None:
        if (found := self._writing.pop(write_id, None)) is None:
            return
        job, slot, checksum = found
        self._pool.free(slot)
        self._feed(job[0], WriteFinished(job[1], checksum))

    def _drop_writes(self, transfer_ids: set[TransferId]) -> None:
        for job in [job for job in self._waiting if job[0] in transfer_ids]:
            del self._waiting[job]
            self._pool.withdraw(job)
        until_s = self._node.clock() + self._config.quarantine_s
        for write_id, (job, _, _) in list(self._writing.items()):
            if job[0] not in transfer_ids:
                continue
            del self._writing[write_id]
            if self._transport.late_writes:
                self._pool.quarantine(job, until_s)
            else:
                self._pool.release(job)

    def _tick_link(self, link: OutgoingLink, now_s: float) -> None:
        timeout_s = self._config.progress_timeout_s
        mine = [key for key, used in self._link_of.items() if used is link]
        if not link.is_ready:
            if now_s - link.dialled_s >= self._config.connect_timeout_s:
                self.lose(
                    link, TransferTimeout(f"{link.address} did not answer for {now_s - link.dialled_s:.1f} s")
                )
            return
        if mine:
            link.connection.keep_alive(now_s, timeout_s / 4)
        elif now_s - link.last_used_s >= self._config.link_idle_s:
            self.lose(link, TransferFailed("the link was idle"))
            return
        stalled = any(self._sessions[key].has_stalled_writes(now_s) for key in mine)
        if stalled or link.connection.silent_s(now_s) >= timeout_s * 3 / 4:
            self.lose(link, TransferTimeout(f"{link.address} made no progress for {timeout_s:.1f} s"))
