"""Between the core and a policy: remembers what a decision says of pulls, until its prefill begins."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.node_messages import HandoffVerified, NodeLoad, PrefillFinished
from kvrelay.router.fleet_policy import FleetPolicy
from kvrelay.router.placement import ClusterView, Decision, NodeView, Pick, PlacementRequest, WaitingRequests


class PullPlans:
    """A `PlacementPolicy` that does as another one does."""

    def __init__(self, policy: FleetPolicy) -> None:
        self._policy = policy
        self._plans: dict[AttemptId, tuple[NodeId | None, int]] = {}

    def take(self, attempt_id: AttemptId) -> tuple[NodeId | None, int]:
        """From which node, and how many tokens; None: there is nothing to pull."""
        return self._plans.pop(attempt_id, (None, 0))

    def note_pulled(self, node_id: NodeId, num_tokens: int, seconds: float) -> None:
        """A node has pulled so much."""
        self._policy.note_pulled(node_id, num_tokens, seconds)

    @property
    def name(self) -> str:
        return self._policy.name

    @property
    def look_again_s(self) -> float:
        return self._policy.look_again_s

    def pick(self, waiting: WaitingRequests, cluster: ClusterView, now_s: float, rng: Random) -> Pick | None:
        return self._policy.pick(waiting, cluster, now_s, rng)

    def note_attached(self, node: NodeView, now_s: float) -> None:
        self._policy.note_attached(node, now_s)

    def note_lost(self, node: NodeView) -> None:
        self._policy.note_lost(node)

    def note_draining(self, node: NodeView) -> None:
        self._policy.note_draining(node)

    def note_load(self, node: NodeView, load: NodeLoad) -> None:
        self._policy.note_load(node, load)

    def note_placed(
        self, attempt_id: AttemptId, request: PlacementRequest, decision: Decision, now_s: float
    ) -> None:
        if decision.pull_from is not None:
            self._plans[attempt_id] = decision.pull_from, decision.num_pull_tokens
        self._policy.note_placed(attempt_id, request, decision, now_s)

    def note_prefilled(self, node: NodeView, reports: Sequence[PrefillFinished], now_s: float) -> None:
        self._policy.note_prefilled(node, reports, now_s)

    def note_handed_over(self, node: NodeView, report: HandoffVerified, now_s: float) -> None:
        self._policy.note_handed_over(node, report, now_s)

    def note_settled(self, node_id: NodeId, attempt_id: AttemptId, now_s: float) -> None:
        self._policy.note_settled(node_id, attempt_id, now_s)
