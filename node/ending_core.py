"""How every attempt ends, whatever it is and whatever ends it.

An attempt ends in one place: `_end` notes the terminal report; an open transfer is cancelled first, so that
nothing reads or writes the blocks; then the engine frees the sequence; and only then, when this node holds
nothing of the attempt, the report goes out. Just two ends are shorter, because the engine has freed the
sequence by itself: a decode that finished, and a refused reservation.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from kvrelay.core.errors import EngineFailed, KVRelayError
from kvrelay.core.ids import TransferId
from kvrelay.core.node_messages import KVReleased, Report
from kvrelay.engine.interface import SequenceKey
from kvrelay.kv_transfer.interface import PushDone, PushFailed, ReceiveFailed
from kvrelay.node.attempt import (
    ENDING,
    PUSHED,
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
    EngineDied,
    ReleaseSequence,
    SequenceRefused,
    SequenceReleased,
    TransferCancelled,
)


@dataclass(frozen=True, slots=True)
class NodeCoreConfig:
    """`max_attempts_in_flight` bounds live attempts, ending ones included; `fingerprint_digest` is that of
    the engine's KV. A prefix that has not come within `pull_timeout_s` is computed."""

    max_attempts_in_flight: int
    fingerprint_digest: bytes = b""
    pull_timeout_s: float = 5.0


class EndingCore(ABC):
    """The attempts that one node holds, for all its routers, and how they end."""

    transitions: ClassVar[Transitions]

    def __init__(self, config: NodeCoreConfig) -> None:
        self._config = config
        self._attempts: dict[SequenceKey, Attempt] = {}
        self._engine_fault: str | None = None

    @property
    def num_attempts(self) -> int:
        """Attempts that this node holds anything for."""
        return len(self._attempts)

    @property
    def num_open_transfers(self) -> int:
        """Transfers that have been opened or expected, and have not ended."""
        return sum(attempt.has_transfer for attempt in self._attempts.values())

    def states(self) -> dict[TransferId, AttemptState]:
        """The state of each live attempt."""
        return {attempt.transfer_id: attempt.state for attempt in self._attempts.values()}

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

    def _on_push_done(self, event: PushDone, now_s: float, out: EffectBuffer) -> None:
        attempt = self._attempts.get(sequence_key(event.transfer_id))
        if attempt is None or attempt.state in ENDING:
            return  # acknowledged while the cancel was on its way
        assert attempt.state in PUSHED, f"{attempt.key}: pushed while {attempt.state}"
        attempt.has_transfer = False
        self._end(attempt, KVReleased(attempt.number), out)

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
