"""A router's cluster as it is shown to people and clients: snapshots, read-only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvrelay.core.ids import NodeId
from kvrelay.core.node_messages import NodeLoad, Role
from kvrelay.core.service_terms import Priority


@dataclass(frozen=True, slots=True)
class NodeState:
    """One attached node. `num_attempts` are this router's own on it; `load` is what the node said last,
    None before its first word; `attached_s` is how long ago it said hello. `index_stale`: the router does not
    know which KV blocks it holds, and guesses."""

    node_id: NodeId
    role: Role
    model: str
    engine: str
    host: str
    pid: int
    draining: bool
    num_blocks: int
    block_size: int
    max_num_seqs: int
    num_attempts: int
    load: NodeLoad | None
    transfer_address: str
    transport: str
    attached_s: float
    index_stale: bool = False


@dataclass(frozen=True, slots=True)
class IndexState:
    """A router's block index. An entry is one block on one node; `num_evicted` were dropped because there may
    be no more than `max_entries`; `num_bytes` is about what it takes."""

    num_entries: int = 0
    max_entries: int = 0
    num_bytes: int = 0
    num_evicted: int = 0


@dataclass(frozen=True, slots=True)
class QueueState:
    """What waits at a router in one class of requests, and what it refused since it started, by reason."""

    priority: Priority
    num_queued: int
    max_queued: int
    refused: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClusterState:
    """One router's view of everything. `num_requests` counts live requests by ledger state; `counters` only
    grow; `mismatches` are the pairs that are not matched because their KV fingerprints differ, readable."""

    router_id: str = ""
    version: str = ""
    uptime_s: float = 0.0
    nodes: tuple[NodeState, ...] = ()
    num_requests: Mapping[str, int] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    mismatches: tuple[str, ...] = ()
    index: IndexState = IndexState()
    queues: tuple[QueueState, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that attached nodes serve. `tokenizer_digest` is empty where no tokenizer is known."""

    name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer_digest: str
    num_prefill_nodes: int
    num_decode_nodes: int
