"""The prefill nodes of one fingerprint and block size, in columns: how busy each is, what it will hold.

A node computes its prompts in order. So what it has still to do is what was sent and not reported computed,
less the time since the foremost of these started; what other routers sent it shows in its own word of what
waits there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.node_messages import NodeLoad, PrefillFinished
from kvrelay.router.block_index import PrefixMatch
from kvrelay.router.fleet_slots import FleetSlots
from kvrelay.router.learned_costs import PrefillCosts, PullCosts
from kvrelay.router.online_fit import Floats
from kvrelay.router.placement import NodeView, PlacementRequest
from kvrelay.router.prefix_source import PrefixSource
from kvrelay.router.routed_prefixes import RoutedPrefixes

Ints = NDArray[np.int64]


_COUNT_COLUMNS: Final = (
    "index_slots",
    "inserted_blocks",
    "num_pending",
    "pending_tokens",
    "pending_new_tokens",
    "pending_blocks",
)


@dataclass(frozen=True, slots=True)
class SentPrefill:
    """One prompt on its way through a node. `work_s` is what it was expected to keep the node busy."""

    slot: int
    num_tokens: int
    num_new_tokens: int
    work_s: float
    num_new_blocks: int
    """Those that its cache will have to make room for."""
    keys: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class HeldBlocks:
    """Leading blocks of a chain by slot: `now` in a cache that others can pull from, `later` when all that
    was sent to the node is computed. `match` is the index's own word."""

    match: PrefixMatch
    now: Ints
    later: Ints


class PrefillFleet:
    """See the module. Columns are by slot, ``[slots.size]``; read only for policies."""

    def __init__(self, block_size: int, source: PrefixSource) -> None:
        self.block_size = block_size
        self.slots = FleetSlots()
        self.costs = PrefillCosts(0)
        self.pull_costs = PullCosts()
        self.index_slots: Ints = np.zeros(0, np.int64)
        self.num_pending: Ints = np.zeros(0, np.int64)
        """Prompts sent and not computed."""
        self.pending_tokens: Ints = np.zeros(0, np.int64)
        self.pending_new_tokens: Ints = np.zeros(0, np.int64)
        self.pending_blocks: Ints = np.zeros(0, np.int64)
        self.inserted_blocks: Ints = np.zeros(0, np.int64)
        """All that each node's cache was ever made to take in by this router. Caches drop what they used
        longest ago, so where this grows alike, no cache drops what another would keep."""
        self.is_present: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.sent: dict[AttemptId, SentPrefill] = {}
        self._pending_s: Floats = np.zeros(0)
        self._end_s: Floats = np.zeros(0)
        self._foreign_tokens: Floats = np.zeros(0)
        self._source = source
        self._routed = RoutedPrefixes()

    # ---- what is asked -----------------------------------------------------------------------------

    def keys(self, request: PlacementRequest) -> Sequence[int]:
        """The keys of the request's blocks, as these nodes have them."""
        return self._source.keys(request, self.slots.node(next(iter(self.slots.slot_of.values()))))

    def held_blocks(self, keys: Sequence[int]) -> HeldBlocks:
        """How much of a chain of blocks the nodes have."""
        match = self._source.match_prefix(keys)
        now = match.device[self.index_slots]
        later = match.either[self.index_slots].astype(np.int64)
        self._routed.raise_blocks(later, keys)
        return HeldBlocks(match, now.astype(np.int64), later)

    def backlog_s(self, now_s: float) -> Floats:
        """Seconds until each node would start what is sent to it now; infinite where there is no node. One
        that takes longer than expected is taken to need as much more as expectations are off by."""
        overrun_s = self.costs.relative_error * self._pending_s
        left: Floats = np.where(self.num_pending > 0, np.maximum(self._end_s - now_s, overrun_s), 0.0)
        if self._foreign_tokens.any():
            left = left + self._foreign_tokens * self.costs.token_seconds
        left[~self.is_present] = np.inf
        return left

    # ---- what happens ------------------------------------------------------------------------------

    def add(self, node: NodeView) -> None:
        """A node has attached."""
        slot = self.slots.add(node)
        if slot == len(self.is_present):
            self._grow()
        self.index_slots[slot] = self._source.index_slot(node.description.node_id)
        self.inserted_blocks[slot] = self.inserted_blocks[self.is_present].min(initial=2**62)
        if not self.is_present.any():
            self.inserted_blocks[slot] = 0
        self.is_present[slot] = True

    def remove(self, node_id: NodeId) -> None:
        """A node is lost, and all that was sent to it."""
        slot = self.slots.remove(node_id)
        for attempt_id in [key for key, sent in self.sent.items() if sent.slot == slot]:
            self._routed.remove(attempt_id, self.sent.pop(attempt_id).keys)
        self.costs.forget(slot)
        self.is_present[slot] = False
        for column in (self.num_pending, self.pending_tokens, self.pending_new_tokens, self.pending_blocks):
            column[slot] = 0
        for times in (self._pending_s, self._end_s, self._foreign_tokens):
            times[slot] = 0.0

    def note_sent(self, attempt_id: AttemptId, sent: SentPrefill, now_s: float) -> None:
        """A prompt was sent to the node in `sent.slot`."""
        slot = sent.slot
        start_s = max(float(self._end_s[slot]), now_s) if self.num_pending[slot] else now_s
        self._end_s[slot] = start_s + sent.work_s
        self._pending_s[slot] += sent.work_s
        self.sent[attempt_id] = sent
        self.inserted_blocks[slot] += sent.num_new_blocks
        self._count(sent, 1)
        self._routed.add(attempt_id, slot, sent.keys)

    def note_computed(self, report: PrefillFinished, now_s: float) -> None:
        """A prompt is computed: learn from it, and take the node to start its next one now."""
        sent = self.sent.get(report.attempt)
        if sent is None:
            return
        num_cached = min(report.num_cached_tokens, sent.num_tokens)
        self.costs.observe(sent.slot, sent.num_tokens - num_cached, num_cached, report.compute_s)
        self.note_gone(report.attempt, now_s)

    def note_gone(self, attempt_id: AttemptId, now_s: float) -> None:
        """The node does not compute it any more, if it did."""
        sent = self.sent.pop(attempt_id, None)
        if sent is None:
            return
        slot = sent.slot
        self._count(sent, -1)
        left_s = float(self._pending_s[slot]) - sent.work_s if self.num_pending[slot] else 0.0
        self._pending_s[slot] = left_s
        self._end_s[slot] = now_s + left_s
        self._routed.remove(attempt_id, sent.keys)

    def note_load(self, node_id: NodeId, load: NodeLoad) -> None:
        """What waits on a node beyond what this router sent, other routers sent."""
        slot = self.slots.slot_of[node_id]
        self._foreign_tokens[slot] = max(0, load.num_waiting_tokens - int(self.pending_tokens[slot]))

    def _count(self, sent: SentPrefill, sign: int) -> None:
        slot = sent.slot
        self.num_pending[slot] += sign
        self.pending_tokens[slot] += sign * sent.num_tokens
        self.pending_new_tokens[slot] += sign * sent.num_new_tokens
        self.pending_blocks[slot] += sign * -(-sent.num_tokens // self.block_size)

    def _grow(self) -> None:
        size = self.slots.size
        for name in _COUNT_COLUMNS:
            setattr(self, name, np.append(getattr(self, name), np.int64(0)))
        for name in ("_pending_s", "_end_s", "_foreign_tokens"):
            setattr(self, name, np.append(getattr(self, name), 0.0))
        self.is_present = np.append(self.is_present, np.False_)
        self.costs.resize(size)
