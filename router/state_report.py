"""The core's status as clients and people see it: `ClusterState` and `ModelInfo`."""

from __future__ import annotations

from dataclasses import fields, replace

import kvrelay
from kvrelay.core.cluster_view import ClusterState, ModelInfo, NodeState, QueueState
from kvrelay.core.service_terms import Priority
from kvrelay.router.admission_queue import Refusal
from kvrelay.router.ledger import RequestState
from kvrelay.router.views import ClusterStatus, Counters, ModelStatus, NodeStatus

_ENDED = (RequestState.DONE, RequestState.FAILED)
_COUNTER_NAMES = {
    "num_submitted": "requests",
    "num_tokens_delivered": "tokens",
    "num_failed": "failures",
}


def cluster_state(status: ClusterStatus, router_id: str, uptime_s: float) -> ClusterState:
    """All that `WatchCluster` and ``/status`` show."""
    by_state = status.num_requests_by_state
    num_requests = {state.value: number for state, number in by_state.items() if state not in _ENDED}
    num_requests["releasing"] = sum(by_state[state] for state in _ENDED)
    return ClusterState(
        router_id=router_id,
        version=kvrelay.__version__,
        uptime_s=uptime_s,
        nodes=tuple(_node_state(node) for node in status.nodes),
        num_requests=num_requests,
        counters={**_counters(status.counters), **_trials(status)},
        mismatches=tuple(
            f"{model.name}: {pair.prefill_node} and {pair.decode_node}: {pair.difference}"
            for model in status.models
            for pair in model.mismatches
        ),
        index=status.index,
        queues=tuple(_queue_state(status, priority) for priority in Priority),
    )


def _queue_state(status: ClusterStatus, priority: Priority) -> QueueState:
    num_queued, max_queued = status.lengths[priority]
    refused = {reason.value: status.queue.refused[priority, reason] for reason in Refusal}
    return QueueState(priority, num_queued, max_queued, refused)


def _trials(status: ClusterStatus) -> dict[str, int]:
    counts = status.queue
    return {"queue_trials": counts.num_trials, "queue_trials_in_time": counts.num_trials_in_time}


def without_times(state: ClusterState) -> ClusterState:
    """The state without what changes by itself: two that are equal differ in nothing worth telling."""
    nodes = tuple(replace(node, attached_s=0.0) for node in state.nodes)
    return replace(state, uptime_s=0.0, nodes=nodes)


def _counters(counters: Counters) -> dict[str, int]:
    named: dict[str, int] = {}
    for spec in fields(counters):
        value = getattr(counters, spec.name)
        if isinstance(value, int):
            named[_COUNTER_NAMES.get(spec.name, spec.name.removeprefix("num_"))] = value
    for code, number in counters.num_failed_by_code.items():
        named[f"failures_{code.lower()}"] = number
    return named


def _node_state(node: NodeStatus) -> NodeState:
    description = node.description
    return NodeState(
        node_id=description.node_id,
        role=description.role,
        model=description.model,
        engine=description.engine,
        host=description.host,
        pid=description.pid,
        draining=node.is_draining,
        num_blocks=description.num_blocks,
        block_size=description.block_size,
        max_num_seqs=description.max_num_seqs,
        num_attempts=node.num_in_flight,
        load=node.load,
        transfer_address=description.transfer_address,
        transport=description.transport,
        attached_s=max(0.0, node.attached_for_s),
        index_stale=node.is_index_stale,
    )


def model_infos(status: ClusterStatus) -> tuple[ModelInfo, ...]:
    """The models that attached nodes serve, by name."""
    models = sorted(status.models, key=lambda model: model.name)
    return tuple(
        _model_info(model, status) for model in models if model.num_prefill_nodes + model.num_decode_nodes > 0
    )


def _model_info(model: ModelStatus, status: ClusterStatus) -> ModelInfo:
    descriptions = [node.description for node in status.nodes if node.description.model == model.name]
    digests = [description.tokenizer_digest for description in descriptions if description.tokenizer_digest]
    return ModelInfo(
        name=model.name,
        max_model_len=model.max_sequence_tokens,
        vocab_size=model.vocab_size,
        eos_token_ids=descriptions[0].eos_token_ids,
        tokenizer_digest=digests[0] if digests else "",
        num_prefill_nodes=model.num_prefill_nodes,
        num_decode_nodes=model.num_decode_nodes,
    )


def can_serve(status: ClusterStatus) -> bool:
    """Whether at least one model has a prefill and a decode node that fit together."""
    return any(
        model.num_prefill_nodes and model.num_decode_nodes and not model.problem for model in status.models
    )
