"""The policy `least-loaded`: it knows of load alone, and of caches nothing."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from kvrelay.core.explanation import Candidate, Decision
from kvrelay.core.ids import NodeId
from kvrelay.core.node_messages import Role
from kvrelay.router.placement import ClusterView, FirstComePolicy, NodeView, PlacementRequest


class LeastLoaded(FirstComePolicy):
    """The prefill node with the fewest outstanding tokens, the decode node with the most free head-room."""

    @property
    def name(self) -> str:
        return "least-loaded"

    def choose(
        self, request: PlacementRequest, cluster: ClusterView, now_s: float, rng: Random
    ) -> Decision | None:
        """See `FirstComePolicy.choose`. Ties are broken by `rng`."""
        scored = {
            role: [
                (node, self._score(node, role, request, now_s))
                for node in cluster.nodes_of(request.model, role)
            ]
            for role in Role
        }
        best = self._best_pair(scored, request, rng)
        if best is None:
            return None
        candidates = tuple(
            candidate if candidate.node_id in best else _with_avoidance(candidate, request)
            for role in Role
            for _, candidate in scored[role]
        )
        return Decision(*best, candidates, self.name)

    def _score(self, node: NodeView, role: Role, request: PlacementRequest, now_s: float) -> Candidate:
        if role is Role.PREFILL:
            terms = (
                ("outstanding_tokens", float(node.outstanding_prefill_tokens)),
                ("new_tokens", float(request.num_tokens)),
            )
        else:
            num_blocks = node.description.num_blocks
            terms = (
                ("reserved_share", node.reserved_blocks / num_blocks),
                ("new_share", node.blocks_for(request) / num_blocks),
            )
        objection = node.objection(request, now_s)
        score = terms[0][1] + terms[1][1]
        return Candidate(node.description.node_id, role, score, terms, objection)

    def _best_pair(
        self,
        scored: dict[Role, list[tuple[NodeView, Candidate]]],
        request: PlacementRequest,
        rng: Random,
    ) -> tuple[NodeId, NodeId] | None:
        """The best pair of the best group of equal fingerprints: least prefill wait, then most head-room."""
        groups = {
            digest: [[pair for pair in scored[role] if pair[0].fingerprint_digest == digest] for role in Role]
            for digest in {node.fingerprint_digest for node, _ in scored[Role.PREFILL]}
        }
        best: tuple[float, float] | None = None
        choice: tuple[NodeId, NodeId] | None = None
        for digest in sorted(groups):
            prefill, decode = (_least(members, request, rng) for members in groups[digest])
            if prefill is None or decode is None:
                continue
            score = (prefill.score, decode.score)
            if best is None or score < best:
                best, choice = score, (prefill.node_id, decode.node_id)
        return choice


def _least(
    members: list[tuple[NodeView, Candidate]], request: PlacementRequest, rng: Random
) -> Candidate | None:
    """The least-scored member without objection; one that failed this request only if there is no other."""
    others = [
        candidate
        for node, candidate in members
        if candidate.node_id not in request.avoided and not node.is_draining
    ]
    pool = others or [candidate for _, candidate in members]
    able = [candidate for candidate in pool if not candidate.objection]
    if not able:
        return None
    least = min(candidate.score for candidate in able)
    ties = [candidate for candidate in able if candidate.score == least]
    return ties[0] if len(ties) == 1 else rng.choice(ties)


def _with_avoidance(candidate: Candidate, request: PlacementRequest) -> Candidate:
    if candidate.node_id not in request.avoided or candidate.objection:
        return candidate
    return replace(candidate, objection="it failed this request before")
