"""What policies share that keep columns of all nodes: which fleets there are, and what happens to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, TypeVar

from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.node_messages import HandoffVerified, NodeLoad, PrefillFinished, Role
from kvrelay.router.block_index import BlockKeys, PrefixMatch
from kvrelay.router.decode_fleet import DecodeChoice, DecodeFleet
from kvrelay.router.placement import ClusterView, Decision, FirstComePolicy, NodeView, PlacementRequest
from kvrelay.router.prefill_fleet import PrefillFleet, SentPrefill
from kvrelay.router.prefix_source import PrefixSource

Kind = TypeVar("Kind")
Fleet = TypeVar("Fleet", PrefillFleet, DecodeFleet)

_MAX_EMPTY_FLEETS: Final = 16


@dataclass(frozen=True, slots=True)
class PlannedPrefill:
    """What a policy knew of the prompt that it placed last: `note_placed` enters it into the books."""

    slot: int
    num_new_tokens: int
    work_s: float
    num_new_blocks: int
    keys: BlockKeys


class FleetPolicy(FirstComePolicy):
    """Keeps a fleet for each kind of nodes of each model. A policy sets `planned` with each decision."""

    def __init__(self, source: PrefixSource) -> None:
        self._source = source
        self._prefill: dict[tuple[str, bytes, int], PrefillFleet] = {}
        self._decode: dict[tuple[str, bytes], DecodeFleet] = {}
        self.planned: PlannedPrefill | None = None
        self.num_changes = 0
        """Of what the prefill fleets are busy with."""
        self.num_held_tokens = 0
        """Of the prompt that was placed last, what its decode node holds."""

    def fleets(self, model: str) -> Iterator[tuple[PrefillFleet, DecodeFleet]]:
        """The fleets of a model that can hand KV to each other, in an order that does not change."""
        for (of_model, digest, _), prefill in self._prefill.items():
            decode = self._decode.get((of_model, digest)) if of_model == model else None
            if decode is not None and prefill.num_open and decode.slots.num_nodes:
                yield prefill, decode

    def reconsider(self) -> None:
        """Nodes came or went, or take nothing new: what waits for one of them may want another."""

    @property
    def num_tracked(self) -> int:
        """Sides of attempts that the fleets count as being on a node."""
        num_prefill = sum(len(fleet.sent) for fleet in self._prefill.values())
        return num_prefill + sum(len(fleet.sent) for fleet in self._decode.values())

    def choose_decode(
        self,
        fleet: DecodeFleet,
        request: PlacementRequest,
        prefill_node: NodeId,
        match: PrefixMatch | None,
        now_s: float,
        rng: Random,
    ) -> DecodeChoice | None:
        """The decode node for a request; all policies here choose it alike."""
        choice = fleet.choose(request, prefill_node, match, now_s, rng)
        self.num_held_tokens = 0 if choice is None else int(choice.held_tokens[choice.slot])
        return choice

    # ---- see `PlacementPolicy` ---------------------------------------------------------------------

    def note_attached(self, node: NodeView, now_s: float) -> None:
        self._note_membership()
        description = node.description
        model, digest = description.model, node.fingerprint_digest
        if description.role is Role.DECODE:
            self._decode.setdefault((model, digest), DecodeFleet(self._source)).add(node)
            return
        key = model, digest, description.block_size
        if key not in self._prefill:
            self._prefill[key] = PrefillFleet(description.block_size, self._source)
        self._prefill[key].add(node)

    def note_lost(self, node: NodeView) -> None:
        self._note_membership()
        self._fleet_of(node).remove(node.description.node_id)
        for fleet in self._prefill.values():
            fleet.failed_pulls.forget(node.description.node_id)
        _drop_oldest_empty(self._prefill)
        _drop_oldest_empty(self._decode)

    def note_load(self, node: NodeView, load: NodeLoad) -> None:
        fleet = self._fleet_of(node)
        if isinstance(fleet, PrefillFleet):
            self.num_changes += fleet.note_load(node.description.node_id, load)
        else:
            fleet.note_load(node, load)

    def note_draining(self, node: NodeView) -> None:
        self._note_membership()
        self._fleet_of(node).close(node.description.node_id)

    def note_placed(
        self, attempt_id: AttemptId, request: PlacementRequest, decision: Decision, now_s: float
    ) -> None:
        planned = self.planned
        assert planned is not None
        self.num_changes += 1
        prefill = self._prefill_with(decision.prefill_node)
        assert prefill is not None
        sent = SentPrefill(
            planned.slot,
            request.num_tokens,
            planned.num_new_tokens,
            planned.work_s,
            planned.num_new_blocks,
            planned.keys,
            now_s,
            decision.pull_from,
        )
        prefill.note_sent(attempt_id, sent, now_s)
        decode = self._decode_with(decision.decode_node)
        assert decode is not None
        decode.note_sent(
            attempt_id, decision.decode_node, request, decision.prefill_node, self.num_held_tokens
        )

    def note_prefilled(self, node: NodeView, reports: Sequence[PrefillFinished], now_s: float) -> None:
        fleet = self._fleet_of(node)
        if isinstance(fleet, PrefillFleet):
            self.num_changes += 1
            fleet.note_computed(node.description.node_id, reports, now_s)
            for report in reports:
                fleet.pull_costs.observe(report.num_pulled_tokens, report.pull_s)
                for decode in self._decode.values():
                    decode.note_prefilled(report.attempt, now_s)

    def note_handed_over(self, node: NodeView, report: HandoffVerified, now_s: float) -> None:
        fleet = self._fleet_of(node)
        if isinstance(fleet, DecodeFleet):
            fleet.note_handed_over(report.attempt, now_s)

    def note_pulled(self, node_id: NodeId, num_tokens: int, seconds: float) -> None:
        """A prefill node pulled the KV of so many tokens before it computed the rest."""
        fleet = self._prefill_with(node_id)
        if fleet is not None:
            fleet.pull_costs.observe(num_tokens, seconds)

    def note_settled(self, node_id: NodeId, attempt_id: AttemptId, now_s: float) -> None:
        prefill = self._prefill_with(node_id)
        if prefill is not None:
            self.num_changes += attempt_id in prefill.sent
            prefill.note_gone(attempt_id, now_s)
        else:
            decode = self._decode_with(node_id)
            if decode is not None:
                decode.note_gone(attempt_id)

    def _note_membership(self) -> None:
        self.num_changes += 1
        self.reconsider()

    # ---- finding fleets ----------------------------------------------------------------------------

    def _prefill_with(self, node_id: NodeId) -> PrefillFleet | None:
        return next((fleet for fleet in self._prefill.values() if node_id in fleet.slots.slot_of), None)

    def _decode_with(self, node_id: NodeId) -> DecodeFleet | None:
        return next((fleet for fleet in self._decode.values() if node_id in fleet.slots.slot_of), None)

    def _fleet_of(self, node: NodeView) -> PrefillFleet | DecodeFleet:
        description = node.description
        if description.role is Role.DECODE:
            return self._decode[description.model, node.fingerprint_digest]
        return self._prefill[description.model, node.fingerprint_digest, description.block_size]


def _drop_oldest_empty(fleets: dict[Kind, Fleet]) -> None:
    """What was learned of nodes outlives them, for the next of their kind, within bounds."""
    empty = [kind for kind, fleet in fleets.items() if not fleet.slots.num_nodes]
    if len(empty) > _MAX_EMPTY_FLEETS:
        del fleets[empty[0]]


class SingleFleetPolicy(FleetPolicy):
    """A policy that chooses a prefill node alone, by `choose_prefill`, in the first fleet that can serve."""

    def choose_prefill(
        self, request: PlacementRequest, fleet: PrefillFleet, now_s: float, rng: Random
    ) -> PrefillChoice:
        """The prefill node; its objections are not asked for."""
        raise NotImplementedError

    def choose(
        self, request: PlacementRequest, cluster: ClusterView, now_s: float, rng: Random
    ) -> Decision | None:
        """See `FirstComePolicy.choose`."""
        for prefill, decode in self.fleets(request.model):
            match_choice = self.choose_prefill(request, prefill, now_s, rng)
            node = prefill.slots.node(match_choice.planned.slot)
            prefill_node = node.description.node_id
            decode_choice = self.choose_decode(decode, request, prefill_node, None, now_s, rng)
            if decode_choice is None or node.objection(request, now_s):
                continue
            self.planned = match_choice.planned
            return Decision(
                prefill_node=prefill_node,
                decode_node=decode_choice.node.description.node_id,
                candidates=(),
                policy=self.name,
                pull_from=match_choice.pull_from,
                num_pull_tokens=match_choice.num_pull_tokens,
            )
        return None


@dataclass(frozen=True, slots=True)
class PrefillChoice:
    """A prefill node, and from where it is to pull how much of the prefix (None: from nobody)."""

    planned: PlannedPrefill
    pull_from: NodeId | None = None
    num_pull_tokens: int = 0
