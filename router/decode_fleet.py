"""The decode nodes of one fingerprint, in columns, and which of them a sequence goes to.

What runs there, what is on its way there and the growth that each was promised count alike: they are set
aside. A node is as full as the scarcer of its two rooms, KV blocks and places in the batch; the step time,
and with it ITL, grows with both. Between nodes whose fullness differs by less than this one sequence adds,
the one that needs least KV sent is better.
"""

from __future__ import annotations

from random import Random
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.node_messages import Role
from kvrelay.router.block_index import PrefixMatch
from kvrelay.router.fleet_slots import FleetSlots
from kvrelay.router.lazy_candidates import CandidateColumns
from kvrelay.router.online_fit import Floats
from kvrelay.router.placement import NodeView, PlacementRequest
from kvrelay.router.prefix_source import PrefixSource

Ints = NDArray[np.int64]

_MAX_TRIES: Final = 8
"""Nodes whose own objection is asked for; the columns leave out those that have no room."""


class DecodeFleet:
    """See the module. Columns are by slot, ``[slots.size]``."""

    def __init__(self, source: PrefixSource) -> None:
        self.slots = FleetSlots()
        self._source = source
        self._index_slots: Ints = np.zeros(0, np.int64)
        self._num_blocks: Ints = np.zeros(0, np.int64)
        self._block_size: Ints = np.zeros(0, np.int64)
        self._max_seqs: Ints = np.zeros(0, np.int64)
        self._set_aside: Ints = np.zeros(0, np.int64)
        self._num_seqs: Ints = np.zeros(0, np.int64)
        self._is_present: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._sent: dict[AttemptId, tuple[int, int]] = {}

    def add(self, node: NodeView) -> None:
        """A node has attached."""
        slot = self.slots.add(node)
        if slot == len(self._is_present):
            for name in (
                "_index_slots",
                "_num_blocks",
                "_block_size",
                "_max_seqs",
                "_set_aside",
                "_num_seqs",
            ):
                setattr(self, name, np.append(getattr(self, name), np.int64(0)))
            self._is_present = np.append(self._is_present, np.False_)
        description = node.description
        self._index_slots[slot] = self._source.index_slot(description.node_id)
        self._num_blocks[slot], self._block_size[slot] = description.num_blocks, description.block_size
        self._max_seqs[slot] = description.max_num_seqs
        self._set_aside[slot] = self._num_seqs[slot] = 0
        self._is_present[slot] = True

    def remove(self, node_id: NodeId) -> None:
        """A node is lost, and all that was sent to it."""
        slot = self.slots.remove(node_id)
        self._is_present[slot] = False
        for attempt_id in [key for key, (of_slot, _) in self._sent.items() if of_slot == slot]:
            del self._sent[attempt_id]

    def note_sent(self, attempt_id: AttemptId, node_id: NodeId, request: PlacementRequest) -> None:
        """A sequence was sent to the node."""
        slot = self.slots.slot_of[node_id]
        num_blocks = self.slots.node(slot).blocks_for(request)
        self._sent[attempt_id] = slot, num_blocks
        self._set_aside[slot] += num_blocks
        self._num_seqs[slot] += 1

    def note_gone(self, attempt_id: AttemptId) -> None:
        """The node holds nothing of it any more."""
        sent = self._sent.pop(attempt_id, None)
        if sent is not None:
            self._set_aside[sent[0]] -= sent[1]
            self._num_seqs[sent[0]] -= 1

    def choose(
        self, request: PlacementRequest, match: PrefixMatch | None, now_s: float, rng: Random
    ) -> DecodeChoice | None:
        """The node that the sequence goes to, or None when there is no room for it now. `match` says who
        holds how many of its blocks; None: that is not known."""
        num_tokens = request.num_tokens + request.num_growth_tokens
        needed = np.minimum(-(-num_tokens // np.maximum(self._block_size, 1)), self._num_blocks)
        blocks_after, seqs_after = self._set_aside + needed, self._num_seqs + 1
        has_room = self._is_present & (blocks_after <= self._num_blocks) & (seqs_after <= self._max_seqs)
        adds = np.maximum(needed / np.maximum(self._num_blocks, 1), 1 / np.maximum(self._max_seqs, 1))
        fullness: Floats = np.maximum(
            blocks_after / np.maximum(self._num_blocks, 1), seqs_after / np.maximum(self._max_seqs, 1)
        )
        score = np.where(has_room, fullness, np.inf)
        held = self._held_tokens(match)
        for _ in range(min(_MAX_TRIES, len(score))):
            slot = _best(score, held, adds, rng)
            if slot is None:
                return None
            node = self.slots.node(slot)
            if node.description.node_id in request.avoided and has_room.sum() > 1:
                score[slot] = np.inf
                has_room[slot] = False
                continue
            if not node.objection(request, now_s):
                return DecodeChoice(slot, node, self._columns(fullness, held))
            score[slot] = np.inf
        return None

    def _held_tokens(self, match: PrefixMatch | None) -> Ints:
        """Of the prompt, what each node has and need not be sent."""
        if match is None:
            return np.zeros(self.slots.size, np.int64)
        return match.either[self._index_slots].astype(np.int64) * self._block_size

    def _columns(self, fullness: Floats, held: Ints) -> CandidateColumns:
        return CandidateColumns(
            Role.DECODE, self.slots.node_ids, (("fullness", fullness),), (("held_tokens", held),)
        )


class DecodeChoice:
    """A node, and all candidates as they looked."""

    __slots__ = ("columns", "node", "slot")

    def __init__(self, slot: int, node: NodeView, columns: CandidateColumns) -> None:
        self.slot = slot
        self.node = node
        self.columns = columns


def _best(score: Floats, held: Ints, adds: Floats, rng: Random) -> int | None:
    """Of the least full, within what one sequence adds, the one with most held; then at random."""
    least = int(score.argmin()) if len(score) else 0
    if not len(score) or not np.isfinite(score[least]):
        return None
    near = score <= score[least] + adds[least]
    most = held[near].max()
    if most > 0:
        ties = np.flatnonzero(near & (held == most))
        return int(ties[score[ties].argmin()])
    ties = np.flatnonzero(score <= score[least] + 1e-12)
    return int(ties[rng.randrange(len(ties))]) if len(ties) > 1 else int(ties[0])
