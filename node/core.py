"""What all that nodes do for routers has in common: admission, leases, drain.

Pure: `handle(event, now_s)` returns effects; it never awaits, logs or reads a clock. How attempts end stands
in `kvrelay.node.ending_core`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from kvrelay.core.errors import EngineFailed, InvalidRequest, KVRelayError, NodeUnavailable, Overloaded
from kvrelay.core.ids import TransferId
from kvrelay.core.node_messages import (
    AttemptCommand,
    DrainStarted,
    HoldCommand,
    KVReleased,
    ReleaseKV,
    ReserveDecode,
    Role,
    SendKVSnapshot,
    StartDrain,
    StartPrefill,
    StopPull,
)
from kvrelay.engine.interface import SequenceKey
from kvrelay.kv_transfer.interface import PushDone, PushFailed, ReceiveDone, ReceiveFailed
from kvrelay.node.attempt import (
    ENDING,
    Attempt,
    AttemptState,
    refusal,
    sequence_key,
)
from kvrelay.node.effect_buffer import EffectBuffer
from kvrelay.node.ending_core import EndingCore
from kvrelay.node.ending_core import NodeCoreConfig as NodeCoreConfig
from kvrelay.node.events import (
    BeginDrain,
    CloseRouter,
    DrainRequested,
    DrainTimedOut,
    EngineDied,
    NodeEffect,
    NodeEvent,
    PrefillStarted,
    PrefixHeld,
    PrefixKept,
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


class NodeCore(EndingCore):
    """The attempts that one node holds, for all its routers."""

    role: ClassVar[Role]

    def __init__(self, config: NodeCoreConfig) -> None:
        super().__init__(config)
        self._leases = Leases()
        self._connected: set[int] = set()
        self._is_draining = False
        self._handlers: dict[type[Any], Callable[[Any, float, EffectBuffer], None]] = {
            StepFinished: self._on_step_finished,
            RouterFrameReceived: self._on_router_frame,
            RouterConnected: self._on_router_connected,
            RouterStreamLost: self._on_router_stream_lost,
            SequenceReserved: self._on_sequence_reserved,
            PrefixHeld: self._on_prefix_held,
            PrefixKept: self._on_prefix_kept,
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
    def is_draining(self) -> bool:
        return self._is_draining

    # ---- what the roles add ------------------------------------------------------------------------

    @abstractmethod
    def _start(self, attempt: Attempt, out: EffectBuffer) -> None:
        """Take up a new attempt, which is in its command's first state."""

    @abstractmethod
    def _first_state(self, command: HoldCommand) -> AttemptState: ...

    def _is_known(self, key: SequenceKey) -> bool:
        """Whether the transfer of that name is under way, or was asked for."""
        return key in self._attempts

    def _stop_pull(self, transfer_id: TransferId, now_s: float, out: EffectBuffer) -> None:
        """What that attempt pulls will not come; nothing, if it pulls nothing."""
        return

    @abstractmethod
    def _on_step_finished(self, event: StepFinished, now_s: float, out: EffectBuffer) -> None: ...

    def _on_sequence_reserved(self, event: SequenceReserved, now_s: float, out: EffectBuffer) -> None:
        raise AssertionError(f"{event} on a {self.role} node")

    def _on_prefix_held(self, event: PrefixHeld, now_s: float, out: EffectBuffer) -> None:
        raise AssertionError(f"{event} on a {self.role} node")

    def _on_prefix_kept(self, event: PrefixKept, now_s: float, out: EffectBuffer) -> None:
        raise AssertionError(f"{event} on a {self.role} node")

    def _on_prefill_started(self, event: PrefillStarted, now_s: float, out: EffectBuffer) -> None:
        raise AssertionError(f"{event} on a {self.role} node")

    def _on_receive_done(self, event: ReceiveDone, now_s: float, out: EffectBuffer) -> None:
        raise AssertionError(f"{event} on a {self.role} node")

    # ---- routers -----------------------------------------------------------------------------------

    def _on_router_frame(self, event: RouterFrameReceived, now_s: float, out: EffectBuffer) -> None:
        if not self._leases.renew(event.router_epoch, now_s):
            return  # its lease ran out; its stream is being closed
        for command in event.commands:
            if isinstance(command, SendKVSnapshot):
                out.add(TellKVSnapshot(event.router_epoch))
            elif isinstance(command, StartDrain):
                out.add(BeginDrain())
            else:
                self._on_command(event.router_epoch, command, now_s, out)

    def _on_command(
        self, router_epoch: int, command: AttemptCommand, now_s: float, out: EffectBuffer
    ) -> None:
        transfer_id = TransferId(router_epoch, command.attempt)
        match command:
            case ReleaseKV():
                self._on_release_asked(transfer_id, out)
            case StopPull():
                self._stop_pull(transfer_id, now_s, out)
            case _:
                self._on_hold_asked(transfer_id, command, now_s, out)

    def _on_release_asked(self, transfer_id: TransferId, out: EffectBuffer) -> None:
        attempt = self._attempts.get(sequence_key(transfer_id))
        if attempt is None:
            out.report(transfer_id.router_epoch, KVReleased(transfer_id.attempt))
        else:
            attempt.is_orphan = False  # somebody does want to hear of it
            self._end(attempt, KVReleased(transfer_id.attempt), out)

    def _on_hold_asked(
        self, transfer_id: TransferId, command: HoldCommand, now_s: float, out: EffectBuffer
    ) -> None:
        key = sequence_key(transfer_id)
        if self._is_known(key):
            out.add(CloseRouter(transfer_id.router_epoch, f"attempt {command.attempt} was started twice"))
        elif (error := self._why_refused(command)) is not None:
            out.report(transfer_id.router_epoch, refusal(command.attempt, error))
        else:
            attempt = Attempt(transfer_id, key, command, self._first_state(command), now_s, submitted_s=now_s)
            self._attempts[key] = attempt
            self._start(attempt, out)

    def _why_refused(self, command: HoldCommand) -> KVRelayError | None:
        role_of = {StartPrefill: Role.PREFILL, ReserveDecode: Role.DECODE}
        if role_of.get(type(command), self.role) is not self.role:
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
