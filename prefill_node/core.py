"""The life of an attempt on a prefill node.

    state         what happened                     what follows
    ------------  --------------------------------  ---------------------------------------------------
    (new)         StartPrefill                      open the push, submit              -> PREFILLING
                  StartPrefill with a pull, or
                    of a prefix that is pulled      pull (see `pulling_core`)          -> PULLING
    PULLING       the pull is over, or failed       open the push, submit              -> PREFILLING
                  ReleaseKV, lease ran out          end with KVReleased
                  drain timed out                   end with AttemptFailed
                      if a transfer is open         cancel it                          -> CANCELLING
                      else                          release the sequence               -> RELEASING
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
    HoldCommand,
    PrefillFinished,
    Role,
    StartPrefill,
)
from kvrelay.engine.interface import SequenceOutput
from kvrelay.kv_transfer.interface import PushSpec
from kvrelay.node.attempt import ENDING, Attempt, AttemptState, Transitions, prompt_digest
from kvrelay.node.effect_buffer import EffectBuffer
from kvrelay.node.events import FinishPush, OpenPush, PrefillStarted, StepFinished, SubmitPrefill
from kvrelay.node.sending_core import SENDING_TRANSITIONS
from kvrelay.prefill_node.pulling_core import PullingNodeCore

TRANSITIONS: Final[Transitions] = {
    **SENDING_TRANSITIONS,
    AttemptState.PULLING: frozenset(
        {AttemptState.PREFILLING, AttemptState.CANCELLING, AttemptState.RELEASING}
    ),
    AttemptState.PREFILLING: frozenset(
        {AttemptState.HANDING_OFF, AttemptState.CANCELLING, AttemptState.RELEASING}
    ),
    AttemptState.HANDING_OFF: frozenset({AttemptState.CANCELLING, AttemptState.RELEASING}),
    AttemptState.CANCELLING: frozenset({AttemptState.RELEASING}),
    AttemptState.RELEASING: frozenset(),
}


class PrefillNodeCore(PullingNodeCore):
    """Decides for a prefill node; see the module's text."""

    role: ClassVar[Role] = Role.PREFILL
    transitions: ClassVar[Transitions] = TRANSITIONS

    def _first_state_of_role(self, command: HoldCommand) -> AttemptState:
        assert isinstance(command, StartPrefill)
        waits = command.pull is not None or self._pull_to_follow(command.request) is not None
        return AttemptState.PULLING if waits else AttemptState.PREFILLING

    def _start_of_role(self, attempt: Attempt, out: EffectBuffer) -> None:
        assert isinstance(attempt.command, StartPrefill)
        if attempt.state is AttemptState.PULLING:
            self._start_pull(attempt, attempt.command, out)
        else:
            self._submit(attempt, out)

    def _prefill(self, attempt: Attempt, now_s: float, out: EffectBuffer) -> None:
        attempt.submitted_s = now_s
        self._move(attempt, AttemptState.PREFILLING)
        self._submit(attempt, out)

    def _submit(self, attempt: Attempt, out: EffectBuffer) -> None:
        assert isinstance(attempt.command, StartPrefill)
        request = attempt.command.request
        spec = PushSpec(
            attempt.transfer_id,
            attempt.command.decode_address,
            len(request.token_ids),
            prompt_digest(request, self._config.fingerprint_digest),
        )
        attempt.has_transfer = True
        out.add(OpenPush(spec))
        out.add(SubmitPrefill(attempt.key, request, attempt.transfer_id))

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
        finished = PrefillFinished(
            attempt.number,
            attempt.num_cached_tokens,
            queue_s=max(0.0, started_s - attempt.submitted_s),
            compute_s=max(0.0, now_s - started_s),
            num_pulled_tokens=attempt.num_pulled_tokens,
            pull_s=attempt.submitted_s - attempt.received_s,
            pull_error=attempt.pull_error,
        )
        self._tell(attempt, finished, out)  # Of a one-token answer, too: it says what the cache held.
        if output.finish_reason is not None:
            self._end(attempt, AttemptFinished(attempt.number, output.finish_reason), out)
            return
        self._move(attempt, AttemptState.HANDING_OFF)
        out.add(FinishPush(attempt.transfer_id, output.token_id))
