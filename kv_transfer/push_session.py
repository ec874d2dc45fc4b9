"""The sender's side of one transfer, as a state machine: events in, effects out, no I/O and no clock.

::

    CONNECTING --LinkOpened--> OFFERED --OfferGranted--> PUSHING --(all written)--> FINISHING --Acked--> ENDED
         any of them --PushCancelled | PeerAborted | PushTimedOut...--> DRAINING --(no write left)--> ENDED

In PUSHING, ready ranges wait until the receiver has granted a slot, and only then become a message: what
gathers meanwhile is joined into larger ones. Local staging is taken after the remote slot and given back
when the write is done, so nobody waits for the one while holding the other the wrong way round.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from kvrelay.core.errors import (
    KVLayoutMismatch,
    KVRelayError,
    TransferCancelled,
    TransferCorrupt,
    TransferFailed,
    TransferTimeout,
)
from kvrelay.core.ids import BlockId
from kvrelay.core.kv import KVLayout
from kvrelay.kv_transfer.interface import PushSpec
from kvrelay.kv_transfer.kv_range import Coverage, KVRange, ReadyQueue
from kvrelay.kv_transfer.messages import Abort, Chunk, Finish, Offer, Released, SlotsReturned, Want
from kvrelay.kv_transfer.push_events import (
    FinishRequested,
    KVReported,
    LinkOpened,
    OfferGranted,
    PushAborted,
    PushAcked,
    PushEffect,
    PushEvent,
    PushGivenUp,
    PushLinkLost,
    PushTicked,
    RemoteSlotsGranted,
    ReportPush,
    SendToReceiver,
    WriteFinished,
    WriteMessage,
)


class PushPhase(StrEnum):
    """See the module's text."""

    CONNECTING = "connecting"
    OFFERED = "offered"
    PUSHING = "pushing"
    FINISHING = "finishing"
    DRAINING = "draining"
    ENDED = "ended"


@dataclass(slots=True)
class _Message:
    slot: int
    part: KVRange
    num_bytes: int
    finished: WriteFinished | None = None


class PushSession:
    """See the module's text. After `ENDED` nothing has an effect."""

    def __init__(
        self,
        spec: PushSpec,
        layout: KVLayout,
        fingerprint_digest: bytes,
        *,
        slots_per_transfer: int,
        progress_timeout_s: float,
        now_s: float,
    ) -> None:
        self.spec = spec
        self.phase = PushPhase.CONNECTING
        self._layout = layout
        self._fingerprint_digest = fingerprint_digest
        self._window = slots_per_transfer
        self._progress_timeout_s = progress_timeout_s
        self._last_progress_s = now_s
        self._started_s = now_s
        self._ready = ReadyQueue(layout)
        self._coverage = Coverage(layout.num_layers, 0, spec.num_tokens)
        self._block_table: tuple[BlockId, ...] = ()
        self._max_message_bytes = 0
        self._num_wanted = 0
        self._spare_slots: deque[int] = deque()
        self._in_flight: dict[int, _Message] = {}
        self._num_messages = 0
        self._num_bytes = 0
        self._output_token_id: int | None = None
        self._abort_when_open: SendToReceiver | None = None

    @property
    def is_live(self) -> bool:
        """Whether blocks may still be gathered for it."""
        return self.phase not in (PushPhase.DRAINING, PushPhase.ENDED)

    @property
    def waits_for_peer(self) -> bool:
        """Whether the next step is the receiver's, so that a long silence means trouble."""
        if self.phase is PushPhase.PUSHING:
            return self._num_wanted > 0 or bool(self._in_flight)
        return self.phase in (PushPhase.OFFERED, PushPhase.FINISHING, PushPhase.DRAINING)

    def handle(self, event: PushEvent, now_s: float) -> list[PushEffect]:
        if self.phase is PushPhase.ENDED:
            return []
        if not isinstance(event, PushTicked | KVReported | PushGivenUp):
            self._last_progress_s = now_s
        try:
            return self._dispatch(event, now_s)
        except KVRelayError as error:
            return self._give_up(error, now_s)

    def _dispatch(self, event: PushEvent, now_s: float) -> list[PushEffect]:
        match event:
            case LinkOpened():
                return self._on_link_opened(event)
            case OfferGranted():
                return self._on_granted(event, now_s)
            case KVReported():
                return self._on_reported(event, now_s)
            case RemoteSlotsGranted():
                return self._on_slots(event)
            case WriteFinished():
                return self._on_written(event)
            case FinishRequested():
                self._output_token_id = event.output_token_id
                return self._advance()
            case PushAcked():
                return self._on_acked(now_s)
            case PushAborted():
                return self._on_aborted(event, now_s)
            case PushGivenUp():
                return self._give_up(event.error, now_s)
            case PushLinkLost():
                return self._on_link_lost(event, now_s)
            case PushTicked():
                return self._on_ticked(now_s)
            case _:
                assert_never(event)

    def _on_link_opened(self, event: LinkOpened) -> list[PushEffect]:
        if self._abort_when_open is not None:
            return [self._offer(0), self._abort_when_open, *self._end_if_drained()]
        if self.phase is not PushPhase.CONNECTING:
            return []
        unit_bytes = self._layout.token_bytes_per_layer
        if event.max_message_bytes < unit_bytes:
            raise KVLayoutMismatch(
                f"a staging slot of {event.max_message_bytes} bytes can't hold the {unit_bytes} bytes of one"
                " token in one layer"
            )
        self._max_message_bytes = event.max_message_bytes
        self.phase = PushPhase.OFFERED
        self._num_wanted = self._num_more_slots()
        return [self._offer(self._num_wanted)]

    def _offer(self, num_slots: int) -> SendToReceiver:
        return SendToReceiver(
            Offer(
                transfer_id=self.spec.transfer_id,
                num_tokens=self.spec.num_tokens,
                prompt_digest=self.spec.prompt_digest,
                fingerprint_digest=self._fingerprint_digest,
                num_slots=num_slots,
            )
        )

    def _on_granted(self, event: OfferGranted, now_s: float) -> list[PushEffect]:
        if self.phase is PushPhase.DRAINING:
            return []
        if self.phase is not PushPhase.OFFERED or event.first_token > self.spec.num_tokens:
            raise TransferCorrupt(f"the receiver granted tokens from {event.first_token} in {self.phase}")
        self.phase = PushPhase.PUSHING
        self._ready.drop_below(event.first_token)
        self._started_s = now_s
        return self._advance()

    def _on_reported(self, event: KVReported, now_s: float) -> list[PushEffect]:
        if not self.is_live:
            return []
        if len(event.block_table) * self._layout.block_size < event.part.tokens.stop:
            raise TransferFailed(f"a block table of {len(event.block_table)} does not reach {event.part}")
        self._coverage.add(event.part)
        self._block_table = event.block_table
        self._ready.add(event.part)
        if self.phase is PushPhase.PUSHING and not self.waits_for_peer:
            self._last_progress_s = now_s
        return self._advance()

    def _on_slots(self, event: RemoteSlotsGranted) -> list[PushEffect]:
        if self.phase is not PushPhase.PUSHING:
            return []
        held = {*self._spare_slots, *(message.slot for message in self._in_flight.values())}
        if len(event.slots) > self._num_wanted or held.intersection(event.slots):
            raise TransferCorrupt(f"the receiver granted slots {event.slots} that were not asked for")
        self._num_wanted -= len(event.slots)
        self._spare_slots.extend(event.slots)
        return self._advance()

    def _on_written(self, event: WriteFinished) -> list[PushEffect]:
        self._in_flight[event.sequence_number].finished = event
        if self.phase is PushPhase.DRAINING:
            return self._end_if_drained()
        return [*self._announce_written(), *self._advance()]

    def _on_acked(self, now_s: float) -> list[PushEffect]:
        if self.phase is PushPhase.DRAINING:
            return []
        if self.phase is not PushPhase.FINISHING:
            raise TransferCorrupt(f"the receiver acknowledged a transfer in {self.phase}")
        self.phase = PushPhase.ENDED
        return [self._report(None, now_s)]

    def _on_aborted(self, event: PushAborted, now_s: float) -> list[PushEffect]:
        if self.phase is PushPhase.DRAINING:
            return []
        self.phase = PushPhase.DRAINING
        return [self._report(event.error, now_s), *self._end_if_drained()]

    def _on_link_lost(self, event: PushLinkLost, now_s: float) -> list[PushEffect]:
        effects: list[PushEffect] = [self._report(event.error, now_s)] if self.is_live else []
        self.phase = PushPhase.ENDED
        return effects

    def _on_ticked(self, now_s: float) -> list[PushEffect]:
        stalled_s = now_s - self._last_progress_s
        if (
            self.phase is PushPhase.DRAINING
            or not self.waits_for_peer
            or stalled_s < self._progress_timeout_s
        ):
            return []
        raise TransferTimeout(
            f"transfer {self.spec.transfer_id} to {self.spec.peer_address} made no progress for"
            f" {stalled_s:.1f} s ({self.phase})"
        )

    def has_stalled_writes(self, now_s: float) -> bool:
        """Whether writes of an ended transfer hang, so that only closing the link gets rid of them."""
        return self.phase is PushPhase.DRAINING and now_s - self._last_progress_s >= self._progress_timeout_s

    def _give_up(self, error: KVRelayError | None, now_s: float) -> list[PushEffect]:
        if not self.is_live:
            return []
        report = [] if error is None else [self._report(error, now_s)]
        is_offered = self.phase is not PushPhase.CONNECTING
        self.phase = PushPhase.DRAINING
        self._last_progress_s = now_s
        code = error.code if error else TransferCancelled.code
        message = error.message if error else "the sender cancelled the transfer"
        abort = SendToReceiver(Abort(self.spec.transfer_id, code, message))
        if not is_offered:
            # The receiver may expect the transfer: it is told as soon as the link opens.
            self._abort_when_open = abort
            return [*report]
        return [abort, *report, *self._end_if_drained()]

    def _end_if_drained(self) -> list[PushEffect]:
        if any(message.finished is None for message in self._in_flight.values()):
            return []
        self.phase = PushPhase.ENDED
        return [SendToReceiver(Released(self.spec.transfer_id))]

    def _announce_written(self) -> list[PushEffect]:
        """`Chunk` frames go out in order of sequence, whatever order the writes end in."""
        effects: list[PushEffect] = []
        for sequence_number, message in list(self._in_flight.items()):
            if message.finished is None:
                break
            del self._in_flight[sequence_number]
            effects.append(SendToReceiver(self._chunk(sequence_number, message, message.finished.checksum)))
        return effects

    def _chunk(self, sequence_number: int, message: _Message, checksum: int | None) -> Chunk:
        return Chunk(
            transfer_id=self.spec.transfer_id,
            sequence_number=sequence_number,
            slot=message.slot,
            layers=message.part.layers,
            tokens=message.part.tokens,
            num_bytes=message.num_bytes,
            checked=checksum is not None,
            checksum=checksum or 0,
        )

    def _advance(self) -> list[PushEffect]:
        if self.phase is not PushPhase.PUSHING:
            return []
        effects = self._fill_slots()
        if self._ready:
            effects += self._want_slots()
        else:
            effects += self._return_slots()
            effects += self._finish_if_complete()
        return effects

    def _fill_slots(self) -> list[PushEffect]:
        effects: list[PushEffect] = []
        while self._spare_slots and (part := self._ready.take(self._max_message_bytes)):
            message = _Message(self._spare_slots.popleft(), part, part.num_bytes(self._layout))
            self._in_flight[self._num_messages] = message
            effects.append(
                WriteMessage(self._num_messages, message.slot, self._block_table, part, message.num_bytes)
            )
            self._num_messages += 1
            self._num_bytes += message.num_bytes
        return effects

    def _want_slots(self) -> list[PushEffect]:
        more = self._num_more_slots()
        self._num_wanted += more
        return [SendToReceiver(Want(self.spec.transfer_id, more))] if more else []

    def _num_more_slots(self) -> int:
        """How many to ask for beside those asked for already."""
        room = self._window - self._num_wanted - len(self._in_flight)
        wanted = self._ready.num_messages(self._max_message_bytes, self._num_wanted + max(room, 0))
        return max(0, min(wanted - self._num_wanted, room))

    def _return_slots(self) -> list[PushEffect]:
        if not self._spare_slots:
            return []
        slots = tuple(self._spare_slots)
        self._spare_slots.clear()
        return [SendToReceiver(SlotsReturned(self.spec.transfer_id, slots))]

    def _finish_if_complete(self) -> list[PushEffect]:
        if self._output_token_id is None or self._in_flight:
            return []
        if missing := self._coverage.missing():
            raise TransferFailed(f"the prefill finished before all of its KV was ready: {missing}")
        self.phase = PushPhase.FINISHING
        finish = Finish(self.spec.transfer_id, self._num_messages, self._num_bytes, self._output_token_id)
        return [SendToReceiver(finish)]

    def _report(self, error: KVRelayError | None, now_s: float) -> ReportPush:
        return ReportPush(error, self._num_bytes, self._num_messages, now_s - self._started_s)
