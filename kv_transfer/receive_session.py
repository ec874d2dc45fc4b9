"""The receiver's side of one transfer, as a state machine: events in, effects out, no I/O and no clock.

::

    EXPECTING --OfferMatched--> RECEIVING --FinishArrived, all verified--> STORING --(all scattered)--> ENDED
         any of them --anything wrong--> ENDED

A transfer that ends early while the sender may still write leaves its slots in quarantine. Nothing is
reported done before every (layer, token) has come exactly once, every checksum was right, and all of it
lies in the cache.
"""

from __future__ import annotations

from enum import StrEnum
from typing import assert_never

from kvrelay.core.block_hash import BlockHash
from kvrelay.core.errors import (
    KVLayoutMismatch,
    KVRelayError,
    TransferCorrupt,
    TransferFailed,
    TransferTimeout,
)
from kvrelay.core.kv import KVFingerprint, KVLayout
from kvrelay.kv_transfer.config import MAX_SLOTS
from kvrelay.kv_transfer.interface import ExpectedTransfer
from kvrelay.kv_transfer.kv_range import Coverage, KVRange
from kvrelay.kv_transfer.messages import Abort, Ack, Chunk, Grant, Offer, SlotsGranted
from kvrelay.kv_transfer.receive_events import (
    ChunkArrived,
    FinishArrived,
    FreeSlots,
    MessageScattered,
    OfferMatched,
    QuarantineSlots,
    ReceiveAborted,
    ReceiveEffect,
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


class ReceivePhase(StrEnum):
    """See the module's text."""

    EXPECTING = "expecting"
    RECEIVING = "receiving"
    STORING = "storing"
    ENDED = "ended"


class ReceiveSession:
    """See the module's text. After `ENDED` nothing has an effect."""

    def __init__(
        self,
        expected: ExpectedTransfer,
        layout: KVLayout,
        fingerprint: KVFingerprint,
        *,
        slot_bytes: int,
        slots_per_transfer: int,
        progress_timeout_s: float,
        now_s: float,
    ) -> None:
        self.expected = expected
        self.phase = ReceivePhase.EXPECTING
        self._layout = layout
        self._fingerprint = fingerprint
        self._slot_bytes = slot_bytes
        self._window = slots_per_transfer
        self._progress_timeout_s = progress_timeout_s
        self._started_s = now_s
        self._last_progress_s = now_s
        self._num_tokens = expected.num_tokens
        self._coverage = Coverage(layout.num_layers, expected.first_token, expected.num_tokens)
        self._slots: set[int] = set()
        self._num_wanted = 0
        self._num_queued = 0
        self._num_scattering = 0
        self._output_token_id = 0
        self._num_messages = 0
        self._num_bytes = 0

    def handle(self, event: ReceiveEvent, now_s: float) -> list[ReceiveEffect]:
        if self.phase is ReceivePhase.ENDED:
            return []
        if not isinstance(event, ReceiveTicked | ReceiveGivenUp):
            self._last_progress_s = now_s
        try:
            return self._dispatch(event, now_s)
        except KVRelayError as error:
            return self._give_up(error, now_s)

    def _dispatch(self, event: ReceiveEvent, now_s: float) -> list[ReceiveEffect]:
        match event:
            case OfferMatched():
                return self._on_offer(event, now_s)
            case SlotsWanted():
                return self._want(event.num_slots)
            case SlotsAssigned():
                return self._on_assigned(event)
            case SlotsGivenBack():
                return self._on_given_back(event)
            case ChunkArrived():
                return self._on_chunk(event.chunk)
            case MessageScattered():
                self._num_scattering -= 1
                return self._end_if_stored(now_s)
            case FinishArrived():
                return self._on_finish(event, now_s)
            case ReceiveAborted():
                return self._end(event.error, now_s, [QuarantineSlots()])
            case ReceiveGivenUp():
                return self._give_up(event.error, now_s)
            case ReceiveLinkLost():
                # The shell sets the slots of a lost link aside itself: it knows the transport.
                return self._end(event.error, now_s, [])
            case ReceiveTicked():
                return self._on_ticked(now_s)
            case _:
                assert_never(event)

    def _on_offer(self, event: OfferMatched, now_s: float) -> list[ReceiveEffect]:
        self.phase = ReceivePhase.RECEIVING
        self._started_s = now_s
        self._check_offer(event.offer, event.peer_fingerprint)
        grant = SendToSender(Grant(self.expected.transfer_id, self.expected.first_token))
        return [grant, *self._want(event.offer.num_slots)]

    def _check_offer(self, offer: Offer, peer_fingerprint: KVFingerprint) -> None:
        if difference := self._fingerprint.difference(peer_fingerprint):
            raise KVLayoutMismatch(f"KV fingerprints differ, receiver != sender: {difference}")
        if offer.fingerprint_digest != self._fingerprint.digest:
            raise KVLayoutMismatch("the offer's fingerprint digest is not that of its sender's fingerprint")
        expected_digest = self.expected.prompt_digest
        if offer.num_tokens != self.expected.num_tokens:
            expected_digest = self._expect_fewer(offer)
        if offer.prompt_digest != expected_digest:
            raise TransferCorrupt(
                f"prompt digests differ: expected {expected_digest.hex()[:16]},"
                f" offered {offer.prompt_digest.hex()[:16]}"
            )

    def _expect_fewer(self, offer: Offer) -> BlockHash:
        """The sender has another number of tokens; returns what their digest must be."""
        expected, num_tokens = self.expected, offer.num_tokens
        if expected.or_fewer is None or num_tokens > expected.num_tokens:
            raise TransferCorrupt(
                f"the sender offers {num_tokens} tokens, {expected.num_tokens} are expected"
            )
        if num_tokens <= expected.first_token:
            raise TransferFailed(
                f"the sender has {num_tokens} tokens, {expected.first_token} are here already"
            )
        self._num_tokens = num_tokens
        self._coverage = Coverage(self._layout.num_layers, expected.first_token, num_tokens)
        return expected.or_fewer.digest(num_tokens)

    def _want(self, num_slots: int) -> list[ReceiveEffect]:
        self._num_wanted += num_slots
        if self._num_wanted > MAX_SLOTS:
            raise TransferCorrupt(f"the sender wants {self._num_wanted} slots, no sender has {MAX_SLOTS}")
        return self._request_slots()

    def _request_slots(self) -> list[ReceiveEffect]:
        """As many of those wanted as one transfer may have: the sender's window may be the larger one."""
        num_slots = min(self._num_wanted, self._window - len(self._slots)) - self._num_queued
        if num_slots <= 0:
            return []
        self._num_queued += num_slots
        return [RequestSlots(num_slots)]

    def _on_assigned(self, event: SlotsAssigned) -> list[ReceiveEffect]:
        self._num_queued -= len(event.slots)
        self._num_wanted -= len(event.slots)
        self._slots.update(event.slots)
        return [SendToSender(SlotsGranted(self.expected.transfer_id, event.slots))]

    def _on_given_back(self, event: SlotsGivenBack) -> list[ReceiveEffect]:
        self._require_held(event.slots)
        self._slots.difference_update(event.slots)
        return [FreeSlots(event.slots), *self._request_slots()]

    def _on_chunk(self, chunk: Chunk) -> list[ReceiveEffect]:
        if chunk.sequence_number != self._num_messages:
            raise TransferCorrupt(f"message {chunk.sequence_number} came instead of {self._num_messages}")
        self._require_held((chunk.slot,))
        part = KVRange(chunk.layers, chunk.tokens)
        num_bytes = part.num_bytes(self._layout)
        if chunk.num_bytes != num_bytes or num_bytes > self._slot_bytes:
            raise TransferCorrupt(
                f"{part} is {num_bytes} bytes, announced {chunk.num_bytes}, a slot has {self._slot_bytes}"
            )
        self._coverage.add(part)
        self._slots.remove(chunk.slot)
        self._num_messages += 1
        self._num_bytes += num_bytes
        self._num_scattering += 1
        checksum = chunk.checksum if chunk.checked else None
        scatter = ScatterMessage(chunk.slot, self.expected.block_table, part, num_bytes, checksum)
        return [scatter, *self._request_slots()]

    def _on_finish(self, event: FinishArrived, now_s: float) -> list[ReceiveEffect]:
        finish = event.finish
        if self.phase is not ReceivePhase.RECEIVING:
            raise TransferCorrupt(f"the sender finished in {self.phase}")
        if (finish.num_messages, finish.num_bytes) != (self._num_messages, self._num_bytes):
            raise TransferCorrupt(
                f"the sender counts {finish.num_messages} messages of {finish.num_bytes} bytes in all,"
                f" {self._num_messages} of {self._num_bytes} came"
            )
        if missing := self._coverage.missing():
            raise TransferCorrupt(f"the sender finished too early: {missing}")
        self.phase = ReceivePhase.STORING
        self._output_token_id = finish.output_token_id
        return self._end_if_stored(now_s)

    def _end_if_stored(self, now_s: float) -> list[ReceiveEffect]:
        if self.phase is not ReceivePhase.STORING or self._num_scattering:
            return []
        ack = SendToSender(Ack(self.expected.transfer_id))
        return [ack, *self._end(None, now_s, [FreeSlots(None)])]

    def _on_ticked(self, now_s: float) -> list[ReceiveEffect]:
        stalled_s = now_s - self._last_progress_s
        if not self._slots or stalled_s < self._progress_timeout_s:
            return []
        raise TransferTimeout(
            f"transfer {self.expected.transfer_id} made no progress for {stalled_s:.1f} s with"
            f" {len(self._slots)} slots granted"
        )

    def _require_held(self, slots: tuple[int, ...]) -> None:
        if not self._slots.issuperset(slots):
            raise TransferCorrupt(
                f"slots {slots} are not all granted to transfer {self.expected.transfer_id}"
            )

    def _give_up(self, error: KVRelayError | None, now_s: float) -> list[ReceiveEffect]:
        if self.phase is ReceivePhase.EXPECTING:
            return self._end(error, now_s, [])
        code = error.code if error else TransferFailed.code
        message = error.message if error else "the receiver cancelled the transfer"
        abort = SendToSender(Abort(self.expected.transfer_id, code, message))
        return self._end(error, now_s, [abort, QuarantineSlots()], silent=error is None)

    def _end(
        self,
        error: KVRelayError | None,
        now_s: float,
        effects: list[ReceiveEffect],
        *,
        silent: bool = False,
    ) -> list[ReceiveEffect]:
        silent = silent or (self.phase is ReceivePhase.EXPECTING and error is None)
        self.phase = ReceivePhase.ENDED
        if silent:
            return effects
        seconds = now_s - self._started_s
        report = ReportReceive(
            error, self._output_token_id, self._num_tokens, self._num_bytes, self._num_messages, seconds
        )
        return [*effects, report]
