"""The decode nodes of one fingerprint, in columns, and which of them a sequence goes to.

What runs there, what is on its way there and the growth that each was promised count alike: they are set
aside, and a node without room for all of it is out of the question. What other routers have there shows in
the node's own word of its load. Of the nodes with room the one with the least score is taken, in seconds:

- *handoff*: from the prefill's end until all KV is there. What the node holds of the prompt, from an earlier
  turn, need not be sent; and some pairs have a quicker link.
- *decode*: the expected growth, a step each, at the pace that the node will have with this sequence.
- *others*: what this sequence adds to the same number of steps of all that decode there.

Nodes that differ by less than this one sequence makes out are alike: the one that holds most gets it, then
the least full, then any. A decode node whose blocks have another size than the prefill node's counts as one
that holds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.node_messages import NodeLoad, Role
from kvrelay.router.block_index import PrefixMatch
from kvrelay.router.decode_costs import HandoffCosts, Ints, StepCosts
from kvrelay.router.fleet_slots import FleetSlots
from kvrelay.router.lazy_candidates import FAILED_BEFORE, TOO_LONG, CandidateColumns, Column
from kvrelay.router.online_fit import Floats
from kvrelay.router.placement import NodeView, PlacementRequest
from kvrelay.router.prefix_source import NO_SLOT, PrefixSource

_MAX_TRIES: Final = 8
"""Nodes whose own objection is asked for; the columns leave out those that have no room."""
_COLUMNS: Final = (
    "_index_slots", "_num_blocks", "_block_size", "_max_seqs", "_max_tokens", "_set_aside", "_num_seqs",
    "_foreign_blocks", "_foreign_seqs",
)  # fmt: skip


@dataclass(slots=True, eq=False)
class SentSequence:
    """One sequence on a decode node. `num_sent_tokens` are those whose KV must come from the prefill node."""

    slot: int
    num_blocks: int
    prefill_node: NodeId
    num_sent_tokens: int
    prefilled_s: float | None = None
    is_handed_over: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class DecodeChoice:
    """A node, all candidates as they looked, and how much of the prompt each holds, by slot."""

    slot: int
    node: NodeView
    columns: CandidateColumns
    held_tokens: Ints


class DecodeFleet:
    """See the module. Columns are by slot, ``[slots.size]``."""

    def __init__(self, source: PrefixSource) -> None:
        self.slots = FleetSlots()
        self.step_costs = StepCosts()
        self.handoff_costs = HandoffCosts()
        self._source = source
        for name in _COLUMNS:
            setattr(self, name, np.zeros(0, np.int64))
        self._index_slots: Ints
        self._num_blocks: Ints
        self._block_size: Ints
        self._max_seqs: Ints
        self._max_tokens: Ints
        self._set_aside: Ints
        self._num_seqs: Ints
        self._foreign_blocks: Ints
        self._foreign_seqs: Ints
        self._is_open: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """There is a node, and it takes new sequences."""
        self.sent: dict[AttemptId, SentSequence] = {}

    # ---- what happens ------------------------------------------------------------------------------

    def add(self, node: NodeView) -> None:
        """A node has attached."""
        slot = self.slots.add(node)
        if slot == len(self._is_open):
            for name in _COLUMNS:
                setattr(self, name, np.append(getattr(self, name), np.int64(0)))
            self._is_open = np.append(self._is_open, np.False_)
            self.step_costs.factors.resize(self.slots.size)
            self.handoff_costs.num_slots = self.slots.size
        description = node.description
        for name in _COLUMNS:
            getattr(self, name)[slot] = 0
        self._index_slots[slot] = self._source.index_slot(node)
        self._num_blocks[slot], self._block_size[slot] = description.num_blocks, description.block_size
        self._max_seqs[slot], self._max_tokens[slot] = description.max_num_seqs, node.max_sequence_tokens
        self._is_open[slot] = True

    def remove(self, node_id: NodeId) -> None:
        """A node is lost, and all that was sent to it."""
        slot = self.slots.remove(node_id)
        self._is_open[slot] = False
        self.step_costs.factors.forget(slot)
        self.handoff_costs.forget(slot)
        for attempt_id in [key for key, sent in self.sent.items() if sent.slot == slot]:
            del self.sent[attempt_id]

    def close(self, node_id: NodeId) -> None:
        """The node takes nothing new."""
        self._is_open[self.slots.slot_of[node_id]] = False

    def note_sent(
        self,
        attempt_id: AttemptId,
        node_id: NodeId,
        request: PlacementRequest,
        prefill_node: NodeId,
        num_held: int,
    ) -> None:
        """A sequence was sent to the node, which holds `num_held` tokens of it."""
        slot = self.slots.slot_of[node_id]
        num_blocks = self.slots.node(slot).blocks_for(request)
        num_sent = max(0, request.num_tokens - num_held)
        self.sent[attempt_id] = SentSequence(slot, num_blocks, prefill_node, num_sent)
        self._set_aside[slot] += num_blocks
        self._num_seqs[slot] += 1

    def note_prefilled(self, attempt_id: AttemptId, now_s: float) -> None:
        """Its KV is computed, and what has not been sent yet is sent now."""
        sent = self.sent.get(attempt_id)
        if sent is not None and sent.prefilled_s is None:
            sent.prefilled_s = now_s
            if sent.is_handed_over:  # the two nodes' words came in the other order
                self._learn_handoff(sent, 0.0)

    def note_handed_over(self, attempt_id: AttemptId, now_s: float) -> None:
        """All its KV has arrived."""
        sent = self.sent.get(attempt_id)
        if sent is None or sent.is_handed_over:
            return
        sent.is_handed_over = True
        if sent.prefilled_s is not None:
            self._learn_handoff(sent, now_s - sent.prefilled_s)

    def _learn_handoff(self, sent: SentSequence, measured_s: float) -> None:
        self.handoff_costs.observe(sent.prefill_node, sent.slot, sent.num_sent_tokens, measured_s)

    def note_gone(self, attempt_id: AttemptId) -> None:
        """The node holds nothing of it any more."""
        sent = self.sent.pop(attempt_id, None)
        if sent is not None:
            self._set_aside[sent.slot] -= sent.num_blocks
            self._num_seqs[sent.slot] -= 1

    def note_load(self, node: NodeView, load: NodeLoad) -> None:
        """What a node has beyond what this router sent, other routers sent; and its pace of late."""
        slot = self.slots.slot_of[node.description.node_id]
        self._foreign_seqs[slot] = max(0, load.num_attempts - int(self._num_seqs[slot]))
        self._foreign_blocks[slot] = max(0, load.num_held_blocks - int(self._set_aside[slot]))
        if node.step_s is not None and load.num_running:
            num_tokens = load.num_held_blocks * node.description.block_size
            self.step_costs.observe(slot, load.num_running, num_tokens, node.step_s)

    # ---- what is asked -----------------------------------------------------------------------------

    def choose(
        self,
        request: PlacementRequest,
        prefill_node: NodeId,
        match: PrefixMatch | None,
        now_s: float,
        rng: Random,
    ) -> DecodeChoice | None:
        """The node that the sequence goes to from `prefill_node`, or None when there is no room for it now.
        `match` says who holds how many of its blocks; None: that is not known."""
        num_tokens = request.num_tokens + request.num_growth_tokens
        needed = np.minimum(-(-num_tokens // np.maximum(self._block_size, 1)), self._num_blocks)
        blocks, seqs = self._set_aside + self._foreign_blocks, self._num_seqs + self._foreign_seqs
        is_too_long = request.num_tokens >= self._max_tokens
        has_no_room = (blocks + needed > self._num_blocks) | (seqs >= self._max_seqs)
        is_able = self._is_open & ~is_too_long & ~has_no_room
        if not is_able.any():
            return None
        held = self._held_tokens(request, match)
        handoff_s = self.handoff_costs.seconds(prefill_node, request.num_tokens - held)
        growth = max(1, request.num_growth_tokens)
        step_before_s = self.step_costs.seconds(seqs, blocks * self._block_size)
        step_s = self.step_costs.seconds(seqs + 1, (blocks + needed) * self._block_size)
        decode_s, others_s = growth * step_s, growth * seqs * (step_s - step_before_s)
        fullness: Floats = np.maximum(
            (blocks + needed) / np.maximum(self._num_blocks, 1), (seqs + 1) / np.maximum(self._max_seqs, 1)
        )
        columns = CandidateColumns(
            Role.DECODE,
            self.slots.node_ids,
            (("handoff_s", handoff_s), ("decode_s", decode_s), ("others_s", others_s)),
            (("itl_s", step_s), ("held_tokens", held), ("fullness", fullness)),
            (("it drains", ~self._is_open), (TOO_LONG, is_too_long), ("it has no room", has_no_room)),
        )
        score = np.where(is_able, handoff_s + decode_s + others_s, np.inf)
        adds_s = 2 * growth * (step_s - step_before_s)
        slot = self._best_slot(request, score, adds_s, columns, now_s, rng)
        return None if slot is None else DecodeChoice(slot, self.slots.node(slot), columns, held)

    def _best_slot(
        self,
        request: PlacementRequest,
        score: Floats,
        adds_s: Floats,
        columns: CandidateColumns,
        now_s: float,
        rng: Random,
    ) -> int | None:
        """The best node that does not object; `score` is changed, objections are entered in `columns`."""
        _, (_, held), (_, fullness) = columns.remarks
        failed = [self.slots.slot_of[name] for name in request.avoided if name in self.slots.slot_of]
        if np.isfinite(score[failed]).sum() < np.isfinite(score).sum():
            score[failed] = np.inf
            columns.objections.update(dict.fromkeys(failed, FAILED_BEFORE))
        for _ in range(min(_MAX_TRIES, len(score))):
            slot = _best(score, adds_s, held, fullness, rng)
            objection = "" if slot is None else self.slots.node(slot).objection(request, now_s)
            if slot is None or not objection:
                return slot
            score[slot] = np.inf
            columns.objections[slot] = objection
        return None

    def _held_tokens(self, request: PlacementRequest, match: PrefixMatch | None) -> Ints:
        """Of the prompt, what each node has and need not be sent."""
        held: Ints = np.zeros(self.slots.size, np.int64)
        if match is None:
            return held
        is_indexed = self._is_open & (self._index_slots != NO_SLOT)
        held[is_indexed] = match.either[self._index_slots[is_indexed]]
        tokens: Ints = np.minimum(held * self._block_size, request.num_tokens - 1)
        return tokens


def _best(score: Floats, adds_s: Floats, held: Column, fullness: Column, rng: Random) -> int | None:
    """Of the least scores, within what one sequence makes out, the one with most held, then the least full,
    then one at random."""
    least = int(score.argmin())
    if not np.isfinite(score[least]):
        return None
    near = np.flatnonzero(score <= score[least] + adds_s[least])
    near = near[held[near] == held[near].max()]
    near = near[fullness[near] <= fullness[near].min() + 1e-12]
    return int(near[rng.randrange(len(near))]) if len(near) > 1 else int(near[0])
