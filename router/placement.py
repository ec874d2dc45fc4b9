"""Choosing a (prefill, decode) pair for a request: the interface of every policy.

A policy sees requests and nodes through read-only protocols, decides, and shows its work: every candidate
with every term of its score, so that a decision can be asked about afterwards.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.explanation import Candidate as Candidate
from kvrelay.core.explanation import Decision as Decision
from kvrelay.core.ids import AttemptId, NodeId, RequestId
from kvrelay.core.node_messages import HandoffVerified, NodeDescription, NodeLoad, PrefillFinished, Role
from kvrelay.router.block_index import BlockIndex
from kvrelay.router.block_keys import PromptBlocks


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What a policy may know of a request.

    `token_ids` is the prompt plus the output delivered so far, `blocks` their keys in the block index;
    `num_growth_tokens` is the output to set aside room for. Nodes in `avoided` failed this request before.
    `submitted_s` is when it came, on the router's clock.
    """

    request_id: RequestId
    model: str
    token_ids: Sequence[int]
    num_growth_tokens: int
    cache_salt: bytes = b""
    avoided: frozenset[NodeId] = frozenset()
    submitted_s: float = 0.0
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
    def max_sequence_tokens(self) -> int:
        """The longest sequence it can ever hold."""
        ...

    @property
    def is_draining(self) -> bool: ...

    @property
    def load(self) -> NodeLoad | None: ...

    @property
    def step_s(self) -> float | None:
        """Mean seconds of its decode steps since its last load report, between steps of the same sequences;
        None: there were none."""
        ...

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


class WaitingRequests(Protocol):
    """The requests of one model that wait, oldest first. `len` may count some that are not to start yet."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[PlacementRequest]: ...


class PlacementPolicy(Protocol):
    """Decides which waiting request starts next, and where; holds no resources. It may learn from what it is
    told between decisions (`note_...`), deterministically."""

    @property
    def name(self) -> str: ...

    @property
    def look_again_s(self) -> float:
        """When `pick`, which has just picked nothing, may pick something though nothing happened but that
        time passed; infinite: it is enough to ask when something changed."""
        ...

    def pick(self, waiting: WaitingRequests, cluster: ClusterView, now_s: float, rng: Random) -> Pick | None:
        """One of the waiting requests of one model, oldest first, with a pair of equal fingerprints and no
        objection; None: nothing is to start now. Asked again after each placement, and whenever something
        changed that may let a request start."""
        ...

    def note_attached(self, node: NodeView, now_s: float) -> None:
        """The node can be placed on from now on."""
        ...

    def note_lost(self, node: NodeView) -> None:
        """The node is gone, with all it held."""
        ...

    def note_draining(self, node: NodeView) -> None:
        """The node takes nothing new any more."""
        ...

    def note_load(self, node: NodeView, load: NodeLoad) -> None:
        """The node said how busy it is."""
        ...

    def note_placed(
        self, attempt_id: AttemptId, request: PlacementRequest, decision: Decision, now_s: float
    ) -> None:
        """An attempt was dispatched to the pair of `decision`."""
        ...

    def note_prefilled(self, node: NodeView, reports: Sequence[PrefillFinished], now_s: float) -> None:
        """Prefills are computed, all in the step that has just ended; of attempts that may have come to
        nothing meanwhile."""
        ...

    def note_handed_over(self, node: NodeView, report: HandoffVerified, now_s: float) -> None:
        """A decode node has all the KV of an attempt."""
        ...

    def note_settled(self, node_id: NodeId, attempt_id: AttemptId, now_s: float) -> None:
        """The node holds nothing of the attempt any more, whatever became of it."""
        ...


@dataclass(frozen=True, slots=True)
class Pick:
    """The request that is to start, and where."""

    request: PlacementRequest
    decision: Decision


class FirstComePolicy(ABC):
    """A `PlacementPolicy` that takes requests in order, learns nothing, and chooses the pair by `choose`."""

    look_again_s: float = math.inf

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def choose(
        self, request: PlacementRequest, cluster: ClusterView, now_s: float, rng: Random
    ) -> Decision | None:
        """A pair with equal fingerprints and no objection, or None when there is none now."""

    def pick(self, waiting: WaitingRequests, cluster: ClusterView, now_s: float, rng: Random) -> Pick | None:
        """See `PlacementPolicy.pick`: the first that can start. Only a request that waits for other nodes
        than those which failed it lets later ones pass."""
        for request in waiting:
            decision = self.choose(request, cluster, now_s, rng)
            if decision is not None:
                return Pick(request, decision)
            if not request.avoided:
                return None
        return None

    # What follows is told to every policy; this one need not know. See `PlacementPolicy`.

    def note_attached(self, node: NodeView, now_s: float) -> None:
        return

    def note_lost(self, node: NodeView) -> None:
        return

    def note_draining(self, node: NodeView) -> None:
        return

    def note_load(self, node: NodeView, load: NodeLoad) -> None:
        return

    def note_placed(
        self, attempt_id: AttemptId, request: PlacementRequest, decision: Decision, now_s: float
    ) -> None:
        return

    def note_prefilled(self, node: NodeView, reports: Sequence[PrefillFinished], now_s: float) -> None:
        return

    def note_handed_over(self, node: NodeView, report: HandoffVerified, now_s: float) -> None:
        return

    def note_settled(self, node_id: NodeId, attempt_id: AttemptId, now_s: float) -> None:
        return
