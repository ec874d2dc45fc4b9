"""The policy `round-robin`: it knows neither load nor caches. What other policies are compared with."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from kvrelay.core.explanation import Candidate, Decision
from kvrelay.core.node_messages import Role
from kvrelay.router.placement import ClusterView, FirstComePolicy, NodeView, PlacementRequest


class RoundRobin(FirstComePolicy):
    """One node of each role after another, through all nodes of a model; a node that can't take the request
    loses its turn."""

    def __init__(self) -> None:
        self._num_placed = 0

    @property
    def name(self) -> str:
        return "round-robin"

    def choose(
        self, request: PlacementRequest, cluster: ClusterView, now_s: float, rng: Random
    ) -> Decision | None:
        """See `FirstComePolicy.choose`."""
        prefill, decode = (
            self._candidates(cluster.nodes_of(request.model, role), request, now_s) for role in Role
        )
        pair = _first_pair(prefill, decode)
        if pair is None:
            return None
        self._num_placed += 1
        candidates = tuple(candidate for _, candidate in (*prefill, *decode))
        return Decision(pair[0].node_id, pair[1].node_id, candidates, self.name)

    def _candidates(
        self, nodes: Iterable[NodeView], request: PlacementRequest, now_s: float
    ) -> list[tuple[NodeView, Candidate]]:
        """From the one whose turn it is; those that failed this request before come last."""
        in_order = list(nodes)
        start = self._num_placed % len(in_order) if in_order else 0
        turns = [*in_order[start:], *in_order[:start]]
        turns.sort(key=lambda node: node.description.node_id in request.avoided)
        return [(node, _candidate(node, float(turn), request, now_s)) for turn, node in enumerate(turns)]


def _candidate(node: NodeView, turn: float, request: PlacementRequest, now_s: float) -> Candidate:
    description = node.description
    objection = node.objection(request, now_s)
    return Candidate(description.node_id, description.role, turn, (("turn", turn),), objection)


def _first_pair(
    prefill: list[tuple[NodeView, Candidate]], decode: list[tuple[NodeView, Candidate]]
) -> tuple[Candidate, Candidate] | None:
    """The first two that can hand KV to each other and take the request."""
    for p_node, p_candidate in prefill:
        if p_candidate.objection:
            continue
        for d_node, d_candidate in decode:
            if not d_candidate.objection and d_node.fingerprint_digest == p_node.fingerprint_digest:
                return p_candidate, d_candidate
    return None
