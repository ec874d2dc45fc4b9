"""A router that places as it always does, but for requests whose ids say where: `python -m
tests.fault_matrix.placing_router router ...` takes what `kvrelay router ...` does.

The id ``name.p1.p0.512`` has the prompt prefilled on node p1, which is to pull 512 tokens from node p0;
``name.p1.-.0`` pulls nothing. Where node p1 can't take it, or failed it before, the least loaded one does.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from kvrelay.cli.main import main
from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.node_messages import Role
from kvrelay.router import policies, server
from kvrelay.router.block_index import BlockIndex
from kvrelay.router.config import Placement
from kvrelay.router.least_loaded import LeastLoaded
from kvrelay.router.placement import (
    ClusterView,
    Decision,
    Pick,
    PlacementPolicy,
    PlacementRequest,
    WaitingRequests,
)


class PlacesWhereTold:
    """See the module's text."""

    def __init__(self, policy: PlacementPolicy) -> None:
        self._policy = policy
        self._told = LeastLoaded()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def pick(self, waiting: WaitingRequests, cluster: ClusterView, now_s: float, rng: Random) -> Pick | None:
        for request in waiting:
            if (
                _is_told(request)
                and (decision := self._told.choose(request, cluster, now_s, rng)) is not None
            ):
                return Pick(request, _as_told(decision, request, cluster, now_s))
        return self._policy.pick(waiting, cluster, now_s, rng)

    def note_placed(
        self, attempt_id: AttemptId, request: PlacementRequest, decision: Decision, now_s: float
    ) -> None:
        """What was told is to the policy as if another router had sent it: it did not plan it, and hears of
        it by what the nodes report of their load."""
        if not _is_told(request):
            self._policy.note_placed(attempt_id, request, decision, now_s)


def _is_told(request: PlacementRequest) -> bool:
    return request.request_id.count(".") == 3


def _as_told(decision: Decision, request: PlacementRequest, cluster: ClusterView, now_s: float) -> Decision:
    _, prefill, holder, num_tokens = request.request_id.split(".")
    nodes = {node.description.node_id: node for node in cluster.nodes_of(request.model, Role.PREFILL)}
    node = nodes.get(NodeId(prefill))
    if node is None or node.objection(request, now_s) or prefill in request.avoided:
        return decision
    return replace(
        decision,
        prefill_node=NodeId(prefill),
        pull_from=None if holder == "-" else NodeId(holder),
        num_pull_tokens=int(num_tokens),
    )


def make_policy(name: Placement, index: BlockIndex) -> PlacementPolicy:
    """The policy of that name, which does as it is told."""
    return PlacesWhereTold(policies.make_policy(name, index))  # type: ignore[return-value]  # by __getattr__


if __name__ == "__main__":
    server.make_policy = make_policy
    main()
