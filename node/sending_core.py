"""How a node of either role sends a prefix that another one pulls.

    state         what happened                     what follows
    ------------  --------------------------------  ---------------------------------------------------
    (new)         SendPrefix                        pin in the engine                  -> PINNING
    PINNING       the engine holds some of it       open the push, with all of it      -> SENDING
                  it has none of it                 open the push, cancel it: the
                                                      other node hears of it at once   -> CANCELLING
                  the engine refuses                AttemptRefused                     -> (gone)
    SENDING       PushDone                          end with KVReleased                -> RELEASING
                  PushFailed                        end with AttemptFailed             -> RELEASING
    both          ReleaseKV, lease ran out          end with KVReleased
                  drain timed out                   end with AttemptFailed
                      if a transfer is open         cancel it                          -> CANCELLING
                      else                          release what is pinned             -> RELEASING

The rest is as for every attempt. A release behind a pin in the engine's queue frees what that has taken.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Final

from kvrelay.core.errors import NodeUnavailable
from kvrelay.core.node_messages import HoldCommand, SendPrefix
from kvrelay.core.request import Prefix
from kvrelay.kv_transfer.interface import PushSpec
from kvrelay.node.attempt import Attempt, AttemptState, Transitions, prompt_digest, refusal
from kvrelay.node.core import NodeCore
from kvrelay.node.effect_buffer import EffectBuffer
from kvrelay.node.events import OpenPush, PinPrefix, PrefixHeld, PushPrefix

SENDING_TRANSITIONS: Final[Transitions] = {
    AttemptState.PINNING: frozenset({AttemptState.SENDING, AttemptState.CANCELLING, AttemptState.RELEASING}),
    AttemptState.SENDING: frozenset({AttemptState.CANCELLING, AttemptState.RELEASING}),
}


class SendingNodeCore(NodeCore):
    """See the module's text. A role's core adds what the role does."""

    @abstractmethod
    def _start_of_role(self, attempt: Attempt, out: EffectBuffer) -> None:
        """Take up a new attempt of the role's own."""

    @abstractmethod
    def _first_state_of_role(self, command: HoldCommand) -> AttemptState: ...

    def _first_state(self, command: HoldCommand) -> AttemptState:
        if isinstance(command, SendPrefix):
            return AttemptState.PINNING
        return self._first_state_of_role(command)

    def _start(self, attempt: Attempt, out: EffectBuffer) -> None:
        if isinstance(attempt.command, SendPrefix):
            out.add(PinPrefix(attempt.key, attempt.command.prefix))
        else:
            self._start_of_role(attempt, out)

    def _on_prefix_held(self, event: PrefixHeld, now_s: float, out: EffectBuffer) -> None:
        attempt = self._attempts.get(event.reservation.key)
        if attempt is None or attempt.state is not AttemptState.PINNING:
            return  # its release is behind it in the engine's queue
        assert isinstance(attempt.command, SendPrefix)
        prefix, num_tokens = attempt.command.prefix, event.reservation.num_cached_tokens
        sent = Prefix(prefix.token_ids[:num_tokens], prefix.cache_salt) if num_tokens else prefix
        digest = prompt_digest(sent, self._config.fingerprint_digest)
        out.add(OpenPush(PushSpec(attempt.transfer_id, attempt.command.address, len(sent.token_ids), digest)))
        attempt.has_transfer = True
        if not num_tokens:
            self._end(attempt, refusal(attempt.number, NodeUnavailable("it has nothing of that prefix")), out)
            return
        self._move(attempt, AttemptState.SENDING)
        out.add(PushPrefix(attempt.transfer_id, event.reservation.block_table, num_tokens))
