"""Policies that order pulls, for tests of what follows from that."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from kvrelay.core.explanation import Decision
from kvrelay.core.ids import NodeId
from kvrelay.core.node_messages import Role
from kvrelay.router.least_loaded import LeastLoaded
from kvrelay.router.placement import (
    ClusterView,
    Pick,
    PlacementPolicy,
    PlacementRequest,
    WaitingRequests,
)


class OrdersPulls(LeastLoaded):
    """Places by load, and wants `num_tokens` tokens pulled from `holder`."""

    def __init__(self, holder: str, num_tokens: int) -> None:
        self.holder = holder
        self.num_tokens = num_tokens

    def choose(
        self, request: PlacementRequest, cluster: ClusterView, now_s: float, rng: Random
    ) -> Decision | None:
        decision = super().choose(request, cluster, now_s, rng)
        if decision is None:
            return None
        return replace(decision, pull_from=NodeId(self.holder), num_pull_tokens=self.num_tokens)


class PullsAtRandom:
    """Does as another policy does, and has most prompts pull some of their tokens from any node at all."""

    def __init__(self, policy: PlacementPolicy) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def pick(self, waiting: WaitingRequests, cluster: ClusterView, now_s: float, rng: Random) -> Pick | None:
        picked = self._policy.pick(waiting, cluster, now_s, rng)
        if picked is None or rng.random() < 0.3:
            return picked
        request = picked.request
        nodes = [node for role in Role for node in cluster.nodes_of(request.model, role)]
        decision = replace(
            picked.decision,
            pull_from=rng.choice(nodes).description.node_id,
            num_pull_tokens=rng.randint(1, request.num_tokens + 1),
        )
        return Pick(request, decision)
