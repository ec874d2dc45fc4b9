"""How a node describes itself and its load to routers."""

from __future__ import annotations

import os
import secrets
import socket
from typing import Protocol

import kvrelay
from kvrelay.core.ids import NodeId
from kvrelay.core.node_messages import NodeDescription, NodeLoad, Role
from kvrelay.core.tokenizer_chunk import tokenizer_digest
from kvrelay.engine.interface import EngineInfo, EngineLoad
from kvrelay.kv_transfer.interface import KVTransfer
from kvrelay.kv_transfer.owner import TransferSnapshot


class ObservableTransfer(KVTransfer, Protocol):
    """A `KVTransfer` that can be asked what it holds, and which transport it uses (``name: reason``)."""

    @property
    def transport_note(self) -> str: ...

    def snapshot(self) -> TransferSnapshot: ...


def default_node_id(role: Role) -> str:
    """Unique among the processes that run now on hosts of different names."""
    return f"{role}-{socket.gethostname()}-{os.getpid()}"


def describe_node(
    role: Role, node_id: NodeId, info: EngineInfo, transfer: ObservableTransfer, tokenizer: bytes | None
) -> NodeDescription:
    """Who this node is, under a new incarnation; once in a process, when `transfer` has started."""
    return NodeDescription(
        node_id=node_id,
        incarnation=secrets.randbits(63),
        role=role,
        model=info.model,
        engine=info.engine,
        fingerprint=info.fingerprint,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        max_num_seqs=info.max_num_seqs,
        eos_token_ids=info.eos_token_ids,
        transfer_address=transfer.address,
        transport=transfer.transport_note.partition(":")[0],
        tokenizer_digest=tokenizer_digest(tokenizer) if tokenizer is not None else "",
        host=socket.gethostname(),
        pid=os.getpid(),
        version=kvrelay.__version__,
    )


def node_load(load: EngineLoad, num_attempts: int, transfers: TransferSnapshot) -> NodeLoad:
    """The engine's figures, and what the node and its KV transfer hold for attempts."""
    return NodeLoad(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_waiting_tokens=load.num_waiting_tokens,
        num_reserved=load.num_reserved,
        num_held_blocks=load.num_held_blocks,
        num_cached_blocks=load.num_cached_blocks,
        num_empty_blocks=load.num_empty_blocks,
        num_preemptions=load.num_preemptions,
        prefix_hit_tokens=load.prefix_hit_tokens,
        prefix_query_tokens=load.prefix_query_tokens,
        num_host_blocks=load.num_host_blocks,
        num_used_host_blocks=load.num_used_host_blocks,
        host_hit_tokens=load.host_hit_tokens,
        num_attempts=num_attempts,
        num_open_transfers=transfers.num_pushes + transfers.num_receives + transfers.num_pending_offers,
    )
