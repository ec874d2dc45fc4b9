"""The nodes as this router sees them: what they are, what they said, and what this router has on them.

Room is decided by this router's own books, which are never late; a node's reports correct them only by
refusing, which makes it count as full for a while (other routers may use the same nodes).
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import InitVar, dataclass, field

from kvrelay.core.errors import KVLayoutMismatch, NodeUnavailable, OperationalError
from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.node_messages import NodeDescription, NodeLoad, Role
from kvrelay.router.block_index import BlockIndex
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.kv_intake import KVIntake, NodeHoldings
from kvrelay.router.ledger import Attempt, Pull, Side
from kvrelay.router.placement import NodeView, PlacementRequest
from kvrelay.router.steady_run import SteadyRun
from kvrelay.router.step_timer import StepTimer

MAX_MISMATCHES = 16
"""Differences between fingerprints remembered per model; more of them tell an operator nothing new."""


def description_fault(description: NodeDescription) -> str:
    """Why a node can't be used whatever the request, or an empty string."""
    for name in ("vocab_size", "max_model_len", "num_blocks", "block_size", "max_num_seqs"):
        if getattr(description, name) < 1:
            return f"{name} must be at least 1, got {getattr(description, name)}"
    if not description.node_id or not description.model:
        return "node_id and model must not be empty"
    if description.role is Role.DECODE and not description.transfer_address:
        return "a decode node needs a transfer_address"
    return ""


@dataclass(slots=True, eq=False)
class NodeState:
    """One attached node. `in_flight` holds every attempt with an unsettled side here; the sums follow it."""

    description: NodeDescription
    config: RouterCoreConfig
    attached_s: float
    holdings: NodeHoldings
    fingerprint_digest: bytes = field(init=False)
    max_sequence_tokens: int = field(init=False)
    """The longest sequence it can ever hold."""
    is_draining: bool = False
    load: NodeLoad | None = None
    in_flight: dict[AttemptId, Attempt] = field(default_factory=dict)
    sends: dict[AttemptId, Pull] = field(default_factory=dict)
    """Unsettled pulls that it is the holder of."""
    outstanding_prefill_tokens: int = 0
    reserved_blocks: int = 0
    full_since_s: float | None = None
    num_overdue: int = 0
    steady_run: SteadyRun | None = None
    """Takes the node's next batch without a look at its rows, while it lasts."""
    steps: StepTimer = field(default_factory=StepTimer)

    def __post_init__(self) -> None:
        description = self.description
        self.fingerprint_digest = description.fingerprint.digest
        self.max_sequence_tokens = min(
            description.max_model_len, description.num_blocks * description.block_size
        )

    @property
    def num_in_flight(self) -> int:
        return len(self.in_flight)

    @property
    def slot(self) -> int | None:
        """See `NodeView`."""
        return self.holdings.slot

    @property
    def step_s(self) -> float | None:
        """See `NodeView`."""
        return self.steps.mean_s

    def blocks_for(self, request: PlacementRequest) -> int:
        """See `NodeView`."""
        num_tokens = request.num_tokens + request.num_growth_tokens
        return min(self.description.num_blocks, -(-num_tokens // self.description.block_size))

    def objection(self, request: PlacementRequest, now_s: float) -> str:
        """See `NodeView`."""
        if self.is_draining:
            return "it drains"
        if self.is_full(now_s):
            return "it refused an attempt and has reported no load since"
        if request.num_tokens >= self.max_sequence_tokens:
            return f"the sequence has {request.num_tokens} tokens, it takes {self.max_sequence_tokens}"
        if self.description.role is Role.PREFILL:
            return self._prefill_objection(request)
        return self._decode_objection(request)

    def _prefill_objection(self, request: PlacementRequest) -> str:
        if self.num_in_flight >= self.config.max_prefill_requests_per_node:
            return f"{self.num_in_flight} attempts are in flight"
        outstanding = self.outstanding_prefill_tokens
        if outstanding and outstanding + request.num_tokens > self.config.max_prefill_tokens_per_node:
            return f"{outstanding} tokens are outstanding"
        return ""

    def _decode_objection(self, request: PlacementRequest) -> str:
        if self.num_in_flight >= self.description.max_num_seqs:
            return f"{self.num_in_flight} of {self.description.max_num_seqs} sequences are in flight"
        needed, free = self.blocks_for(request), self.description.num_blocks - self.reserved_blocks
        if needed > free:
            return f"{needed} blocks are needed, {free} of {self.description.num_blocks} are not set aside"
        return ""

    def is_full(self, now_s: float) -> bool:
        """Whether a refusal still stands."""
        since_s = self.full_since_s
        return since_s is not None and now_s - since_s < self.config.max_refusal_pause_s

    def record_refusal(self, now_s: float) -> None:
        self.full_since_s = now_s

    def end_steady_run(self) -> None:
        """Have the node's next batch looked at row by row."""
        if self.steady_run is not None:
            self.steady_run.end()
            self.steady_run = None

    def record_load(self, load: NodeLoad, now_s: float) -> bool:
        """Take a load report; returns whether it lifted a refusal."""
        self.load = load
        self.steps.reset()
        since_s = self.full_since_s
        if since_s is None or now_s - since_s < self.config.refusal_pause_s:
            return False
        self.full_since_s = None
        return True

    def take(self, attempt: Attempt, side: Side) -> None:
        """Enter an attempt's side in the books."""
        self.in_flight[attempt.attempt_id] = attempt
        self.outstanding_prefill_tokens += side.num_tokens
        self.reserved_blocks += side.num_blocks

    def record_computed(self, side: Side) -> None:
        """The prefill of that side is computed; its KV is still held."""
        self.outstanding_prefill_tokens -= side.num_tokens
        side.num_tokens = 0

    def give_back(self, attempt: Attempt, side: Side) -> None:
        """Strike an attempt's settled side from the books."""
        attempt.merge.end_steady_run()
        del self.in_flight[attempt.attempt_id]
        self.outstanding_prefill_tokens -= side.num_tokens
        self.reserved_blocks -= side.num_blocks


@dataclass(frozen=True, slots=True)
class FingerprintMismatch:
    """Two nodes of one model that can't hand KV to each other, and why."""

    prefill_node: NodeId
    decode_node: NodeId
    difference: str


@dataclass(slots=True, eq=False)
class ModelState:
    """One model: its nodes, its limits, and why it can't be served now (`gap_text`, empty if it can)."""

    name: str
    nodes: dict[Role, dict[NodeId, NodeState]] = field(default_factory=lambda: {role: {} for role in Role})
    vocab_size: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    max_sequence_tokens: int = 0
    mismatches: tuple[FingerprintMismatch, ...] = ()
    gap_text: str = ""
    gap_since_s: float = 0.0
    vacant_since_s: float | None = None

    @property
    def has_nodes(self) -> bool:
        return any(self.nodes.values())

    def gap(self) -> OperationalError:
        """Why it can't be served now, as an error of its own for each request."""
        is_mismatch = self.mismatches and all(self._usable(role) for role in Role)
        return KVLayoutMismatch(self.gap_text) if is_mismatch else NodeUnavailable(self.gap_text)

    def refresh(self, now_s: float) -> None:
        """Recompute what follows from the nodes; limits stay as they were while there are none."""
        if self.has_nodes:
            self._refresh_limits()
            self.vacant_since_s = None
        else:
            self.vacant_since_s = now_s
        self.mismatches = self._find_mismatches()
        gap_text = self._find_gap()
        if gap_text and not self.gap_text:
            self.gap_since_s = now_s
        self.gap_text = gap_text

    def _usable(self, role: Role) -> list[NodeState]:
        return [node for node in self.nodes[role].values() if not node.is_draining]

    def _refresh_limits(self) -> None:
        nodes = [node for of_role in self.nodes.values() for node in of_role.values()]
        self.vocab_size = min(node.description.vocab_size for node in nodes)
        self.eos_token_ids = frozenset(nodes[-1].description.eos_token_ids)
        self.max_sequence_tokens = min(
            max(node.max_sequence_tokens for node in of_role.values())
            for of_role in self.nodes.values()
            if of_role
        )

    def _find_mismatches(self) -> tuple[FingerprintMismatch, ...]:
        """One example for each two fingerprints that differ across the roles."""
        prefill, decode = (
            {node.fingerprint_digest: node for node in self.nodes[role].values()}
            for role in (Role.PREFILL, Role.DECODE)
        )
        found: list[FingerprintMismatch] = []
        for p_digest, p_node in prefill.items():
            for d_digest, d_node in decode.items():
                if p_digest != d_digest and len(found) < MAX_MISMATCHES:
                    p, d = p_node.description, d_node.description
                    difference = p.fingerprint.difference(d.fingerprint)
                    found.append(FingerprintMismatch(p.node_id, d.node_id, difference))
        return tuple(found)

    def _find_gap(self) -> str:
        for role in Role:
            if not self.nodes[role]:
                return f"no {role} node is attached that serves model {self.name!r}"
            if not self._usable(role):
                return f"every {role} node that serves model {self.name!r} drains"
        prefill, decode = ({node.fingerprint_digest for node in self._usable(role)} for role in Role)
        if prefill & decode:
            return ""
        differences = "; ".join(
            f"{found.prefill_node} and {found.decode_node}: {found.difference}" for found in self.mismatches
        )
        return f"the prefill and decode nodes of model {self.name!r} can't exchange KV: {differences}"


@dataclass(slots=True, eq=False)
class ClusterState:
    """All attached nodes, what they hold, and all models that have nodes or had some a moment ago."""

    config: RouterCoreConfig
    intake: InitVar[KVIntake | None] = None
    kv: KVIntake = field(init=False)
    nodes: dict[NodeId, NodeState] = field(default_factory=dict)
    models: dict[str, ModelState] = field(default_factory=dict)

    def __post_init__(self, intake: KVIntake | None) -> None:
        self.kv = intake or KVIntake(self.config)

    @property
    def block_index(self) -> BlockIndex:
        """See `ClusterView`."""
        return self.kv.index

    def nodes_of(self, model: str, role: Role) -> Iterable[NodeView]:
        """See `ClusterView`."""
        state = self.models.get(model)
        return state.nodes[role].values() if state else ()

    def add_node(self, description: NodeDescription, now_s: float) -> NodeState:
        """Enter a node whose description has no `description_fault` and whose id is free."""
        assert description.node_id not in self.nodes
        holdings = self.kv.add_node(description.num_blocks, now_s)
        node = NodeState(description, self.config, now_s, holdings)
        self.nodes[description.node_id] = node
        model = self.models.setdefault(description.model, ModelState(description.model))
        model.nodes[description.role][description.node_id] = node
        model.refresh(now_s)
        return node

    def remove_node(self, node: NodeState, now_s: float) -> None:
        """Strike a node; its attempts are the caller's to settle."""
        description = node.description
        self.kv.remove_node(node.holdings)
        del self.nodes[description.node_id]
        model = self.models[description.model]
        del model.nodes[description.role][description.node_id]
        model.refresh(now_s)

    def record_drain(self, node: NodeState, now_s: float) -> None:
        """The node takes nothing new from now on."""
        node.is_draining = True
        self.models[node.description.model].refresh(now_s)

    def forget_vacant_models(self, waited_for: Container[str], now_s: float) -> None:
        """Drop models that have had no node for `node_wait_s` and that no request waits for."""
        for model in list(self.models.values()):
            since_s = model.vacant_since_s
            if since_s is None or model.name in waited_for:
                continue
            if now_s - since_s > self.config.node_wait_s:
                del self.models[model.name]
