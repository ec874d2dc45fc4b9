"""A router that places where requests' ids say, for what compares placements: `python -m
benchmarks.ordered_router router ...` takes what `kvrelay router ...` does.

The id ``name.p1.p0.512`` has the prompt prefilled on node p1, which is to pull 512 tokens from node p0;
``name.p1.-.0`` lets it pull nothing. Where that can't be, and for all other ids, the least loaded nodes do
it.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from kvrelay.cli.main import main
from kvrelay.core.explanation import Decision
from kvrelay.core.ids import NodeId, RequestId
from kvrelay.core.node_messages import Role
from kvrelay.router import server
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.core import RouterCore
from kvrelay.router.least_loaded import LeastLoaded
from kvrelay.router.placement import ClusterView, PlacementPolicy, PlacementRequest


class OrderedPlacement(LeastLoaded):
    """See the module's text."""

    @property
    def name(self) -> str:
        return "ordered"

    def choose(
        self, request: PlacementRequest, cluster: ClusterView, now_s: float, rng: Random
    ) -> Decision | None:
        decision = super().choose(request, cluster, now_s, rng)
        order = _order_of(request.request_id)
        if decision is None or order is None:
            return decision
        prefill, holder, num_tokens = order
        wanted = {node.description.node_id: node for node in cluster.nodes_of(request.model, Role.PREFILL)}
        node = wanted.get(NodeId(prefill))
        if node is None or node.objection(request, now_s) or prefill in request.avoided:
            return decision
        pull_from = None if holder == "-" else NodeId(holder)
        return replace(
            decision, prefill_node=NodeId(prefill), pull_from=pull_from, num_pull_tokens=num_tokens
        )


def _order_of(request_id: RequestId) -> tuple[str, str, int] | None:
    """Prefill node, holder, number of tokens; None: the id orders nothing."""
    parts = request_id.split(".")
    return (parts[1], parts[2], int(parts[3])) if len(parts) == 4 else None


class OrderedCore(RouterCore):
    """A core that asks `OrderedPlacement`, whichever policy it is given."""

    def __init__(
        self, config: RouterCoreConfig, epoch: int, policy: PlacementPolicy, rng: Random, *more: Any
    ) -> None:
        super().__init__(config, epoch, OrderedPlacement(), rng, *more)


if __name__ == "__main__":
    server.RouterCore = OrderedCore  # type: ignore[misc]
    main()
