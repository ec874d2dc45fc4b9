"""The cluster's state and the models it serves, as clients see them."""

from __future__ import annotations

from dataclasses import fields
from typing import Final

from kvrelay.codec.bounds import length, seconds, text, token_ids, whole
from kvrelay.codec.cluster import decode_node_load, encode_node_load
from kvrelay.codec.node_hello import MAX_NAME_CHARS, decode_digest
from kvrelay.codec.service_terms import decode_priority, encode_priority
from kvrelay.core.client_types import MAX_MODEL_CHARS
from kvrelay.core.cluster_view import ClusterState, IndexState, ModelInfo, NodeState, QueueState
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.ids import NodeId
from kvrelay.core.node_messages import Role
from kvrelay.v1 import router_pb2

MAX_NODES: Final = 65_536
MAX_MISMATCH_CHARS: Final = 4096
_MAX_COUNTER: Final = 2**64 - 1
_INDEX_FIELDS: Final = tuple(spec.name for spec in fields(IndexState))


def encode_cluster_state(state: ClusterState) -> router_pb2.ClusterState:
    """All of it; counters that outgrow the wire stay at its most: nodes tell what is added to some."""
    return router_pb2.ClusterState(
        router_id=state.router_id,
        version=state.version,
        uptime_s=state.uptime_s,
        nodes=[_encode_node(node) for node in state.nodes],
        num_requests=dict(state.num_requests),
        counters={name: min(number, _MAX_COUNTER) for name, number in state.counters.items()},
        mismatches=[text[:MAX_MISMATCH_CHARS] for text in state.mismatches],
        index=router_pb2.BlockIndexState(**{name: getattr(state.index, name) for name in _INDEX_FIELDS}),
        queues=[_encode_queue(queue) for queue in state.queues],
    )


def decode_cluster_state(pb: router_pb2.ClusterState) -> ClusterState:
    """All of it.

    Raises:
        InvalidRequest: a field is out of range.
    """
    length(len(pb.nodes), "nodes", MAX_NODES)
    return ClusterState(
        router_id=text(pb.router_id, "router_id", MAX_NAME_CHARS),
        version=text(pb.version, "version", MAX_NAME_CHARS),
        uptime_s=seconds(pb.uptime_s, "uptime_s"),
        nodes=tuple(_decode_node(node) for node in pb.nodes),
        num_requests=dict(pb.num_requests),
        counters=dict(pb.counters),
        mismatches=tuple(entry[:MAX_MISMATCH_CHARS] for entry in pb.mismatches),
        index=IndexState(*[getattr(pb.index, name) for name in _INDEX_FIELDS]),
        queues=tuple(_decode_queue(queue) for queue in pb.queues),
    )


def _encode_queue(queue: QueueState) -> router_pb2.QueueState:
    return router_pb2.QueueState(
        priority=encode_priority(queue.priority),
        num_queued=queue.num_queued,
        max_queued=queue.max_queued,
        refused=dict(queue.refused),
    )


def _decode_queue(pb: router_pb2.QueueState) -> QueueState:
    priority = decode_priority(pb.priority, "queues.priority")
    return QueueState(priority, pb.num_queued, pb.max_queued, dict(pb.refused))


def _encode_node(node: NodeState) -> router_pb2.NodeState:
    return router_pb2.NodeState(
        node_id=node.node_id,
        role=node.role.value,
        model=node.model,
        engine=node.engine,
        host=node.host,
        pid=node.pid,
        draining=node.draining,
        num_blocks=node.num_blocks,
        block_size=node.block_size,
        max_num_seqs=node.max_num_seqs,
        num_attempts=node.num_attempts,
        load=encode_node_load(node.load) if node.load is not None else None,
        transfer_address=node.transfer_address,
        transport=node.transport,
        attached_s=node.attached_s,
        index_stale=node.index_stale,
    )


def _decode_node(pb: router_pb2.NodeState) -> NodeState:
    if pb.role not in tuple(Role):
        raise InvalidRequest(f"nodes.role is {pb.role!r}, which is no role", field="nodes.role")
    names = {
        name: text(getattr(pb, name), f"nodes.{name}", MAX_NAME_CHARS)
        for name in ("model", "engine", "host", "transfer_address", "transport")
    }
    return NodeState(
        node_id=NodeId(text(pb.node_id, "nodes.node_id", MAX_NAME_CHARS, is_required=True)),
        role=Role(pb.role),
        pid=pb.pid,
        draining=pb.draining,
        num_blocks=pb.num_blocks,
        block_size=pb.block_size,
        max_num_seqs=pb.max_num_seqs,
        num_attempts=pb.num_attempts,
        load=decode_node_load(pb.load) if pb.HasField("load") else None,
        attached_s=seconds(pb.attached_s, "nodes.attached_s"),
        index_stale=pb.index_stale,
        **names,
    )


def encode_models(models: tuple[ModelInfo, ...] | list[ModelInfo]) -> router_pb2.ListModelsResponse:
    """All models, in the order given."""
    return router_pb2.ListModelsResponse(
        models=[
            router_pb2.Model(
                name=model.name,
                max_model_len=model.max_model_len,
                vocab_size=model.vocab_size,
                eos_token_ids=model.eos_token_ids,
                tokenizer_digest=model.tokenizer_digest,
                num_prefill_nodes=model.num_prefill_nodes,
                num_decode_nodes=model.num_decode_nodes,
            )
            for model in models
        ]
    )


def decode_models(pb: router_pb2.ListModelsResponse) -> tuple[ModelInfo, ...]:
    """All models, in the order given.

    Raises:
        InvalidRequest: a field is out of range.
    """
    return tuple(
        ModelInfo(
            name=text(model.name, "models.name", MAX_MODEL_CHARS, is_required=True),
            max_model_len=whole(model.max_model_len, "models.max_model_len", 1),
            vocab_size=whole(model.vocab_size, "models.vocab_size", 1),
            eos_token_ids=token_ids(model.eos_token_ids, "models.eos_token_ids"),
            tokenizer_digest=decode_digest(model.tokenizer_digest, "models.tokenizer_digest"),
            num_prefill_nodes=model.num_prefill_nodes,
            num_decode_nodes=model.num_decode_nodes,
        )
        for model in pb.models
    )
