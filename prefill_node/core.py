"""The life of an attempt on a prefill node.

    state         what happened                     what follows
    ------------  --------------------------------  ---------------------------------------------------
    (new)         StartPrefill                      open the push, submit              -> PREFILLING
    PREFILLING    first token                       token + PrefillFinished, finish    -> HANDING_OFF
                  first token, and it is the last   token + PrefillFinished;
                                                      end with AttemptFinished         -> CANCELLING
                  the engine refuses                end with AttemptRefused            -> CANCELLING
                  the engine gives it up            end with AttemptFailed             -> CANCELLING
    HANDING_OFF   PushDone                          end with KVReleased                -> RELEASING
    both          PushFailed                        end with AttemptFailed             -> RELEASING
                  ReleaseKV, lease ran out          end with KVReleased                -> CANCELLING
                  drain timed out                   end with AttemptFailed             -> CANCELLING
    CANCELLING    TransferCancelled                 release the sequence               -> RELEASING
    RELEASING     SequenceReleased                  the terminal report                -> (gone)

The push is opened before the sequence is submitted, because KV that is ready before its transfer is open
would be lost. Where the first token is the last, it goes out at once and the terminal report follows when
everything is freed: the receiver, whose transfer is cancelled, reports a failure meanwhile, and the
router must know the token by then.
"""

from __future__ import annotations

from typing import ClassVar, Final

from kvrelay.core.node_messages import (
    AttemptFinished,
    KVReleased,
    PrefillFinished,
    ReserveDecode,
    Role,
    StartPrefill,
)
from kvrelay.engine.interface import SequenceOutput
from kvrelay.kv_transfer.interface import PushDone, PushSpec
from kvrelay.node.attempt import ENDING, Attempt, AttemptState, Transitions, prompt_digest, sequence_key
from kvrelay.node.core import NodeCore
from kvrelay.node.effect_buffer import EffectBuffer
from kvrelay.node.events import FinishPush, OpenPush, PrefillStarted, StepFinished, SubmitPrefill

TRANSITIONS: Final[Transitions] = {
    AttemptState.PREFILLING: frozenset(
        {AttemptState.HANDING_OFF, AttemptState.CANCELLING, AttemptState.RELEASING}
    ),
    AttemptState.HANDING_OFF: frozenset({AttemptState.CANCELLING, AttemptState.RELEASING}),
    AttemptState.CANCELLING: frozenset({AttemptState.RELEASING}),
    AttemptState.RELEASING: frozenset(),
}


class PrefillNodeCore(NodeCore):
    """Decides for a prefill node; see the module's text."""

    role: ClassVar[Role] = Role.PREFILL
    transitions: ClassVar[Transitions] = TRANSITIONS

    def _first_state(self) -> AttemptState:
        return AttemptState.PREFILLING

    def _start(self, attempt: Attempt, command: StartPrefill | ReserveDecode, out: EffectBuffer) -> None:
        assert isinstance(command, StartPrefill)
        spec = PushSpec(
            attempt.transfer_id,
            command.decode_address,
            len(attempt.request.token_ids),
            prompt_digest(attempt.request, self._config.fingerprint_digest),
        )
        attempt.has_transfer = True
        out.add(OpenPush(spec))
        out.add(SubmitPrefill(attempt.key, attempt.request, attempt.transfer_id))

    def _on_prefill_started(self, event: PrefillStarted, now_s: float, out: EffectBuffer) -> None:
        attempt = self._attempts.get(event.key)
        if attempt is not None:
            attempt.started_s = event.started_s
            attempt.num_cached_tokens = event.num_cached_tokens

    def _on_step_finished(self, event: StepFinished, now_s: float, out: EffectBuffer) -> None:
        for output in event.step.outputs:
            attempt = self._attempts.get(output.key)
            if attempt is not None and attempt.state is AttemptState.PREFILLING:
                self._on_first_token(attempt, output, now_s, out)
        for failure in event.step.failures:
            attempt = self._attempts.get(failure.key)
            if attempt is not None and attempt.state not in ENDING:
                self._end_with_error(attempt, failure.error, out)

    def _on_first_token(
        self, attempt: Attempt, output: SequenceOutput, now_s: float, out: EffectBuffer
    ) -> None:
        if not attempt.is_orphan:
            out.tokens(attempt.router_epoch).append(
                attempt.number, output.index, output.token_id, output.logprobs
            )
        started_s = now_s if attempt.started_s is None else attempt.started_s
        queue_s, compute_s = max(0.0, started_s - attempt.received_s), max(0.0, now_s - started_s)
        finished = PrefillFinished(attempt.number, attempt.num_cached_tokens, queue_s, compute_s)
        self._tell(attempt, finished, out)  # Of a one-token answer, too: it says what the cache held.
        if output.finish_reason is not None:
            self._end(attempt, AttemptFinished(attempt.number, output.finish_reason), out)
            return
        self._move(attempt, AttemptState.HANDING_OFF)
        out.add(FinishPush(attempt.transfer_id, output.token_id))

    def _on_push_done(self, event: PushDone, now_s: float, out: EffectBuffer) -> None:
        attempt = self._attempts.get(sequence_key(event.transfer_id))
        if attempt is None or attempt.state in ENDING:
            return  # acknowledged while the cancel was on its way
        assert attempt.state is AttemptState.HANDING_OFF, f"{attempt.key}: pushed while {attempt.state}"
        attempt.has_transfer = False
        self._end(attempt, KVReleased(attempt.number), out)
