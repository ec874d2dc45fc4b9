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
from kvrelay.router.block_index import BlockKeys, PrefixMatch
from kvrelay.router.failed_pulls import FailedPulls
from kvrelay.router.fleet_slots import FleetSlots
from kvrelay.router.learned_costs import PrefillCosts, PullCosts
from kvrelay.router.online_fit import Floats
from kvrelay.router.placement import NodeView, PlacementRequest
from kvrelay.router.prefix_source import NO_SLOT, PrefixSource
from kvrelay.router.routed_prefixes import RoutedPrefixes

Ints = NDArray[np.int64]


_COUNT_COLUMNS: Final = (
    "index_slots",
    "max_tokens",
    "inserted_blocks",
    "num_pending",
    "pending_tokens",
    "pending_new_tokens",
    "pending_blocks",
)


_OVERHEAD_WEIGHT: Final = 0.1
_MIN_LEAD_S: Final = 0.002
"""A node that has less than this to do counts as idle: its next prompt must reach it before it is. More costs
hits, as waiting prompts are bound before it is known what will be free."""
_MAX_JOINED: Final = 8
"""Prompts whose time is mostly the constant that each step costs are sent in such numbers, about, before the
node is idle: it computes in one step what waits there, and a cache would save little."""


@dataclass(frozen=True, slots=True)
class SentPrefill:
    """One prompt on its way through a node. `work_s` is what it was expected to keep the node busy."""

    slot: int
    num_tokens: int
    num_new_tokens: int
    work_s: float
    num_new_blocks: int
    """Those that its cache will have to make room for."""
    keys: BlockKeys
    sent_s: float
    pull_from: NodeId | None = None


@dataclass(frozen=True, slots=True, eq=False)
class HeldBlocks:
    """Leading blocks of a chain by slot: `now` in a cache that others can pull from (0 where they can't),
    `later` when all that was sent to the node is computed. `match` is the index's own word."""

    match: PrefixMatch
    now: Ints
    later: Ints
    pullable: Ints
    """As `now`, of all nodes of the index and by their places there."""


class PrefillFleet:
    """See the module. Columns are by slot, ``[slots.size]``; read only for policies."""

    def __init__(self, block_size: int, source: PrefixSource) -> None:
        self.block_size = block_size
        self.slots = FleetSlots()
        self.costs = PrefillCosts(0)
        self.pull_costs = PullCosts()
        self.index_slots: Ints = np.zeros(0, np.int64)
        self.max_tokens: Ints = np.zeros(0, np.int64)
        """A sequence must be shorter."""
        self.num_pending: Ints = np.zeros(0, np.int64)
        """Prompts sent and not computed."""
        self.pending_tokens: Ints = np.zeros(0, np.int64)
        self.pending_new_tokens: Ints = np.zeros(0, np.int64)
        self.pending_blocks: Ints = np.zeros(0, np.int64)
        self.inserted_blocks: Ints = np.zeros(0, np.int64)
        """All that each node's cache was ever made to take in by this router. Caches drop what they used
        longest ago, so where this grows alike, no cache drops what another would keep."""
        self.is_open: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """There is a node, and it takes new prompts."""
        self.num_open = 0
        self.num_behind = 0
        """Prompts sent and not computed that have another one before them."""
        self.can_pull: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """It can take KV from other nodes, and give it to them."""
        self.overhead_s = 0.0
        """What a first token takes beyond what its node waits and computes, lately: messages to and fro."""
        self.sent: dict[AttemptId, SentPrefill] = {}
        self._pending_s: Floats = np.zeros(0)
        self._end_s: Floats = np.zeros(0)
        """When what was sent is expected to be computed; of a node with nothing to do, long ago."""
        self._closed_s: Floats = np.zeros(0)
        """Infinite where no node takes new prompts, else 0."""
        self._is_indexed: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._can_give: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._foreign_tokens: Floats = np.zeros(0)
        self._has_foreign = False
        self._source = source
        self.failed_pulls = FailedPulls()
        self._routed = RoutedPrefixes()

    # ---- what is asked -----------------------------------------------------------------------------

    @property
    def lead_s(self) -> float:
        """How long before a node is idle its next prompt is sent: what messages take, at least."""
        return max(_MIN_LEAD_S, self.overhead_s)

    @property
    def longest_lead_s(self) -> float:
        """The same for prompts that are short enough to be computed together."""
        return max(self.lead_s, _MAX_JOINED * self.costs.base_seconds)

    def lead_for(self, work_s: float) -> float:
        """The one or the other, for a prompt that takes so long."""
        return self.longest_lead_s if work_s <= 2.0 * self.costs.base_seconds else self.lead_s

    def keys(self, request: PlacementRequest) -> BlockKeys:
        """The keys of the request's blocks, as these nodes have them."""
        return self._source.keys(request, self.slots.node(next(iter(self.slots.slot_of.values()))))

    def held_blocks(self, keys: BlockKeys) -> HeldBlocks:
        """How much of a chain of blocks the nodes have."""
        match = self._source.match_prefix(keys)
        pullable = self._source.pullable(match)
        now = pullable[self.index_slots] * self._can_give
        later = match.either[self.index_slots] * self._is_indexed
        self._routed.raise_blocks(later, keys)
        return HeldBlocks(match, now, later, pullable)

    def backlog_s(self, now_s: float) -> Floats:
        """Seconds until each node would start what is sent to it now; infinite where none takes any. One
        that takes longer than expected is taken to need as much more as expectations are off by."""
        expected_s = self._end_s - now_s
        overrun_s = self.costs.relative_error * self._pending_s
        left: Floats = np.where(expected_s > 0.0, expected_s, overrun_s)
        if self._has_foreign:
            left += self._foreign_tokens * self.costs.token_seconds
        left += self._closed_s
        return left

    # ---- what happens ------------------------------------------------------------------------------

    def add(self, node: NodeView) -> None:
        """A node has attached."""
        slot = self.slots.add(node)
        if slot == len(self.is_open):
            self._grow()
        self.index_slots[slot] = self._source.index_slot(node)
        self.max_tokens[slot] = node.max_sequence_tokens
        self.can_pull[slot] = bool(node.description.transfer_address)
        self.inserted_blocks[slot] = self.inserted_blocks[self.is_open].min(initial=2**62)
        if not self.is_open.any():
            self.inserted_blocks[slot] = 0
        self._is_indexed[slot] = self.index_slots[slot] != NO_SLOT
        self._can_give[slot] = self._is_indexed[slot] and self.can_pull[slot]
        self._note_open(slot, True)

    def remove(self, node_id: NodeId) -> None:
        """A node is lost, and all that was sent to it."""
        slot = self.slots.remove(node_id)
        for attempt_id in [key for key, sent in self.sent.items() if sent.slot == slot]:
            self._routed.remove(attempt_id, self.sent.pop(attempt_id).keys)
        self.costs.forget(slot)
        self.num_behind -= max(0, int(self.num_pending[slot]) - 1)
        self.index_slots[slot] = NO_SLOT
        self._is_indexed[slot] = self._can_give[slot] = False
        self._note_open(slot, False)
        for column in (self.num_pending, self.pending_tokens, self.pending_new_tokens, self.pending_blocks):
            column[slot] = 0
        self._pending_s[slot], self._end_s[slot] = 0.0, -np.inf
        self._note_foreign(slot, 0)

    def close(self, node_id: NodeId) -> None:
        """The node takes nothing new."""
        self._note_open(self.slots.slot_of[node_id], False)

    def note_sent(self, attempt_id: AttemptId, sent: SentPrefill, now_s: float) -> None:
        """A prompt was sent to the node in `sent.slot`."""
        slot = sent.slot
        self._end_s[slot] = max(float(self._end_s[slot]), now_s) + sent.work_s
        self._pending_s[slot] += sent.work_s
        self.sent[attempt_id] = sent
        self.inserted_blocks[slot] += sent.num_new_blocks
        self._count(sent, 1)
        self._routed.add(attempt_id, slot, sent.keys)

    def note_computed(self, node_id: NodeId, reports: Sequence[PrefillFinished], now_s: float) -> None:
        """These prompts of one node are computed, all in the step that has just ended: learn from them, and
        take the node to start what is next now."""
        slot = self.slots.slot_of[node_id]
        of_attempt = ((report, self.sent.get(report.attempt)) for report in reports)
        known = [(report, sent) for report, sent in of_attempt if sent is not None and sent.slot == slot]
        if not known:
            return
        work = []
        for report, sent in known:
            num_cached = min(report.num_cached_tokens, sent.num_tokens)
            work.append((sent.num_tokens - num_cached, num_cached))
            if sent.pull_from is not None:
                self.failed_pulls.note(sent.pull_from, node_id, bool(report.pull_error), now_s)
            passed_s = now_s - sent.sent_s - report.pull_s - report.queue_s - report.compute_s
            self.overhead_s += _OVERHEAD_WEIGHT * (max(0.0, passed_s) - self.overhead_s)
        self.costs.observe(slot, work, max(report.compute_s for report, _ in known))
        for report, _ in known:
            self.note_gone(report.attempt, now_s)

    def note_gone(self, attempt_id: AttemptId, now_s: float) -> None:
        """The node does not compute it any more, if it did."""
        sent = self.sent.pop(attempt_id, None)
        if sent is None:
            return
        slot = sent.slot
        self._count(sent, -1)
        is_busy = bool(self.num_pending[slot])
        left_s = float(self._pending_s[slot]) - sent.work_s if is_busy else 0.0
        self._pending_s[slot] = left_s
        self._end_s[slot] = now_s + left_s if is_busy else -np.inf
        self._routed.remove(attempt_id, sent.keys)

    def note_load(self, node_id: NodeId, load: NodeLoad) -> bool:
        """What waits on a node beyond what this router sent, other routers sent. Returns whether that has
        changed."""
        slot = self.slots.slot_of[node_id]
        return self._note_foreign(slot, max(0, load.num_waiting_tokens - int(self.pending_tokens[slot])))

    def _note_foreign(self, slot: int, num_tokens: int) -> bool:
        """Returns whether it was another number before."""
        if self._foreign_tokens[slot] == num_tokens:
            return False
        self._foreign_tokens[slot] = num_tokens
        self._has_foreign = bool(self._foreign_tokens.any())
        return True

    def _note_open(self, slot: int, is_open: bool) -> None:
        self.is_open[slot] = is_open
        self._closed_s[slot] = 0.0 if is_open else np.inf
        self.num_open = int(np.count_nonzero(self.is_open))

    def _count(self, sent: SentPrefill, sign: int) -> None:
        slot = sent.slot
        num_before = int(self.num_pending[slot])
        self.num_pending[slot] = num_before + sign
        self.num_behind += max(0, num_before + sign - 1) - max(0, num_before - 1)
        self.pending_tokens[slot] += sign * sent.num_tokens
        self.pending_new_tokens[slot] += sign * sent.num_new_tokens
        self.pending_blocks[slot] += sign * -(-sent.num_tokens // self.block_size)

    def _grow(self) -> None:
        size = self.slots.size
        for name in _COUNT_COLUMNS:
            setattr(self, name, np.append(getattr(self, name), np.int64(0)))
        for name, idle in (("_pending_s", 0.0), ("_end_s", -np.inf), ("_closed_s", np.inf)):
            setattr(self, name, np.append(getattr(self, name), idle))
        self._foreign_tokens = np.append(self._foreign_tokens, 0.0)
        for name in ("is_open", "can_pull", "_is_indexed", "_can_give"):
            setattr(self, name, np.append(getattr(self, name), np.False_))
        self.costs.resize(size)
