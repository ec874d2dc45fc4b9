"""A placement that pulls whenever there is anything to pull, so that pulls meet what breaks.

The router's own policy pulls where that is quicker than to compute, which in a cluster of few and small
nodes is rare.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from kvrelay.core.ids import NodeId
from kvrelay.core.node_messages import Role
from kvrelay.router.placement import (
    ClusterView,
    NodeView,
    Pick,
    PlacementPolicy,
    PlacementRequest,
    WaitingRequests,
)
from kvrelay.router.prefix_source import NO_SLOT, IndexedPrefixes


class EagerPulls:
    """A `PlacementPolicy` that places as another one does, and orders a pull from the node, of either role,
    that is thought to hold most of the prompt, if that is more than the chosen one holds itself. Now and then
    it asks for more than the holder is thought to have, as one does whose index is late."""

    def __init__(self, policy: PlacementPolicy, source: IndexedPrefixes) -> None:
        self._policy = policy
        self._source = source

    def __getattr__(self, name: str) -> Any:
        """All but `pick` is as the other policy has it."""
        return getattr(self._policy, name)

    def pick(self, waiting: WaitingRequests, cluster: ClusterView, now_s: float, rng: Random) -> Pick | None:
        """See `PlacementPolicy`."""
        picked = self._policy.pick(waiting, cluster, now_s, rng)
        if picked is None:
            return None
        request = picked.request
        held_tokens = self._held_tokens(request, cluster)
        own_tokens = held_tokens.pop(picked.decision.prefill_node, 0)
        holder = max(held_tokens, key=held_tokens.__getitem__, default=None)
        if holder is None or held_tokens[holder] <= own_tokens:
            return picked
        num_tokens = request.num_tokens if rng.random() < 0.2 else held_tokens[holder]
        return Pick(request, replace(picked.decision, pull_from=holder, num_pull_tokens=num_tokens))

    def _held_tokens(self, request: PlacementRequest, cluster: ClusterView) -> dict[NodeId, int]:
        """How much of the prompt each node holds, as far as the index knows."""
        nodes = [node for role in Role for node in cluster.nodes_of(request.model, role)]
        return {node.description.node_id: self._held_by(node, request) for node in nodes}

    def _held_by(self, node: NodeView, request: PlacementRequest) -> int:
        slot = self._source.index_slot(node)
        if slot == NO_SLOT:
            return 0
        match = self._source.match_prefix(self._source.keys(request, node))
        return int(match.either[slot]) * node.description.block_size
