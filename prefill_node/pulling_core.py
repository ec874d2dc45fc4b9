"""How a prefill node takes the prefix of a prompt from another node, before it computes the rest.

The attempt is PULLING meanwhile, and the pull by itself goes so:

    state         what happened                     what follows
    ------------  --------------------------------  ---------------------------------------------------
    (new)         StartPrefill with a pull          reserve blocks in the engine       -> RESERVING
    RESERVING     the engine has taken blocks       expect the transfer                -> RECEIVING
                  it has all of the prefix          free, refuse the transfer; prefill -> (gone)
                  it refuses                        refuse the transfer; prefill       -> (gone)
                  StopPull, time-out, attempt ends  free, refuse the transfer          -> (gone)
    RECEIVING     ReceiveDone                       keep in the engine; prefill        -> KEEPING
                  ReceiveFailed                     free; prefill                      -> (gone)
                  StopPull, time-out, attempt ends  cancel the transfer                -> CANCELLING
    CANCELLING    TransferCancelled                 free                               -> (gone)
    KEEPING       the engine has kept it            -                                  -> (gone)

A prompt that begins with a prefix which is on its way for another one waits for that, as long as that takes,
and pulls nothing itself: computed meanwhile, it would take longer and compute the same twice.

Whatever becomes of the pull, the prompt is prefilled then, unless its attempt is ending: a failed pull costs
time and nothing else. The engine takes commands in order, so what is freed or kept before the prompt is
submitted is free or found by then, and what is freed before the attempt's own release is free when that is
answered.
"""

from __future__ import annotations

from abc import abstractmethod

from kvrelay.core.errors import KVRelayError, TransferCorrupt, TransferFailed, TransferTimeout
from kvrelay.core.ids import TransferId
from kvrelay.core.node_messages import Report, StartPrefill
from kvrelay.core.request import TokenRequest
from kvrelay.engine.interface import SequenceKey
from kvrelay.kv_transfer.interface import PushFailed, ReceiveDone, ReceiveFailed
from kvrelay.node.attempt import ENDING, Attempt, AttemptState, sequence_key
from kvrelay.node.core import NodeCoreConfig
from kvrelay.node.effect_buffer import EffectBuffer
from kvrelay.node.events import (
    CancelTransfer,
    EngineDied,
    ExpectTransfer,
    KeepPrefix,
    NodeEffect,
    NodeEvent,
    PrefixHeld,
    PrefixKept,
    RefuseTransfer,
    ReleaseSequence,
    ReservePrefix,
    SequenceRefused,
    Ticked,
    TransferCancelled,
)
from kvrelay.node.sending_core import SendingNodeCore
from kvrelay.prefill_node.pull import Pull, PullState, new_pull


class PullingNodeCore(SendingNodeCore):
    """See the module's text."""

    def __init__(self, config: NodeCoreConfig) -> None:
        super().__init__(config)
        self._pulls: dict[SequenceKey, Pull] = {}
        self._now_s = 0.0

    def handle(self, event: NodeEvent, now_s: float) -> list[NodeEffect]:
        self._now_s = now_s
        return super().handle(event, now_s)

    @abstractmethod
    def _prefill(self, attempt: Attempt, now_s: float, out: EffectBuffer) -> None:
        """Whatever can be pulled has been: compute the rest."""

    @property
    def num_open_transfers(self) -> int:
        return super().num_open_transfers + sum(pull.has_transfer for pull in self._pulls.values())

    def _is_known(self, key: SequenceKey) -> bool:
        return key in self._pulls or super()._is_known(key)

    def _pull_to_follow(self, request: TokenRequest) -> Pull | None:
        """The longest prefix of the prompt that is on its way already."""
        found = [pull for pull in self._pulls.values() if pull.brings_prefix_of(request)]
        return max(found, key=lambda pull: len(pull.prefix.token_ids), default=None)

    def _start_pull(self, attempt: Attempt, command: StartPrefill, out: EffectBuffer) -> None:
        """Have the attempt pull, or wait for a pull that brings as much or all that it may have."""
        assert attempt.state is AttemptState.PULLING
        leading = self._pull_to_follow(command.request)
        num_leading = 0 if leading is None else len(leading.prefix.token_ids)
        pull = new_pull(attempt, command) if command.pull is not None else None
        if pull is not None and len(pull.prefix.token_ids) > num_leading:
            self._pulls[pull.key] = pull
            out.add(ReservePrefix(pull.key, pull.prefix))
            return
        assert leading is not None
        leading.followers.append(attempt)
        if pull is not None:
            out.add(RefuseTransfer(pull.transfer_id))

    # ---- what happens to a pull --------------------------------------------------------------------

    def _on_prefix_held(self, event: PrefixHeld, now_s: float, out: EffectBuffer) -> None:
        reservation = event.reservation
        pull = self._pulls.get(reservation.key)
        if pull is None:
            super()._on_prefix_held(event, now_s, out)
            return
        pull.num_here_tokens = reservation.num_cached_tokens
        if pull.num_here_tokens >= len(pull.prefix.token_ids):
            self._forget(pull, out)
            self._prefill(pull.attempt, now_s, out)
            return
        pull.state = PullState.RECEIVING
        out.add(ExpectTransfer(pull.expected(reservation, self._config.fingerprint_digest)))

    def _on_sequence_refused(self, event: SequenceRefused, now_s: float, out: EffectBuffer) -> None:
        pull = self._pulls.get(event.key)
        if pull is None:
            super()._on_sequence_refused(event, now_s, out)
            return
        self._forget(pull, out)
        self._compute_instead(pull, event.error, now_s, out)

    def _on_receive_done(self, event: ReceiveDone, now_s: float, out: EffectBuffer) -> None:
        pull = self._pulls.get(sequence_key(event.transfer_id))
        if pull is None or pull.state is not PullState.RECEIVING:
            return  # verified while the cancel was on its way
        pull.state = PullState.KEEPING
        out.add(KeepPrefix(pull.key, event.num_tokens))
        self._prefill(pull.attempt, now_s, out)
        self._let_followers_go(pull, out)

    def _on_prefix_kept(self, event: PrefixKept, now_s: float, out: EffectBuffer) -> None:
        pull = self._pulls.pop(event.key)
        pull.attempt.num_pulled_tokens = max(0, event.num_tokens - pull.num_here_tokens)
        if event.num_tokens == 0:
            pull.attempt.pull_error = TransferCorrupt.code

    def _on_transfer_failed(self, event: PushFailed | ReceiveFailed, now_s: float, out: EffectBuffer) -> None:
        pull = self._pulls.get(sequence_key(event.transfer_id))
        if pull is None:
            super()._on_transfer_failed(event, now_s, out)
        elif pull.state is PullState.RECEIVING:
            self._forget(pull, out)
            self._compute_instead(pull, event.error, now_s, out)

    def _on_transfer_cancelled(self, event: TransferCancelled, now_s: float, out: EffectBuffer) -> None:
        pull = self._pulls.get(sequence_key(event.transfer_id))
        if pull is None:
            super()._on_transfer_cancelled(event, now_s, out)
            return
        self._forget(pull, out)
        attempt = pull.attempt
        if attempt.state is AttemptState.CANCELLING:
            self._move(attempt, AttemptState.RELEASING)
            out.add(ReleaseSequence(attempt.key))
        else:
            self._prefill(attempt, now_s, out)

    # ---- what ends a pull --------------------------------------------------------------------------

    def _stop_pull(self, transfer_id: TransferId, now_s: float, out: EffectBuffer) -> None:
        attempt = self._attempts.get(sequence_key(transfer_id))
        if attempt is not None and (pull := self._pull_of(attempt)) is not None:
            error = TransferFailed("the router says that the prefix will not come")
            self._give_up(pull, error, now_s, out)

    def _on_ticked(self, event: Ticked, now_s: float, out: EffectBuffer) -> None:
        super()._on_ticked(event, now_s, out)
        timeout_s = self._config.pull_timeout_s
        for pull in list(self._pulls.values()):
            if self._is_waited_for(pull) and now_s - pull.attempt.received_s >= timeout_s:
                error = TransferTimeout(f"the prefix did not come within {timeout_s:g} s")
                self._give_up(pull, error, now_s, out)

    def _end(self, attempt: Attempt, terminal: Report, out: EffectBuffer) -> None:
        pull = self._pull_of(attempt) if attempt.state not in ENDING else None
        if pull is None or pull.state is PullState.KEEPING:
            super()._end(attempt, terminal, out)
        elif pull.state is PullState.RESERVING:
            self._forget(pull, out)
            super()._end(attempt, terminal, out)
        else:
            attempt.terminal = terminal
            self._move(attempt, AttemptState.CANCELLING)
            self._cancel(pull, out)

    def _on_engine_died(self, event: EngineDied, now_s: float, out: EffectBuffer) -> None:
        for pull in self._pulls.values():
            if pull.state is PullState.RECEIVING:
                out.add(CancelTransfer(pull.transfer_id))
        self._pulls.clear()
        super()._on_engine_died(event, now_s, out)

    def _give_up(self, pull: Pull, error: KVRelayError, now_s: float, out: EffectBuffer) -> None:
        """The prompt is computed instead, at once or when the transfer's cancel is done."""
        if pull.state is PullState.RESERVING:
            self._forget(pull, out)
            self._compute_instead(pull, error, now_s, out)
        elif pull.state is PullState.RECEIVING:
            pull.attempt.pull_error = error.code
            self._cancel(pull, out)

    def _cancel(self, pull: Pull, out: EffectBuffer) -> None:
        if pull.state is PullState.RECEIVING:
            pull.state = PullState.CANCELLING
            out.add(CancelTransfer(pull.transfer_id))

    def _forget(self, pull: Pull, out: EffectBuffer) -> None:
        """No transfer writes its blocks any more, or will: free them."""
        del self._pulls[pull.key]
        if pull.state is PullState.RESERVING:
            out.add(RefuseTransfer(pull.transfer_id))
        out.add(ReleaseSequence(pull.key))
        self._let_followers_go(pull, out)

    def _let_followers_go(self, pull: Pull, out: EffectBuffer) -> None:
        """Whatever could come has come: those that waited for it compute the rest."""
        for attempt in pull.followers:
            if attempt.state is AttemptState.PULLING:
                self._prefill(attempt, self._now_s, out)

    def _compute_instead(self, pull: Pull, error: KVRelayError, now_s: float, out: EffectBuffer) -> None:
        pull.attempt.pull_error = error.code
        self._prefill(pull.attempt, now_s, out)

    def _pull_of(self, attempt: Attempt) -> Pull | None:
        command = attempt.command
        if not isinstance(command, StartPrefill) or command.pull is None:
            return None
        return self._pulls.get(sequence_key(TransferId(attempt.router_epoch, command.pull.attempt)))

    def _is_waited_for(self, pull: Pull) -> bool:
        return pull.attempt.state is AttemptState.PULLING and pull.state is not PullState.KEEPING
