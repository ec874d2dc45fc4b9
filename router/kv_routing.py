"""What the core does about KV events: into the index with them, and back to the node if one is missing."""

from __future__ import annotations

from collections.abc import Iterator

from kvrelay.core.kv_events import KVEvent
from kvrelay.core.node_messages import SendKVSnapshot
from kvrelay.router.cluster_state import ClusterState, NodeState
from kvrelay.router.events import SendCommand
from kvrelay.router.placement import Decision, PlacementRequest


def apply_kv_event(
    cluster: ClusterState, node: NodeState, event: KVEvent, now_s: float
) -> Iterator[SendCommand]:
    """Bring one event of `node` into the index; where something is missing, ask for a snapshot."""
    if cluster.kv.apply(node.holdings, event, now_s):
        yield _ask(node)


def ask_again(cluster: ClusterState, now_s: float) -> Iterator[SendCommand]:
    """Once more for the snapshots that were asked for and have not begun. Nodes that have said nothing of
    their blocks for long are stale from now on."""
    for node in cluster.nodes.values():
        cluster.kv.note_staleness(node.holdings, now_s)
        if cluster.kv.is_snapshot_overdue(node.holdings, now_s):
            yield _ask(node)


def note_guesses(cluster: ClusterState, decision: Decision, request: PlacementRequest, now_s: float) -> None:
    """A prompt went to this pair: whichever of the two is stale will hold its blocks, probably.
    Of one that the index has no place for nothing can be noted, and nothing is hashed."""
    for node_id in (decision.prefill_node, decision.decode_node):
        node = cluster.nodes[node_id]
        if node.slot is not None and cluster.kv.is_stale(node.holdings, now_s):
            cluster.kv.guess(node.holdings, request.block_keys(node))


def _ask(node: NodeState) -> SendCommand:
    return SendCommand(node.description.node_id, SendKVSnapshot())
