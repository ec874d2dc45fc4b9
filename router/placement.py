"""Choosing a (prefill, decode) pair for a request: the interface of every policy, and the least-loaded one.

A policy sees requests and nodes through read-only protocols, decides, and shows its work: every candidate
with every term of its score, so that a decision can be asked about afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.explanation import Candidate as Candidate
from kvrelay.core.explanation import Decision as Decision
from kvrelay.core.ids import NodeId, RequestId
from kvrelay.core.node_messages import NodeDescription, NodeLoad, Role
from kvrelay.router.block_index import BlockIndex
from kvrelay.router.block_keys import PromptBlocks


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What a policy may know of a request.

    `token_ids` is the prompt plus the output delivered so far, `blocks` their keys in the block index;
    `num_growth_tokens` is the output to set aside room for. Nodes in `avoided` failed this request before.
    """

    request_id: RequestId
    model: str
    token_ids: Sequence[int]
    num_growth_tokens: int
    cache_salt: bytes = b""
    avoided: frozenset[NodeId] = frozenset()
    blocks: PromptBlocks = field(default=None, compare=False)  # type: ignore[assignment]  # see below

    def __post_init__(self) -> None:
        if self.blocks is None:
            object.__setattr__(self, "blocks", PromptBlocks(self.token_ids, self.cache_salt))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def block_keys(self, node: NodeView) -> NDArray[np.uint64]:
        """Keys of its full blocks in the block index, first to last, as `node` has them; hashed once for all
        nodes alike."""
        return self.blocks.keys(node.description.block_size, node.fingerprint_digest)


class NodeView(Protocol):
    """What a policy may know of a node. Counts are this router's own books; `load` is what the node said."""

    @property
    def description(self) -> NodeDescription: ...

    @property
    def fingerprint_digest(self) -> bytes: ...

    @property
    def slot(self) -> int | None:
        """Its place in the block index; None: it has none, and nothing is known of its blocks."""
        ...

    @property
    def is_draining(self) -> bool: ...

    @property
    def load(self) -> NodeLoad | None: ...

    @property
    def num_in_flight(self) -> int:
        """Attempts of this router that it holds something for."""
        ...

    @property
    def outstanding_prefill_tokens(self) -> int:
        """Tokens dispatched to it and not reported computed."""
        ...

    @property
    def reserved_blocks(self) -> int:
        """Blocks set aside on it, expected growth included."""
        ...

    def blocks_for(self, request: PlacementRequest) -> int:
        """Blocks to set aside for this request, never more than the node has."""
        ...

    def objection(self, request: PlacementRequest, now_s: float) -> str:
        """Why the node can't take this request now, or an empty string."""
        ...


class ClusterView(Protocol):
    """What a policy may know of the cluster."""

    @property
    def block_index(self) -> BlockIndex:
        """Which blocks the nodes hold, by their slots: as they said last, or where a node is stale, as this
        router guesses."""
        ...

    def nodes_of(self, model: str, role: Role) -> Iterable[NodeView]:
        """The attached nodes of one model and role."""
        ...


class PlacementPolicy(Protocol):
    """Decides; holds no resources. May learn between calls, deterministically."""

    def choose(
        self, request: PlacementRequest, cluster: ClusterView, now_s: float, rng: Random
    ) -> Decision | None:
        """A pair with equal fingerprints and no objection, or None when there is none now."""
        ...


class LeastLoaded:
    """The prefill node with the fewest outstanding tokens, the decode node with the most free head-room."""

    name = "least-loaded"

    def choose(
        self, request: PlacementRequest, cluster: ClusterView, now_s: float, rng: Random
    ) -> Decision | None:
        """See `PlacementPolicy.choose`. Ties are broken by `rng`."""
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
