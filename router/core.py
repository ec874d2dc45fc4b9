"""The router's core: events in, effects out. Synchronous and deterministic; no I/O, clock or logging.

Each event is handled to its end: books first, then, if anything was freed, the queue. The effects are to
be performed in order. The parts: `ledger` (who holds what), `lifecycle` (how requests move), `reports`
(what nodes say), `merge` (tokens), `kv_intake` (which blocks nodes hold), `cluster_state`, `admission`,
`placement`, `placement_memory`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from kvrelay.core.errors import KVRelayError
from kvrelay.core.explanation import Explanation
from kvrelay.core.ids import AttemptId, RequestId
from kvrelay.core.node_messages import TokenBatch
from kvrelay.core.request import FinishReason, TokenRequest, check_fits_model
from kvrelay.core.sampling import MAX_SEED
from kvrelay.router.admission import AdmissionQueue, check_names, completed_reason, deadline_of, find_model
from kvrelay.router.cluster_state import ClusterState, NodeState, description_fault
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.events import (
    DeliverFailed,
    Effect,
    Event,
    LookDue,
    NodeAttached,
    NodeLost,
    NodeReported,
    RequestCancelled,
    RequestSatisfied,
    RequestSubmitted,
    SessionClosed,
    Ticked,
)
from kvrelay.router.invariants import check_books
from kvrelay.router.kv_intake import KVIntake
from kvrelay.router.kv_routing import apply_kv_event, ask_again, note_guesses
from kvrelay.router.ledger import Ledger, RequestEntry
from kvrelay.router.lifecycle import Lifecycle
from kvrelay.router.merge import batch_fault, merge_batch
from kvrelay.router.output_merge import OutputMerge
from kvrelay.router.placement import PlacementPolicy
from kvrelay.router.placement_memory import PlacementMemory
from kvrelay.router.reports import apply_faults, apply_loss, apply_reports
from kvrelay.router.views import ClusterStatus, Counters, cluster_status
from kvrelay.router.waiting import WaitingEntries


class RouterCore:
    """One router's mind.

    `router_epoch` names this process in transfer ids. `rng` draws seeds for requests that bring none, and
    breaks the policy's ties. `kv` is the block index's intake, where the policy reads that index. `now_s`
    never goes back between calls.
    """

    def __init__(
        self,
        config: RouterCoreConfig,
        router_epoch: int,
        policy: PlacementPolicy,
        rng: Random,
        kv: KVIntake | None = None,
    ) -> None:
        self.config = config
        self.router_epoch = router_epoch
        self._policy = policy
        self._rng = rng
        self.look_again_s = math.inf
        """When a `LookDue` may start a queued request; infinite: nothing but another event can."""
        self._cluster = ClusterState(config, kv)
        self._ledger = Ledger()
        self._queue = AdmissionQueue(config)
        self._counters = Counters()
        self._memory = PlacementMemory(config.num_remembered_decisions)
        self._life = Lifecycle(
            config, self._cluster, self._ledger, self._queue, self._counters, self._memory, policy
        )

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Take one event; returns what is to be done, in order. Mutates this core only."""
        match event:
            case NodeReported():
                self._on_node_reported(event, now_s)
            case RequestSubmitted():
                self._on_request_submitted(event, now_s)
            case Ticked():
                self._on_ticked(now_s)
            case RequestCancelled():
                self._on_request_cancelled(event, now_s)
            case RequestSatisfied():
                self._on_request_satisfied(event, now_s)
            case SessionClosed():
                self._on_session_closed(event, now_s)
            case LookDue():
                self._life.has_news_for_queue = True
            case NodeAttached():
                self._on_node_attached(event, now_s)
            case NodeLost():
                self._on_node_lost(event, now_s)
        if self._life.has_news_for_queue:
            self._place_queued(now_s)
        effects, self._life.effects = self._life.effects, []
        return effects

    def status(self, now_s: float) -> ClusterStatus:
        """A snapshot of nodes, models, requests and counters."""
        return cluster_status(
            self.router_epoch, self._ledger, self._cluster, self._queue, self._counters, now_s
        )

    def next_tick_s(self, now_s: float) -> float:
        """When a `Ticked` may next do something for a request: at once if any is queued, else when the first
        deadline passes (infinity: there is none). What happens to nodes has seconds."""
        return now_s if self._queue.num_queued else self._ledger.earliest_deadline_s

    def explain(self, request_id: RequestId, now_s: float) -> Explanation:
        """The latest placement of a request, and what was measured of it so far or until its end.

        Raises:
            UnknownRequest: it is not among the `num_remembered_decisions` requests that were placed last, or
                has not been placed yet.
        """
        return self._memory.explain(request_id, self._ledger.requests.get(request_id), now_s)

    def check_invariants(self) -> None:
        """Assert that all books agree. Costs time in proportion to all requests: for tests."""
        check_books(self._ledger, self._cluster, self._queue)

    # ---- requests -------------------------------------------------------------------------------

    def _on_request_submitted(self, event: RequestSubmitted, now_s: float) -> None:
        self._counters.num_submitted += 1
        try:
            self._admit(event, now_s)
        except KVRelayError as error:
            self._counters.num_refused += 1
            self._life.effects.append(DeliverFailed(event.session, event.stream_id, event.request_id, error))

    def _admit(self, event: RequestSubmitted, now_s: float) -> None:
        """Raises the error that the caller is to get instead."""
        check_names(event, self._ledger)
        model = find_model(event.model, self._cluster)
        deadline_s = deadline_of(event, self.config, now_s)
        request = self._with_seed(event.request)
        reason = completed_reason(request, model.eos_token_ids, model.max_sequence_tokens)
        if reason is None:
            check_fits_model(request, vocab_size=model.vocab_size, max_model_len=model.max_sequence_tokens)
        entry = self._new_entry(event, request, deadline_s, now_s)
        self._life.accept(entry, now_s)
        if reason is not None:
            self._life.finish(entry, reason, now_s)
            return
        self._place_queued(now_s)
        if self._queue.is_over_bound:
            limit = self.config.max_queued_requests
            error = self._queue.overloaded(f"{limit} requests are queued already")
            self._life.fail(entry, error, now_s)

    def _new_entry(
        self, event: RequestSubmitted, request: TokenRequest, deadline_s: float, now_s: float
    ) -> RequestEntry:
        return RequestEntry(
            serial=self._ledger.next_serial(),
            request_id=event.request_id,
            session=event.session,
            stream_id=event.stream_id,
            model=event.model,
            request=request,
            submitted_s=now_s,
            deadline_s=deadline_s,
            merge=OutputMerge(
                session=event.session,
                stream_id=event.stream_id,
                first_index=request.num_output_tokens,
                max_tokens=request.sampling.max_tokens,
                max_early_tokens=self.config.max_early_tokens,
            ),
        )

    def _with_seed(self, request: TokenRequest) -> TokenRequest:
        """A sampled request gets a seed once, so that every attempt draws alike."""
        if request.sampling.is_greedy or request.sampling.seed is not None:
            return request
        return replace(request, sampling=replace(request.sampling, seed=self._rng.randint(0, MAX_SEED)))

    def _on_request_cancelled(self, event: RequestCancelled, now_s: float) -> None:
        entry = self._ledger.requests.get(event.request_id)
        if entry is not None:
            self._life.cancel(entry, now_s)

    def _on_request_satisfied(self, event: RequestSatisfied, now_s: float) -> None:
        entry = self._ledger.requests.get(event.request_id)
        if entry is not None:
            self._life.finish(entry, FinishReason.STOP, now_s)

    def _on_session_closed(self, event: SessionClosed, now_s: float) -> None:
        for entry in list(self._ledger.streams.get(event.session, {}).values()):
            self._life.abandon(entry, now_s)

    def _on_ticked(self, now_s: float) -> None:
        self._life.expire_requests(now_s)
        self._life.expire_holds(now_s)
        self._life.effects.extend(ask_again(self._cluster, now_s))
        self._cluster.forget_vacant_models(self._queue.waiting, now_s)
        # A refusal's pause may have run out: time alone can let a request start.
        self._life.has_news_for_queue = bool(self._queue.waiting)

    # ---- nodes ----------------------------------------------------------------------------------

    def _on_node_attached(self, event: NodeAttached, now_s: float) -> None:
        description = event.description
        earlier = self._cluster.nodes.get(description.node_id)
        if earlier is not None:
            apply_loss(self._life, earlier, "it attached anew", now_s)
        if description_fault(description):
            self._counters.num_nodes_turned_away += 1
            return
        self._policy.note_attached(self._cluster.add_node(description, now_s), now_s)
        self._life.has_news_for_queue = True

    def _on_node_lost(self, event: NodeLost, now_s: float) -> None:
        node = self._cluster.nodes.get(event.node_id)
        if node is not None and node.description.incarnation == event.incarnation:
            apply_loss(self._life, node, event.reason, now_s)

    def _on_node_reported(self, event: NodeReported, now_s: float) -> None:
        node = self._cluster.nodes.get(event.node_id)
        if node is None:
            return
        if event.kv is not None:
            self._life.effects.extend(apply_kv_event(self._cluster, node, event.kv, now_s))
        if event.load is not None:
            self._policy.note_load(node, event.load)
            if node.record_load(event.load, now_s):
                self._life.has_news_for_queue = True
        if event.tokens is not None:
            self._merge_tokens(node, event.tokens, now_s)
        if event.reports:
            apply_reports(self._life, node, event.reports, now_s)

    def _merge_tokens(self, node: NodeState, batch: TokenBatch, now_s: float) -> None:
        run = node.steady_run
        if run is not None and run.goes_on_with(batch):
            node.steps.note_same(now_s)
            self._life.effects.extend(run.deliver(batch))
            self._counters.num_tokens_delivered += len(batch.token_ids)
            return
        node.end_steady_run()
        node.steps.note_other(now_s)
        fault = batch_fault(batch)
        if fault:
            self._counters.num_faulty_frames += 1
            faults = [
                (AttemptId(attempt), f"a batch of tokens is unusable: {fault}") for attempt in batch.attempts
            ]
            apply_faults(self._life, node, faults, now_s)
            return
        merged = merge_batch(batch, node.in_flight, node.description.role, now_s)
        node.steady_run = merged.steady_run
        self._counters.num_tokens_delivered += merged.num_delivered_tokens
        self._counters.num_tokens_dropped += merged.num_dropped_tokens
        self._life.effects.extend(out for out in merged.deliveries.values() if out.token_ids)
        apply_faults(self._life, node, merged.faults, now_s)

    # ---- the queue ------------------------------------------------------------------------------

    def _place_queued(self, now_s: float) -> None:
        """Start what the policy picks, until it picks nothing more."""
        self._life.has_news_for_queue = False
        self.look_again_s = math.inf
        for model in list(self._queue.waiting):
            while self._place_one(model, now_s):
                pass
            self.look_again_s = min(self.look_again_s, self._policy.look_again_s)

    def _place_one(self, model: str, now_s: float) -> bool:
        entries = self._queue.waiting.get(model)
        if not entries:
            return False
        waiting = WaitingEntries(entries, self.config.growth_tokens, now_s)
        picked = self._policy.pick(waiting, self._cluster, now_s, self._rng)
        if picked is None:
            return False
        request, decision = picked.request, picked.decision
        entry = self._ledger.requests[request.request_id]
        num_blocks = self._cluster.nodes[decision.decode_node].blocks_for(request)
        attempt = self._life.dispatch(entry, decision, num_blocks, now_s)
        self._queue.remove(entry)
        self._policy.note_placed(attempt.attempt_id, request, decision, now_s)
        note_guesses(self._cluster, decision, request, now_s)
        return True
