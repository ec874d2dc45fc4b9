"""The life of an attempt on a decode node.

    state         what happened                     what follows
    ------------  --------------------------------  ---------------------------------------------------
    (new)         ReserveDecode                     reserve in the engine              -> RESERVING
    RESERVING     the engine has reserved           expect the transfer, Reserved      -> RECEIVING
                  the engine refuses                AttemptRefused                     -> (gone)
    RECEIVING     ReceiveDone                       start decoding, HandoffVerified    -> DECODING
                  ReceiveFailed                     end with AttemptFailed             -> RELEASING
    DECODING      a token                           the token
                  a token, and it is the last       the token + AttemptFinished        -> (gone)
                  the engine gives it up            AttemptFailed                      -> (gone)
    any of these  ReleaseKV, lease ran out          end with KVReleased
                  drain timed out                   end with AttemptFailed
                      if a transfer is open         cancel it                          -> CANCELLING
                      else                          release the sequence               -> RELEASING
    CANCELLING    TransferCancelled                 release the sequence               -> RELEASING
    RELEASING     SequenceReleased                  the terminal report                -> (gone)

Blocks are freed only after the transfer's cancel is done: a late write would land in another sequence.
The engine takes commands in order, so a release behind a reservation frees what that has taken. How it sends
a prefix, generated tokens included, stands in `kvrelay.node.sending_core`.
"""

from __future__ import annotations

from typing import ClassVar, Final

from kvrelay.core.node_messages import (
    AttemptFinished,
    HandoffVerified,
    HoldCommand,
    Reserved,
    ReserveDecode,
    Role,
)
from kvrelay.engine.interface import SequenceFailure
from kvrelay.kv_transfer.interface import ExpectedTransfer, ReceiveDone
from kvrelay.node.attempt import (
    ENDING,
    Attempt,
    AttemptState,
    Transitions,
    failure,
    prompt_digest,
    sequence_key,
)
from kvrelay.node.effect_buffer import EffectBuffer
from kvrelay.node.events import (
    ExpectTransfer,
    ReserveSequence,
    SequenceReserved,
    StartDecode,
    StepFinished,
    TokenColumns,
)
from kvrelay.node.sending_core import SENDING_TRANSITIONS, SendingNodeCore

TRANSITIONS: Final[Transitions] = {
    **SENDING_TRANSITIONS,
    AttemptState.RESERVING: frozenset({AttemptState.RECEIVING, AttemptState.RELEASING}),
    AttemptState.RECEIVING: frozenset(
        {AttemptState.DECODING, AttemptState.CANCELLING, AttemptState.RELEASING}
    ),
    AttemptState.DECODING: frozenset({AttemptState.RELEASING}),
    AttemptState.CANCELLING: frozenset({AttemptState.RELEASING}),
    AttemptState.RELEASING: frozenset(),
}


class DecodeNodeCore(SendingNodeCore):
    """Decides for a decode node; see the module's text."""

    role: ClassVar[Role] = Role.DECODE
    transitions: ClassVar[Transitions] = TRANSITIONS

    def _first_state_of_role(self, command: HoldCommand) -> AttemptState:
        return AttemptState.RESERVING

    def _start_of_role(self, attempt: Attempt, out: EffectBuffer) -> None:
        assert isinstance(attempt.command, ReserveDecode)
        out.add(ReserveSequence(attempt.key, attempt.command.request))

    def _on_sequence_reserved(self, event: SequenceReserved, now_s: float, out: EffectBuffer) -> None:
        reservation = event.reservation
        attempt = self._attempts.get(reservation.key)
        if attempt is None or attempt.state is not AttemptState.RESERVING:
            return  # its release is behind it in the engine's queue
        assert isinstance(attempt.command, ReserveDecode)
        request = attempt.command.request
        self._move(attempt, AttemptState.RECEIVING)
        attempt.has_transfer = True
        expected = ExpectedTransfer(
            attempt.transfer_id,
            reservation.block_table,
            len(request.token_ids),
            reservation.num_cached_tokens,
            prompt_digest(request, self._config.fingerprint_digest),
        )
        out.add(ExpectTransfer(expected))
        self._tell(attempt, Reserved(attempt.number, reservation.num_cached_tokens), out)

    def _on_receive_done(self, event: ReceiveDone, now_s: float, out: EffectBuffer) -> None:
        attempt = self._attempts.get(sequence_key(event.transfer_id))
        if attempt is None or attempt.state is not AttemptState.RECEIVING:
            return  # verified while the cancel was on its way
        self._move(attempt, AttemptState.DECODING)
        attempt.has_transfer = False
        out.add(StartDecode(attempt.key, event.output_token_id))
        stats = event.stats
        verified = HandoffVerified(
            attempt.number, stats.num_bytes, stats.num_messages, stats.seconds, stats.transport
        )
        self._tell(attempt, verified, out)

    def _on_step_finished(self, event: StepFinished, now_s: float, out: EffectBuffer) -> None:
        attempts, decoding = self._attempts, AttemptState.DECODING
        router_epoch, columns = -1, TokenColumns()
        for output in event.step.outputs:
            attempt = attempts.get(output.key)
            if attempt is None or attempt.state is not decoding:
                continue
            if not attempt.is_orphan:
                transfer_id = attempt.transfer_id
                if transfer_id.router_epoch != router_epoch:
                    router_epoch = transfer_id.router_epoch
                    columns = out.tokens(router_epoch)
                columns.append(transfer_id.attempt, output.index, output.token_id, output.logprobs)
            if output.finish_reason is not None:
                self._drop(attempt, AttemptFinished(attempt.number, output.finish_reason), out)
        for failed in event.step.failures:
            self._on_failure(failed, out)

    def _on_failure(self, failed: SequenceFailure, out: EffectBuffer) -> None:
        attempt = self._attempts.get(failed.key)
        if attempt is None or attempt.state in ENDING:
            return
        if attempt.has_transfer:
            self._end_with_error(attempt, failed.error, out)
        else:
            self._drop(attempt, failure(attempt.number, failed.error), out)
