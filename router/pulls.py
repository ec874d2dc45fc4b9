"""Pulls: prefixes that one node sends to a prefill node, before that computes the rest of a prompt.

A pull has a hold of its own: what its holder has pinned. It is ordered with an attempt, under another id,
and is released as soon as that attempt ends or its prefill is computed, whatever became of the transfer; the
holder's terminal report, its loss or the end of an unacknowledged release settles it. The other side of a
pull, blocks reserved at the prefill node, is a part of that node's side of the attempt, and ends with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptRefused,
    KVReleased,
    PrefillFinished,
    PullOrder,
    ReleaseKV,
    SendPrefix,
    StopPull,
)
from kvrelay.core.request import Prefix, TokenRequest
from kvrelay.router.cluster_state import ClusterState, NodeState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.events import SendCommand
from kvrelay.router.ledger import Attempt, Ledger, Pull, RequestState, Side, SideState
from kvrelay.router.placement import Decision
from kvrelay.router.views import Counters


@dataclass(frozen=True, slots=True)
class Pulls:
    """The moves of pulls. What is to be done about them is returned."""

    config: RouterCoreConfig
    cluster: ClusterState
    ledger: Ledger
    counters: Counters

    def order(self, attempt: Attempt, request: TokenRequest, decision: Decision) -> Iterator[SendCommand]:
        """Have the prefix sent that `decision` wants pulled for this new attempt, whose `pull` is set then;
        if the two nodes can't, the prompt is computed."""
        puller = self.cluster.nodes[decision.prefill_node]
        holder = self._holder_of(decision, puller, attempt)
        num_tokens = min(decision.num_pull_tokens, len(request.token_ids))
        if holder is None or num_tokens < 1:
            return
        holder_id = holder.description.node_id
        pull = Pull(self.ledger.next_attempt_id(), attempt, Side(holder_id), num_tokens)
        attempt.pull = self.ledger.pulls[pull.pull_id] = holder.sends[pull.pull_id] = pull
        self.counters.num_pulls += 1
        prefix = Prefix(request.token_ids[:num_tokens], request.cache_salt)
        address = puller.description.transfer_address
        yield SendCommand(holder_id, SendPrefix(pull.pull_id, prefix, address))

    def release(self, attempt: Attempt, now_s: float) -> Iterator[SendCommand]:
        """Nobody waits any more for what the attempt pulls, if it pulls anything: have it let go of."""
        pull = attempt.pull
        if pull is not None and pull.holder.state is SideState.LIVE:
            pull.holder.state = SideState.RELEASING
            self.ledger.releasing_pulls[pull.pull_id] = now_s
            yield SendCommand(pull.holder.node_id, ReleaseKV(pull.pull_id))

    def count(self, attempt: Attempt, report: PrefillFinished) -> None:
        """The prefill is computed, and its node says what it has pulled."""
        if attempt.pull is not None:
            self.counters.num_pulled_tokens += report.num_pulled_tokens
            self.counters.num_pulls_failed += bool(report.pull_error)

    def on_report(
        self, pull: Pull, report: AttemptRefused | AttemptFinished | AttemptFailed | KVReleased
    ) -> Iterator[SendCommand]:
        """The holder holds nothing of the pull any more."""
        was_live = pull.holder.state is SideState.LIVE
        self._settle(pull)
        if was_live and not isinstance(report, KVReleased):
            yield from self._stop(pull)

    def on_holder_lost(self, node: NodeState) -> Iterator[SendCommand]:
        """Whatever the node was sending will not come."""
        for pull in list(node.sends.values()):
            self._settle(pull)
            yield from self._stop(pull)

    def expire(self, now_s: float) -> None:
        """Count releases that are overdue; strike those whose lease must have ended."""
        for pull_id, released_s in list(self.ledger.releasing_pulls.items()):
            if now_s - released_s < self.config.ack_timeout_s:
                break
            pull = self.ledger.pulls[pull_id]
            if not pull.holder.is_overdue:
                pull.holder.is_overdue = True
                self.cluster.nodes[pull.holder.node_id].num_overdue += 1
                self.counters.num_overdue_releases += 1
            if now_s - released_s >= self.config.lease_s:
                self.counters.num_expired_holds += 1
                self._settle(pull)

    def _holder_of(self, decision: Decision, puller: NodeState, attempt: Attempt) -> NodeState | None:
        """The node that is to send; None: it can't, or the other can't take it."""
        if decision.pull_from is None or decision.pull_from in attempt.entry.avoided:
            return None
        holder = self.cluster.nodes.get(decision.pull_from)
        if (
            holder is None
            or holder is puller
            or holder.is_draining
            or not puller.description.transfer_address
        ):
            return None
        same_kv = holder.fingerprint_digest == puller.fingerprint_digest
        same_transport = holder.description.transport == puller.description.transport
        return holder if same_kv and same_transport else None

    def _settle(self, pull: Pull) -> None:
        pull.holder.state = SideState.SETTLED
        node = self.cluster.nodes.get(pull.holder.node_id)
        if node is not None:
            node.sends.pop(pull.pull_id, None)
        del self.ledger.pulls[pull.pull_id]
        self.ledger.releasing_pulls.pop(pull.pull_id, None)

    def _stop(self, pull: Pull) -> Iterator[SendCommand]:
        """Its prefill node need not wait for it, if it still does."""
        attempt = pull.attempt
        if attempt.is_current and attempt.entry.state is RequestState.PREFILLING:
            yield SendCommand(attempt.prefill.node_id, StopPull(attempt.attempt_id))


def pull_order(attempt: Attempt) -> PullOrder | None:
    """What the prefill node is told of the attempt's pull."""
    return None if attempt.pull is None else PullOrder(attempt.pull.pull_id, attempt.pull.num_tokens)
