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

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.node_messages import NodeLoad
from kvrelay.router.block_index import PrefixMatch
from kvrelay.router.decode_costs import HandoffCosts, Ints, StepCosts
from kvrelay.router.decode_look import DecodeLook
from kvrelay.router.fleet_slots import FleetSlots
from kvrelay.router.lazy_candidates import CandidateColumns, exclude_failed
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
    candidates: Callable[[], CandidateColumns]
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
        self._holds: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Besides, the index has a place for it."""
        self.sent: dict[AttemptId, SentSequence] = {}

    # ---- what happens ------------------------------------------------------------------------------

    def add(self, node: NodeView) -> None:
        """A node has attached."""
        slot = self.slots.add(node)
        if slot == len(self._is_open):
            for name in _COLUMNS:
                setattr(self, name, np.append(getattr(self, name), np.int64(0)))
            self._is_open = np.append(self._is_open, np.False_)
            self._holds = np.append(self._holds, np.False_)
            self.step_costs.factors.resize(self.slots.size)
            self.handoff_costs.num_slots = self.slots.size
        description = node.description
        for name in ("_set_aside", "_num_seqs", "_foreign_blocks", "_foreign_seqs"):
            getattr(self, name)[slot] = 0
        self._index_slots[slot] = self._source.index_slot(node)
        self._num_blocks[slot], self._block_size[slot] = description.num_blocks, description.block_size
        self._max_seqs[slot], self._max_tokens[slot] = description.max_num_seqs, node.max_sequence_tokens
        self._is_open[slot], self._holds[slot] = True, self._index_slots[slot] != NO_SLOT

    def remove(self, node_id: NodeId) -> None:
        """A node is lost, and all that was sent to it."""
        slot = self.slots.remove(node_id)
        self._is_open[slot] = self._holds[slot] = False
        self.step_costs.factors.forget(slot)
        self.handoff_costs.forget(slot)
        for attempt_id in [key for key, sent in self.sent.items() if sent.slot == slot]:
            del self.sent[attempt_id]

    def close(self, node_id: NodeId) -> None:
        """The node takes nothing new."""
        slot = self.slots.slot_of[node_id]
        self._is_open[slot] = self._holds[slot] = False

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

    def best_holder(self, pullable: Ints) -> tuple[NodeId | None, int]:
        """The node that has most of a prompt for others to pull, and how many leading blocks; `pullable` has
        them for all nodes of the index. None: there is no such node."""
        if not len(self._index_slots):
            return None, 0
        held = pullable[self._index_slots] * self._holds
        slot = int(held.argmax())
        return (self.slots.node_ids[slot], int(held[slot])) if held[slot] else (None, 0)

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
        seqs = self._num_seqs + self._foreign_seqs
        has_no_room = seqs >= self._max_seqs
        num_tokens = request.num_tokens + request.num_growth_tokens
        blocks_before = self._set_aside + self._foreign_blocks
        blocks = blocks_before + np.minimum(-(-num_tokens // self._block_size), self._num_blocks)
        has_no_room |= blocks > self._num_blocks
        is_too_long = request.num_tokens >= self._max_tokens
        is_able = self._is_open & ~(is_too_long | has_no_room)
        if not np.count_nonzero(is_able):
            return None
        held, growth = self._held_tokens(request, match), max(1, request.num_growth_tokens)
        step_before_s = self.step_costs.seconds(seqs, blocks_before * self._block_size)
        seqs_then = seqs + 1
        step_s = self.step_costs.seconds(seqs_then, blocks * self._block_size)
        adds_s = step_s - step_before_s
        look = DecodeLook(
            node_ids=self.slots.node_ids,
            is_open=self._is_open.copy(),
            is_too_long=is_too_long,
            has_no_room=has_no_room,
            blocks=blocks,
            seqs=seqs_then,
            max_blocks=self._num_blocks.copy(),
            max_seqs=self._max_seqs.copy(),
            held_tokens=held,
            growth=growth,
            handoff_s=self.handoff_costs.seconds(prefill_node, request.num_tokens - held),
            step_s=step_s,
            adds_s=adds_s,
            decode_s=growth * step_s,
            others_s=growth * seqs * adds_s,
        )
        return self._choice(request, look, look.score(is_able), now_s, rng)

    def _choice(
        self, request: PlacementRequest, look: DecodeLook, score: Floats, now_s: float, rng: Random
    ) -> DecodeChoice | None:
        """The best node that does not object; `score` is changed."""
        objections: dict[int, str] = {}
        exclude_failed(request, self.slots, score, objections)
        for _ in range(min(_MAX_TRIES, len(score))):
            slot = look.best(score, rng)
            if slot is None:
                return None
            node = self.slots.node(slot)
            objection = node.objection(request, now_s)
            if not objection:
                return DecodeChoice(slot, node, partial(look.columns, objections), look.held_tokens)
            score[slot] = np.inf
            objections[slot] = objection
        return None

    def _held_tokens(self, request: PlacementRequest, match: PrefixMatch | None) -> Ints:
        """Of the prompt, what each node has and need not be sent."""
        if match is None:
            return np.zeros(self.slots.size, np.int64)
        tokens: Ints = match.either[self._index_slots] * self._holds
        tokens *= self._block_size
        return np.minimum(tokens, request.num_tokens - 1, out=tokens)
