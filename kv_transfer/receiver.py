"""The receiving half of a service: links from senders, receive sessions, and the slots granted to them."""

from __future__ import annotations

import socket
from typing import Final

from kvrelay.core.errors import KVRelayError, TransferFailed, TransferTimeout
from kvrelay.core.ids import TransferId
from kvrelay.core.kv import StagingMemory
from kvrelay.kv_transfer.connection import unexpected
from kvrelay.kv_transfer.draining import Draining
from kvrelay.kv_transfer.incoming_link import IncomingLink
from kvrelay.kv_transfer.interface import ExpectedTransfer, ReceiveDone, ReceiveFailed, TransferStats
from kvrelay.kv_transfer.local_node import LocalNode
from kvrelay.kv_transfer.messages import (
    Abort,
    Chunk,
    Finish,
    Frame,
    Offer,
    Released,
    SlotsReturned,
    Want,
)
from kvrelay.kv_transfer.offer_book import OfferBook
from kvrelay.kv_transfer.offer_desk import OfferDesk
from kvrelay.kv_transfer.peer_error import peer_error
from kvrelay.kv_transfer.receive_events import (
    ChunkArrived,
    FinishArrived,
    FreeSlots,
    MessageScattered,
    OfferMatched,
    QuarantineSlots,
    ReceiveAborted,
    ReceiveEvent,
    ReceiveGivenUp,
    ReceiveLinkLost,
    ReceiveTicked,
    ReportReceive,
    RequestSlots,
    ScatterMessage,
    SendToSender,
    SlotsAssigned,
    SlotsGivenBack,
    SlotsWanted,
)
from kvrelay.kv_transfer.receive_session import ReceivePhase, ReceiveSession
from kvrelay.kv_transfer.scatters import Scatters
from kvrelay.kv_transfer.slot_pool import SlotCounts, SlotPool
from kvrelay.kv_transfer.transport import KVTransport, PeerLost

_PUMPED_S: Final = 0.025


class Receiver:
    """Runs on the owner's thread only."""

    def __init__(self, node: LocalNode, transport: KVTransport, staging: StagingMemory) -> None:
        config = node.config
        self._node = node
        self._transport = transport
        self._config = config
        self._slot_bytes = node.slots.slot_bytes
        self._sessions: dict[TransferId, ReceiveSession] = {}
        self._link_of: dict[TransferId, IncomingLink] = {}
        self._links: dict[int, IncomingLink] = {}
        self._pool: SlotPool[TransferId] = SlotPool(node.slots.num_receive_slots)
        self._scatters = Scatters(node, staging, self._pool)
        self._draining = Draining()
        self._offers = OfferBook(config.max_pending_offers, config.pending_offer_timeout_s)
        self._desk = OfferDesk(self._offers, self._links, config.pending_offer_timeout_s)
        self._pumped_until_s = 0.0

    @property
    def num_transfers(self) -> int:
        return len(self._sessions)

    @property
    def num_pending_offers(self) -> int:
        return len(self._offers)

    @property
    def num_links(self) -> int:
        return len(self._links)

    @property
    def has_copies(self) -> bool:
        """Whether scatters are under way."""
        return bool(self._scatters)

    @property
    def num_greeting(self) -> int:
        """Links whose peer has not said hello yet."""
        return sum(link.peer is None for link in self._links.values())

    @property
    def slots(self) -> SlotCounts:
        return self._pool.counts

    def is_pumped(self, now_s: float) -> bool:
        """Whether a sender has asked, a moment ago, for the transport to be polled."""
        return now_s < self._pumped_until_s

    def may_write(self, link_id: int, offset: int, num_bytes: int) -> bool:
        """Whether that part of the staging was granted to a transfer over that link."""
        slot, within = divmod(offset, self._slot_bytes)
        if within or not 0 < num_bytes <= self._slot_bytes:
            return False
        holder = self._pool.holder_of(slot)
        if holder is None:
            return False
        link = self._link_of.get(holder)
        return link.link_id == link_id if link else self._draining.link_of(holder) == link_id

    def holder_of(self, offset: int) -> TransferId | None:
        """Which transfer holds the slot there, in quarantine too."""
        return self._pool.holder_of(offset // self._slot_bytes)

    def accept(self, sock: socket.socket, link_id: int) -> None:
        """Take a new connection, or close it when there are too many."""
        if len(self._links) >= self._config.max_links:
            sock.close()
            return
        self._links[link_id] = IncomingLink(self._node, self._transport, self, sock, link_id)

    def expect(self, expected: ExpectedTransfer) -> None:
        """Accept this transfer, offered already or not; one that is over fails at once."""
        if (error := self._offers.ended_error(expected.transfer_id)) is not None:
            self._node.emit(ReceiveFailed(expected.transfer_id, error))
            return
        session = ReceiveSession(
            expected,
            self._node.layout,
            self._node.fingerprint,
            slot_bytes=self._slot_bytes,
            slots_per_transfer=self._node.slots.slots_per_transfer,
            progress_timeout_s=self._config.progress_timeout_s,
            now_s=self._node.clock(),
        )
        self._sessions[expected.transfer_id] = session
        if (offered := self._desk.take(expected.transfer_id)) is not None:
            self._match(session, *offered)

    def give_up(self, transfer_id: TransferId, error: KVRelayError | None) -> None:
        """End the transfer; with None without an event."""
        if transfer_id not in self._sessions:
            return
        self._feed(transfer_id, ReceiveGivenUp(error))

    def refuse(self, transfer_id: TransferId) -> None:
        """Nobody expects this transfer: its sender is told, now or when it offers it."""
        self._desk.refuse(transfer_id)

    def on_hello(self, link: IncomingLink) -> None:
        """A restarted or redialling peer replaces its old link."""
        for other in list(self._links.values()):
            if other is not link and other.peer and link.peer and other.peer.node_id == link.peer.node_id:
                self.lose(other, TransferFailed(f"{link.peer_name} has connected anew"))

    def on_pump(self) -> None:
        self._pumped_until_s = self._node.clock() + _PUMPED_S

    def on_frame(self, link: IncomingLink, frame: Frame) -> None:
        match frame:
            case Offer():
                self._on_offer(link, frame)
            case Want():
                self._from_sender(link, frame.transfer_id, SlotsWanted(frame.num_slots))
            case SlotsReturned():
                self._from_sender(link, frame.transfer_id, SlotsGivenBack(frame.slots))
            case Chunk():
                self._from_sender(link, frame.transfer_id, ChunkArrived(frame))
            case Finish():
                self._from_sender(link, frame.transfer_id, FinishArrived(frame))
            case Abort():
                error = peer_error(frame.code, frame.message)
                self._offers.withdraw(frame.transfer_id, link.link_id, error)
                self._from_sender(link, frame.transfer_id, ReceiveAborted(error))
            case Released():
                if self._draining.take(frame.transfer_id, link.link_id):
                    self._pool.release(frame.transfer_id)
            case _:
                raise unexpected(frame)

    def on_peer_lost(self, event: PeerLost) -> None:
        """The transport has lost a sender."""
        if (link := self._links.get(event.link_id)) is not None:
            self.lose(link, event.error)

    def hand_out(self) -> bool:
        """Grant free slots to the transfers that wait; returns whether there were any."""
        assigned: dict[TransferId, list[int]] = {}
        for transfer_id, slot in self._pool.grant():
            assigned.setdefault(transfer_id, []).append(slot)
        for transfer_id, slots in assigned.items():
            self._feed(transfer_id, SlotsAssigned(tuple(slots)))
        return bool(assigned)

    def end_scatters(self) -> bool:
        """Take back the slots of messages that are in the cache now; returns whether there were any."""
        found = False
        while (transfer_id := self._scatters.pop_done()) is not None:
            found = True
            self._feed(transfer_id, MessageScattered())
        return found

    def settle(self) -> None:
        """Wait for all scatters."""
        self._scatters.settle()

    def tick(self, now_s: float) -> None:
        """Deadlines, keep-alive, quarantine."""
        self._pool.expire(now_s)
        self._desk.expire(now_s)
        for transfer_id in list(self._sessions):
            self._feed(transfer_id, ReceiveTicked())
        for link in list(self._links.values()):
            self._tick_link(link, now_s)

    def close(self, error: KVRelayError) -> None:
        """End every transfer, each with its event."""
        for transfer_id in list(self._sessions):
            self.give_up(transfer_id, error)
        for link in list(self._links.values()):
            self.lose(link, error)

    def lose(self, link: IncomingLink, error: KVRelayError) -> None:
        """Drop the link; all its transfers fail with `error`."""
        self._links.pop(link.link_id, None)
        link.connection.close()
        self._transport.disconnect(link.link_id)
        self._offers.drop_link(link.link_id, error)
        lost = [transfer_id for transfer_id, used in self._link_of.items() if used is link]
        for transfer_id in lost:
            self._feed(transfer_id, ReceiveLinkLost(error))
        for transfer_id in [*lost, *self._draining.drop_link(link.link_id)]:
            if self._transport.late_writes:
                self._pool.quarantine(transfer_id, self._node.clock() + self._config.quarantine_s)
            else:
                self._pool.release(transfer_id)

    def _on_offer(self, link: IncomingLink, offer: Offer) -> None:
        session = self._sessions.get(offer.transfer_id)
        if session is None:
            self._desk.keep(link, offer, self._node.clock())
        elif session.phase is ReceivePhase.EXPECTING:
            self._match(session, link, offer)
        else:
            error = TransferFailed(f"transfer {offer.transfer_id} is under way already")
            self._desk.decline(link, offer.transfer_id, error)

    def _match(self, session: ReceiveSession, link: IncomingLink, offer: Offer) -> None:
        self._link_of[offer.transfer_id] = link
        self._handle(session, OfferMatched(offer, link.peer_fingerprint))

    def _from_sender(self, link: IncomingLink, transfer_id: TransferId, event: ReceiveEvent) -> None:
        """Frames of transfers that have ended here may still be on their way, and are ignored."""
        if self._link_of.get(transfer_id) is link:
            self._feed(transfer_id, event)

    def _feed(self, transfer_id: TransferId, event: ReceiveEvent) -> None:
        session = self._sessions.get(transfer_id)
        if session is not None:
            self._handle(session, event)

    def _handle(self, session: ReceiveSession, event: ReceiveEvent) -> None:
        transfer_id = session.expected.transfer_id
        link = self._link_of.get(transfer_id)
        outcome: ReceiveEvent | None = None
        effects = session.handle(event, self._node.clock())
        if session.phase is ReceivePhase.ENDED:
            self._scatters.stop(transfer_id)
        frames = [effect.frame for effect in effects if isinstance(effect, SendToSender)]
        if frames and link is not None:
            link.connection.send(*frames)
        for effect in effects:
            match effect:
                case RequestSlots():
                    self._pool.request(transfer_id, effect.num_slots)
                case ScatterMessage():
                    outcome = self._scatters.begin(transfer_id, effect)
                case FreeSlots():
                    self._free(transfer_id, effect)
                case QuarantineSlots():
                    self._quarantine(transfer_id, link)
                case ReportReceive():
                    self._report(transfer_id, effect)
        if session.phase is ReceivePhase.ENDED and self._sessions.pop(transfer_id, None) is not None:
            self._link_of.pop(transfer_id, None)
            self._offers.mark_ended(transfer_id, TransferFailed(f"transfer {transfer_id} is over"))
        elif outcome is not None:
            self._handle(session, outcome)

    def _free(self, transfer_id: TransferId, effect: FreeSlots) -> None:
        if effect.slots is None:
            self._pool.release(transfer_id)
            return
        for slot in effect.slots:
            self._pool.free(slot)

    def _quarantine(self, transfer_id: TransferId, link: IncomingLink | None) -> None:
        self._pool.quarantine(transfer_id, None)
        if link is not None and self._pool.slots_of(transfer_id):
            self._draining.add(transfer_id, link.link_id, self._node.clock())

    def _report(self, transfer_id: TransferId, effect: ReportReceive) -> None:
        if effect.error is not None:
            self._node.emit(ReceiveFailed(transfer_id, effect.error))
            return
        stats = TransferStats(effect.num_bytes, effect.num_messages, effect.seconds, self._transport.name)
        self._node.emit(ReceiveDone(transfer_id, effect.output_token_id, stats, effect.num_tokens))

    def _tick_link(self, link: IncomingLink, now_s: float) -> None:
        timeout_s = self._config.progress_timeout_s
        if link.peer is None:
            if now_s - link.accepted_s >= self._config.connect_timeout_s:
                self.lose(link, TransferTimeout(f"no hello for {now_s - link.accepted_s:.1f} s"))
            return
        if self._is_used(link):
            link.connection.keep_alive(now_s, timeout_s / 4)
        stalled = now_s - self._draining.oldest_s(link.link_id, now_s) >= timeout_s
        if stalled or link.connection.silent_s(now_s) >= timeout_s * 3 / 4:
            self.lose(link, TransferTimeout(f"{link.peer_name} made no progress for {timeout_s:.1f} s"))

    def _is_used(self, link: IncomingLink) -> bool:
        if self._draining.has_link(link.link_id) or self._offers.has_link(link.link_id):
            return True
        return any(used is link for used in self._link_of.values())
