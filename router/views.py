"""Read-only snapshots of the core, for `WatchCluster`, status and metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from kvrelay.core.cluster_view import IndexState
from kvrelay.core.node_messages import NodeDescription, NodeLoad, Role
from kvrelay.core.service_terms import Priority
from kvrelay.router.admission_queue import AdmissionQueue, QueueCounts
from kvrelay.router.block_index import BlockIndex
from kvrelay.router.cluster_state import ClusterState, FingerprintMismatch, ModelState, NodeState
from kvrelay.router.ledger import Ledger, RequestState, Side, SideState


@dataclass(slots=True)
class Counters:
    """What happened since the router started. All only grow."""

    num_submitted: int = 0
    num_refused: int = 0
    """Requests that were never queued: bad, unknown or over the bound."""
    num_finished: int = 0
    num_failed: int = 0
    num_failed_by_code: Counter[str] = field(default_factory=Counter)
    num_abandoned: int = 0
    """Requests whose session closed."""
    num_attempts: int = 0
    num_continuations: int = 0
    num_attempts_refused: int = 0
    num_attempts_failed: int = 0
    num_cancelled_transfers: int = 0
    """Transfers whose prefill node gave them up, as after a first token that is the last."""
    num_nodes_lost: int = 0
    num_nodes_turned_away: int = 0
    num_tokens_delivered: int = 0
    num_tokens_dropped: int = 0
    num_prompt_tokens: int = 0
    num_faulty_frames: int = 0
    num_stray_reports: int = 0
    num_overdue_releases: int = 0
    num_expired_holds: int = 0
    num_pulls: int = 0
    """Prefixes that nodes were told to send to others."""
    num_pulls_failed: int = 0
    """Of those whose prompt was computed: what could not be pulled, and was computed."""
    num_pulled_tokens: int = 0
    kv_bytes: int = 0
    num_kv_events: int = 0
    num_kv_gaps: int = 0
    """Times that KV events of a node were missing."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node as this router sees it."""

    description: NodeDescription
    load: NodeLoad | None
    is_draining: bool
    is_full: bool
    is_index_stale: bool
    num_in_flight: int
    num_releasing: int
    num_overdue: int
    outstanding_prefill_tokens: int
    reserved_blocks: int
    attached_for_s: float


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model as this router can serve it; `problem` says why it can't, and is empty otherwise."""

    name: str
    vocab_size: int
    max_sequence_tokens: int
    num_prefill_nodes: int
    num_decode_nodes: int
    num_queued: int
    problem: str
    mismatches: tuple[FingerprintMismatch, ...]


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """All of it at one moment. Ended requests count in `num_requests_by_state` until both nodes reported."""

    router_epoch: int
    nodes: tuple[NodeStatus, ...]
    models: tuple[ModelStatus, ...]
    num_requests_by_state: dict[RequestState, int]
    num_sessions: int
    num_unsettled_attempts: int
    """Pulls among them."""
    counters: Counters
    index: IndexState
    queue: QueueCounts
    lengths: dict[Priority, tuple[int, int]]
    """Of each class: how many wait, and how many may."""


def cluster_status(
    router_epoch: int,
    ledger: Ledger,
    cluster: ClusterState,
    queue: AdmissionQueue,
    counters: Counters,
    now_s: float,
) -> ClusterStatus:
    """Snapshot the core's parts; the result shares nothing mutable with them."""
    by_state = dict.fromkeys(RequestState, 0)
    for entries in (ledger.requests.values(), ledger.closing.values()):
        for entry in entries:
            by_state[entry.state] += 1
    return ClusterStatus(
        router_epoch=router_epoch,
        nodes=tuple(_node_status(cluster, node, now_s) for node in cluster.nodes.values()),
        models=tuple(_model_status(model, queue) for model in cluster.models.values()),
        num_requests_by_state=by_state,
        num_sessions=len(ledger.streams),
        num_unsettled_attempts=len(ledger.attempts) + len(ledger.pulls),
        counters=replace(
            counters,
            num_failed_by_code=Counter(counters.num_failed_by_code),
            num_kv_events=cluster.kv.num_events,
            num_kv_gaps=cluster.kv.num_gaps,
        ),
        index=_index_state(cluster.block_index),
        queue=replace(queue.counts, refused=Counter(queue.counts.refused)),
        lengths={
            priority: (queue.num_of_class(priority), queue.max_of_class(priority)) for priority in Priority
        },
    )


def _index_state(index: BlockIndex) -> IndexState:
    return IndexState(index.num_entries, index.max_entries, index.num_bytes, index.num_evicted)


def _node_status(cluster: ClusterState, node: NodeState, now_s: float) -> NodeStatus:
    return NodeStatus(
        description=node.description,
        load=node.load,
        is_draining=node.is_draining,
        is_full=node.is_full(now_s),
        is_index_stale=cluster.kv.is_stale(node.holdings, now_s),
        num_in_flight=node.num_in_flight + len(node.sends),
        num_releasing=sum(side.state is SideState.RELEASING for side in _sides(node)),
        num_overdue=node.num_overdue,
        outstanding_prefill_tokens=node.outstanding_prefill_tokens,
        reserved_blocks=node.reserved_blocks,
        attached_for_s=now_s - node.attached_s,
    )


def _sides(node: NodeState) -> Iterator[Side]:
    """All that it holds, or did a moment ago."""
    yield from (attempt.side(node.description.role) for attempt in node.in_flight.values())
    yield from (pull.holder for pull in node.sends.values())


def _model_status(model: ModelState, queue: AdmissionQueue) -> ModelStatus:
    return ModelStatus(
        name=model.name,
        vocab_size=model.vocab_size,
        max_sequence_tokens=model.max_sequence_tokens,
        num_prefill_nodes=len(model.nodes[Role.PREFILL]),
        num_decode_nodes=len(model.nodes[Role.DECODE]),
        num_queued=queue.num_of_model(model.name),
        problem=model.gap_text,
        mismatches=model.mismatches,
    )
