"""How requests move through the ledger: dispatched, continued, finished, failed, their holds released.

Every move of a request and every settlement of a side goes through here, whatever event caused it, so
that the ledger, the nodes' books, the queue and the effects can't come apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvrelay.core.errors import (
    DeadlineExceeded,
    KVRelayError,
    RequestCancelled,
)
from kvrelay.core.ids import NodeId
from kvrelay.core.node_messages import ReleaseKV, ReserveDecode, Role, StartPrefill
from kvrelay.core.request import FinishReason
from kvrelay.router.admission import AdmissionQueue, completed_reason
from kvrelay.router.cluster_state import ClusterState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.events import DeliverFailed, DeliverFinished, Effect, RequestReport, SendCommand
from kvrelay.router.ledger import Attempt, Ledger, RequestEntry, RequestState, Side, SideState
from kvrelay.router.placement import Decision, PlacementPolicy
from kvrelay.router.placement_memory import PlacementMemory
from kvrelay.router.pulls import Pulls, pull_order
from kvrelay.router.views import Counters


@dataclass(slots=True, eq=False)
class Lifecycle:
    """The moves. `effects` collects what is to be done about them; `has_news_for_queue` says that something
    changed which may let a queued request start."""

    config: RouterCoreConfig
    cluster: ClusterState
    ledger: Ledger
    queue: AdmissionQueue
    counters: Counters
    memory: PlacementMemory
    policy: PlacementPolicy
    effects: list[Effect] = field(default_factory=list)
    has_news_for_queue: bool = False
    pulls: Pulls = field(init=False)

    def __post_init__(self) -> None:
        self.pulls = Pulls(self.config, self.cluster, self.ledger, self.counters)

    # ---- starting -------------------------------------------------------------------------------

    def accept(self, entry: RequestEntry, now_s: float) -> None:
        """Let a new request in: it is queued."""
        self.ledger.add_request(entry)
        self._start_waiting(entry, now_s)
        self.queue.enqueue(entry)
        self.has_news_for_queue = True

    def dispatch(self, entry: RequestEntry, decision: Decision, num_blocks: int, now_s: float) -> Attempt:
        """Start an attempt on both nodes of the pair. The caller takes the entry out of the queue."""
        prefill, decode = (
            self.cluster.nodes[node_id] for node_id in (decision.prefill_node, decision.decode_node)
        )
        assert prefill.fingerprint_digest == decode.fingerprint_digest, "a pair that can't exchange KV"
        request = entry.continuation()
        attempt = Attempt(
            attempt_id=self.ledger.next_attempt_id(),
            entry=entry,
            merge=entry.merge,
            prefill=Side(decision.prefill_node, num_tokens=len(request.token_ids)),
            decode=Side(decision.decode_node, num_blocks=num_blocks),
            max_sequence_tokens=min(prefill.max_sequence_tokens, decode.max_sequence_tokens),
            eos_token_ids=frozenset(decode.description.eos_token_ids),
        )
        entry.move_to(RequestState.PREFILLING)
        self.ledger.add_attempt(attempt)
        prefill.take(attempt, attempt.prefill)
        decode.take(attempt, attempt.decode)
        self._note_dispatch(entry, decision, now_s)
        attempt_id, address = attempt.attempt_id, decode.description.transfer_address
        self.effects.extend(self.pulls.order(attempt, request, decision))
        self.effects.append(SendCommand(decision.decode_node, ReserveDecode(attempt_id, request)))
        start = StartPrefill(attempt_id, request, address, pull_order(attempt))
        self.effects.append(SendCommand(decision.prefill_node, start))
        return attempt

    def _note_dispatch(self, entry: RequestEntry, decision: Decision, now_s: float) -> None:
        entry.num_attempts += 1
        entry.prefill_node, entry.decode_node = decision.prefill_node, decision.decode_node
        entry.prefilled, entry.handoff, entry.num_held_tokens = None, None, None
        entry.prefilled_s, entry.handed_over_s = None, None
        if entry.first_dispatch_s is None:
            entry.first_dispatch_s = now_s
        self.counters.num_attempts += 1
        self.queue.record_dispatch(now_s)
        self.memory.record_placement(entry, decision, now_s)

    def _start_waiting(self, entry: RequestEntry, now_s: float) -> None:
        entry.queued_since_s = now_s
        entry.queue_deadline_s = now_s + self.config.queue_timeout_s

    # ---- ending an attempt ----------------------------------------------------------------------

    def fail_attempt(
        self, attempt: Attempt, error: KVRelayError, now_s: float, *, blamed: Iterable[NodeId] = ()
    ) -> None:
        """The current attempt came to nothing: continue the request elsewhere, or end it."""
        entry = attempt.entry
        assert attempt.is_current
        self.counters.num_attempts_failed += 1
        entry.last_error = error
        entry.avoided |= frozenset(blamed)
        self._end_attempt(entry, now_s)
        if self._finish_if_complete(attempt, now_s):
            return
        if entry.num_attempts >= self.config.max_attempts:
            self.fail(entry, error, now_s)
            return
        self.counters.num_continuations += 1
        self._start_waiting(entry, now_s)
        entry.not_before_s = now_s + self._retry_pause_s(entry.num_attempts)
        self._requeue(entry)

    def refuse_attempt(self, attempt: Attempt, error: KVRelayError, now_s: float) -> None:
        """A node had no room after all: that attempt does not count, and the time in the queue goes on."""
        entry = attempt.entry
        assert attempt.is_current
        self.counters.num_attempts_refused += 1
        entry.last_error = error
        entry.num_attempts -= 1
        self._end_attempt(entry, now_s)
        if not self._finish_if_complete(attempt, now_s):
            self._requeue(entry)

    def _finish_if_complete(self, attempt: Attempt, now_s: float) -> bool:
        """End the request if an ended attempt delivered its last token, and only its report is missing."""
        entry = attempt.entry
        reason = completed_reason(entry.continuation(), attempt.eos_token_ids, attempt.max_sequence_tokens)
        if reason is not None:
            self.finish(entry, reason, now_s)
        return reason is not None

    def _retry_pause_s(self, num_attempts: int) -> float:
        if num_attempts < 2:
            return 0.0
        return min(
            self.config.retry_pause_s * 4.0 ** min(num_attempts - 2, 16), self.config.max_retry_pause_s
        )

    def _requeue(self, entry: RequestEntry) -> None:
        entry.move_to(RequestState.QUEUED)
        self.queue.enqueue_first(entry)
        self.has_news_for_queue = True

    def _end_attempt(self, entry: RequestEntry, now_s: float) -> None:
        attempt = self.ledger.detach_attempt(entry)
        if attempt is None:
            return
        for role in Role:
            self.release(attempt, role, now_s)
        self.effects.extend(self.pulls.release(attempt, now_s))
        self.ledger.drop_if_settled(attempt)

    def release(self, attempt: Attempt, role: Role, now_s: float) -> None:
        """Have a node free what it holds of an attempt, unless it was told already or holds nothing."""
        side = attempt.side(role)
        if side.state is SideState.LIVE:
            self.ledger.mark_releasing(attempt, role, now_s)
            self.effects.append(SendCommand(side.node_id, ReleaseKV(attempt.attempt_id)))

    def settle(self, attempt: Attempt, role: Role, now_s: float) -> None:
        """The node holds nothing of this attempt any more."""
        side = attempt.side(role)
        node = self.cluster.nodes.get(side.node_id)
        if node is not None and attempt.attempt_id in node.in_flight:
            node.give_back(attempt, side)
            self.policy.note_settled(side.node_id, attempt.attempt_id, now_s)
        self.ledger.settle_side(attempt, role)
        self.has_news_for_queue = True

    # ---- ending a request -----------------------------------------------------------------------

    def finish(self, entry: RequestEntry, reason: FinishReason, now_s: float) -> None:
        """The output is complete and delivered."""
        entry.finish_reason = reason
        self._end(entry, RequestState.DONE, now_s)
        self.counters.num_finished += 1
        self.counters.num_prompt_tokens += entry.request.num_prompt_tokens
        report = _report(entry, now_s)
        self.counters.kv_bytes += report.kv_bytes
        self.effects.append(DeliverFinished(entry.session, entry.stream_id, entry.request_id, reason, report))

    def fail(self, entry: RequestEntry, error: KVRelayError, now_s: float) -> None:
        """The request can't be served; the caller is told why."""
        entry.last_error = error
        self._end(entry, RequestState.FAILED, now_s)
        self.counters.num_failed += 1
        self.counters.num_failed_by_code[error.code] += 1
        self.effects.append(DeliverFailed(entry.session, entry.stream_id, entry.request_id, error))

    def cancel(self, entry: RequestEntry, now_s: float) -> None:
        """The caller wants it no more."""
        self.fail(entry, RequestCancelled(f"request {entry.request_id!r} was cancelled"), now_s)

    def abandon(self, entry: RequestEntry, now_s: float) -> None:
        """The caller is gone; nobody is told."""
        entry.last_error = RequestCancelled("its client went away")
        self._end(entry, RequestState.FAILED, now_s)
        self.counters.num_abandoned += 1

    def _end(self, entry: RequestEntry, state: RequestState, now_s: float) -> None:
        if entry.state is RequestState.QUEUED:
            self.queue.remove(entry)
            self.has_news_for_queue = True
        entry.move_to(state)
        self._end_attempt(entry, now_s)
        self.memory.record_end(entry, now_s)
        self.ledger.close_request(entry)

    # ---- time -----------------------------------------------------------------------------------

    def expire_requests(self, now_s: float) -> None:
        """End what ran out of time: its own deadline, the queue's, or the wait for nodes."""
        for entry in self.ledger.take_overdue(now_s):
            self.fail(entry, DeadlineExceeded(f"the deadline passed while {entry.state}"), now_s)
        for entry in list(self.queue.entries()):
            error = self._queue_error(entry, now_s)
            if error is not None:
                self.fail(entry, error, now_s)

    def _queue_error(self, entry: RequestEntry, now_s: float) -> KVRelayError | None:
        model = self.cluster.models[entry.model]
        if model.gap_text:
            waiting_since_s = max(entry.queued_since_s, model.gap_since_s)
            if now_s - waiting_since_s >= self.config.node_wait_s:
                return model.gap()
        if now_s < entry.queue_deadline_s:
            return None
        waited_s = now_s - entry.queued_since_s
        why = f" (last: {entry.last_error.message})" if entry.last_error else ""
        return self.queue.overloaded(f"no nodes had room for the request within {waited_s:.1f} s{why}")

    def expire_holds(self, now_s: float) -> None:
        """Count releases that are overdue; strike those whose lease must have ended."""
        self.pulls.expire(now_s)
        for (attempt_id, role), released_s in list(self.ledger.releasing.items()):
            if now_s - released_s < self.config.ack_timeout_s:
                break
            attempt = self.ledger.attempts[attempt_id]
            side = attempt.side(role)
            if not side.is_overdue:
                side.is_overdue = True
                self.cluster.nodes[side.node_id].num_overdue += 1
                self.counters.num_overdue_releases += 1
            if now_s - released_s >= self.config.lease_s:
                self.counters.num_expired_holds += 1
                self.settle(attempt, role, now_s)


def _report(entry: RequestEntry, now_s: float) -> RequestReport:
    dispatched_s = now_s if entry.first_dispatch_s is None else entry.first_dispatch_s
    first_token_s = now_s if entry.merge.first_token_s is None else entry.merge.first_token_s
    handoff = entry.handoff
    return RequestReport(
        prefill_node=entry.prefill_node,
        decode_node=entry.decode_node,
        num_attempts=entry.num_attempts,
        num_prompt_tokens=entry.request.num_prompt_tokens,
        num_output_tokens=entry.merge.next_index,
        num_cached_tokens=entry.prefilled.num_cached_tokens if entry.prefilled else 0,
        queue_s=dispatched_s - entry.submitted_s,
        ttft_s=first_token_s - entry.submitted_s,
        total_s=now_s - entry.submitted_s,
        kv_bytes=handoff.num_bytes if handoff else 0,
        kv_messages=handoff.num_messages if handoff else 0,
        kv_seconds=handoff.seconds if handoff else 0.0,
        kv_transport=handoff.transport if handoff else "",
        num_pulled_tokens=entry.prefilled.num_pulled_tokens if entry.prefilled else 0,
    )
