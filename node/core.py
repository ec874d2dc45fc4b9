"""What both roles' cores share: admission, leases, drain, and how every attempt ends.

Pure: `handle(event, now_s)` returns effects; it never awaits, logs or reads a clock.

An attempt ends in one place, whatever ended it: `_end` notes the terminal report; an open transfer is
cancelled first, so that nothing reads or writes the blocks; then the engine frees the sequence; and only
then, when this node holds nothing of the attempt, the report goes out. Just two ends are shorter, because
the engine has freed the sequence by itself: a decode that finished, and a refused reservation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from kvrelay.core.errors import EngineFailed, InvalidRequest, KVRelayError, NodeUnavailable, Overloaded
from kvrelay.core.ids import TransferId
from kvrelay.core.node_messages import (
    AttemptCommand,
    DrainStarted,
    KVReleased,
    ReleaseKV,
    Report,
    ReserveDecode,
    Role,
    SendKVSnapshot,
    StartPrefill,
)
from kvrelay.engine.interface import SequenceKey
from kvrelay.kv_transfer.interface import PushDone, PushFailed, ReceiveDone, ReceiveFailed
from kvrelay.node.attempt import (
    ENDING,
    Attempt,
    AttemptState,
    Transitions,
    failure,
    refusal,
    sequence_key,
)
from kvrelay.node.effect_buffer import EffectBuffer
from kvrelay.node.events import (
    CancelTransfer,
    CloseRouter,
    DrainRequested,
    DrainTimedOut,
    EngineDied,
    NodeEffect,
    NodeEvent,
    PrefillStarted,
    ReleaseSequence,
    RouterConnected,
    RouterFrameReceived,
    RouterStreamLost,
    SequenceRefused,
    SequenceReleased,
    SequenceReserved,
    StepFinished,
    TellKVSnapshot,
    Ticked,
    TransferCancelled,
)
from kvrelay.node.leases import Leases


@dataclass(frozen=True, slots=True)
class NodeCoreConfig:
    """`max_attempts_in_flight` bounds live attempts, ending ones included; `fingerprint_digest` is that of
    the engine's KV."""

    max_attempts_in_flight: int
    fingerprint_digest: bytes = b""


class NodeCore(ABC):
    """The attempts that one node holds, for all its routers."""

    role: ClassVar[Role]
    transitions: ClassVar[Transitions]

    def __init__(self, config: NodeCoreConfig) -> None:
        self._config = config
        self._attempts: dict[SequenceKey, Attempt] = {}
        self._leases = Leases()
        self._connected: set[int] = set()
        self._is_draining = False
        self._engine_fault: str | None = None
        self._handlers: dict[type[Any], Callable[[Any, float, EffectBuffer], None]] = {
            StepFinished: self._on_step_finished,
            RouterFrameReceived: self._on_router_frame,
            RouterConnected: self._on_router_connected,
            RouterStreamLost: self._on_router_stream_lost,
            SequenceReserved: self._on_sequence_reserved,
            SequenceRefused: self._on_sequence_refused,
            SequenceReleased: self._on_sequence_released,
            PrefillStarted: self._on_prefill_started,
            EngineDied: self._on_engine_died,
            PushDone: self._on_push_done,
            PushFailed: self._on_transfer_failed,
            ReceiveDone: self._on_receive_done,
            ReceiveFailed: self._on_transfer_failed,
            TransferCancelled: self._on_transfer_cancelled,
            DrainRequested: self._on_drain_requested,
            DrainTimedOut: self._on_drain_timed_out,
            Ticked: self._on_ticked,
        }

    def handle(self, event: NodeEvent, now_s: float) -> list[NodeEffect]:
        """What is to be done now; see the module's text."""
        out = EffectBuffer()
        self._handlers[type(event)](event, now_s, out)
        return out.take()

    @property
    def num_attempts(self) -> int:
        """Attempts that this node holds anything for."""
        return len(self._attempts)

    @property
    def num_open_transfers(self) -> int:
        """Transfers that have been opened or expected, and have not ended."""
        return sum(attempt.has_transfer for attempt in self._attempts.values())

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def states(self) -> dict[TransferId, AttemptState]:
        """The state of each live attempt."""
        return {attempt.transfer_id: attempt.state for attempt in self._attempts.values()}

    # ---- what the roles add ------------------------------------------------------------------------

    @abstractmethod
    def _start(self, attempt: Attempt, command: StartPrefill | ReserveDecode, out: EffectBuffer) -> None:
        """Take up a new attempt, which is in its role's first state."""

    @abstractmethod
    def _first_state(self) -> AttemptState: ...

    @abstractmethod
    def _on_step_finished(self, event: StepFinished, now_s: float, out: EffectBuffer) -> None: ...

    def _on_sequence_reserved(self, event: SequenceReserved, now_s: float, out: EffectBuffer) -> None:
        raise AssertionError(f"{event} on a {self.role} node")

    def _on_prefill_started(self, event: PrefillStarted, now_s: float, out: EffectBuffer) -> None:
        raise AssertionError(f"{event} on a {self.role} node")

    def _on_push_done(self, event: PushDone, now_s: float, out: EffectBuffer) -> None:
        raise AssertionError(f"{event} on a {self.role} node")

    def _on_receive_done(self, event: ReceiveDone, now_s: float, out: EffectBuffer) -> None:
        raise AssertionError(f"{event} on a {self.role} node")

    # ---- how attempts end --------------------------------------------------------------------------

    def _move(self, attempt: Attempt, state: AttemptState) -> None:
        assert state in self.transitions[attempt.state], f"{attempt.key}: {attempt.state} -> {state}"
        attempt.state = state

    def _tell(self, attempt: Attempt, report: Report, out: EffectBuffer) -> None:
        if not attempt.is_orphan:
            out.report(attempt.router_epoch, report)

    def _end(self, attempt: Attempt, terminal: Report, out: EffectBuffer) -> None:
        """Give back what the attempt holds; then `terminal` is reported. If it is ending already, the router
        hears the answer it asked for last."""
        attempt.terminal = terminal
        if attempt.state in ENDING:
            return
        if attempt.has_transfer:
            self._move(attempt, AttemptState.CANCELLING)
            out.add(CancelTransfer(attempt.transfer_id))
        else:
            self._move(attempt, AttemptState.RELEASING)
            out.add(ReleaseSequence(attempt.key))

    def _end_with_error(self, attempt: Attempt, error: KVRelayError, out: EffectBuffer) -> None:
        self._end(attempt, failure(attempt.number, error), out)

    def _drop(self, attempt: Attempt, terminal: Report, out: EffectBuffer) -> None:
        """The attempt holds nothing any more: report that, and forget it."""
        del self._attempts[attempt.key]
        self._tell(attempt, terminal, out)

    def _on_transfer_cancelled(self, event: TransferCancelled, now_s: float, out: EffectBuffer) -> None:
        attempt = self._attempts.get(sequence_key(event.transfer_id))
        if attempt is not None and attempt.state is AttemptState.CANCELLING:
            attempt.has_transfer = False
            self._move(attempt, AttemptState.RELEASING)
            out.add(ReleaseSequence(attempt.key))

    def _on_sequence_released(self, event: SequenceReleased, now_s: float, out: EffectBuffer) -> None:
        attempt = self._attempts.get(event.key)
        if attempt is not None:
            assert attempt.state is AttemptState.RELEASING, f"{attempt.key}: released while {attempt.state}"
            assert attempt.terminal is not None
            self._drop(attempt, attempt.terminal, out)

    def _on_sequence_refused(self, event: SequenceRefused, now_s: float, out: EffectBuffer) -> None:
        attempt = self._attempts.get(event.key)
        if attempt is None or attempt.state in ENDING:
            return
        refused = refusal(attempt.number, event.error)
        if attempt.has_transfer:
            self._end(attempt, refused, out)
        else:
            self._drop(attempt, refused, out)

    def _on_transfer_failed(self, event: PushFailed | ReceiveFailed, now_s: float, out: EffectBuffer) -> None:
        attempt = self._attempts.get(sequence_key(event.transfer_id))
        if attempt is None or attempt.state in ENDING:
            return  # a cancelled transfer's failure, on its way when the cancel was asked for
        attempt.has_transfer = False
        self._end_with_error(attempt, event.error, out)

    def _on_engine_died(self, event: EngineDied, now_s: float, out: EffectBuffer) -> None:
        self._engine_fault = event.message
        for attempt in list(self._attempts.values()):
            if attempt.has_transfer:
                out.add(CancelTransfer(attempt.transfer_id))
            self._drop(attempt, failure(attempt.number, EngineFailed(event.message)), out)

    # ---- routers -----------------------------------------------------------------------------------

    def _on_router_frame(self, event: RouterFrameReceived, now_s: float, out: EffectBuffer) -> None:
        if not self._leases.renew(event.router_epoch, now_s):
            return  # its lease ran out; its stream is being closed
        for command in event.commands:
            if isinstance(command, SendKVSnapshot):
                out.add(TellKVSnapshot(event.router_epoch))
            else:
                self._on_command(event.router_epoch, command, now_s, out)

    def _on_command(
        self, router_epoch: int, command: AttemptCommand, now_s: float, out: EffectBuffer
    ) -> None:
        transfer_id = TransferId(router_epoch, command.attempt)
        attempt = self._attempts.get(sequence_key(transfer_id))
        if isinstance(command, ReleaseKV):
            if attempt is None:
                out.report(router_epoch, KVReleased(command.attempt))
            else:
                attempt.is_orphan = False  # somebody does want to hear of it
                self._end(attempt, KVReleased(command.attempt), out)
        elif attempt is not None:
            out.add(CloseRouter(router_epoch, f"attempt {command.attempt} was started twice"))
        elif (error := self._why_refused(command)) is not None:
            out.report(router_epoch, refusal(command.attempt, error))
        else:
            key = sequence_key(transfer_id)
            attempt = Attempt(transfer_id, key, command.request, self._first_state(), now_s)
            self._attempts[key] = attempt
            self._start(attempt, command, out)

    def _why_refused(self, command: StartPrefill | ReserveDecode) -> KVRelayError | None:
        if isinstance(command, StartPrefill) != (self.role is Role.PREFILL):
            return InvalidRequest(f"this is a {self.role} node, it cannot {type(command).__name__}")
        if self._engine_fault is not None:
            return EngineFailed(self._engine_fault)
        if self._is_draining:
            return NodeUnavailable("the node is draining")
        if len(self._attempts) >= self._config.max_attempts_in_flight:
            limit = self._config.max_attempts_in_flight
            return Overloaded(f"{limit} attempts are in flight (max_attempts_in_flight)")
        return None

    def _on_router_connected(self, event: RouterConnected, now_s: float, out: EffectBuffer) -> None:
        router_epoch = event.welcome.router_epoch
        self._end_orphans(router_epoch, out)
        self._leases.grant(router_epoch, event.welcome.lease_s, now_s)
        self._connected.add(router_epoch)
        if self._is_draining:
            out.report(router_epoch, DrainStarted())

    def _on_router_stream_lost(self, event: RouterStreamLost, now_s: float, out: EffectBuffer) -> None:
        self._connected.discard(event.router_epoch)
        for attempt in self._attempts.values():
            if attempt.router_epoch == event.router_epoch:
                attempt.is_orphan = True

    def _on_ticked(self, event: Ticked, now_s: float, out: EffectBuffer) -> None:
        for router_epoch in self._leases.take_expired(now_s):
            self._end_orphans(router_epoch, out)
            if router_epoch in self._connected:
                out.add(
                    CloseRouter(router_epoch, "nothing was heard from the router for longer than its lease")
                )

    def _end_orphans(self, router_epoch: int, out: EffectBuffer) -> None:
        for attempt in list(self._attempts.values()):
            if attempt.router_epoch == router_epoch:
                attempt.is_orphan = True
                self._end(attempt, KVReleased(attempt.number), out)

    # ---- drain -------------------------------------------------------------------------------------

    def _on_drain_requested(self, event: DrainRequested, now_s: float, out: EffectBuffer) -> None:
        if not self._is_draining:
            self._is_draining = True
            for router_epoch in sorted(self._connected):
                out.report(router_epoch, DrainStarted())

    def _on_drain_timed_out(self, event: DrainTimedOut, now_s: float, out: EffectBuffer) -> None:
        error = NodeUnavailable("the node left before the attempt was done")
        for attempt in list(self._attempts.values()):
            if attempt.state not in ENDING:
                self._end_with_error(attempt, error, out)
