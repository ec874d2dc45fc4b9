"""From the nodes' KV events to the block index: numbers are checked, gaps are found, guesses fill in.

A node's part of the index is *stale* while this router does not know what the node holds: before its first
snapshot, after a gap until the next one, while the node says nothing of its blocks. What the index has of it
stays, as the best there is, and the prompts that this router sends there are noted as if they were stored;
the next snapshot replaces both.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.kv_events import KVEvent, Tier
from kvrelay.router.block_index import BlockIndex
from kvrelay.router.config import RouterCoreConfig


@dataclass(slots=True, eq=False)
class NodeHoldings:
    """What this router knows of one node's blocks. `slot` is its place in the index; None: the index has no
    place left, so it stays stale. At most `max_guesses` blocks are guessed."""

    slot: int | None
    max_guesses: int
    heard_s: float
    next: int | None = None
    """The number that its next event must begin with; None: only a snapshot will do."""
    next_part: int = 0
    """The part of a snapshot that its next event must be; 0: no snapshot is under way."""
    asked_s: float | None = None
    """When a snapshot was asked for that has not begun."""
    guesses: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def is_in_step(self) -> bool:
        """Whether nothing is missing of what it has said."""
        return self.slot is not None and self.next is not None and self.next_part == 0


class KVIntake:
    """The block index, and how far each node's events have come into it."""

    def __init__(self, config: RouterCoreConfig) -> None:
        self.index = BlockIndex(config.max_index_entries, config.max_indexed_nodes)
        self.num_events = 0
        self.num_gaps = 0
        self._config = config
        self.free_slots = list(range(config.max_indexed_nodes))
        """A heap."""

    def add_node(self, num_blocks: int, now_s: float) -> NodeHoldings:
        """A node has attached; its stream begins with a snapshot."""
        slot = heappop(self.free_slots) if self.free_slots else None
        if slot is not None:
            self.index.is_current[slot] = False
        return NodeHoldings(slot, num_blocks, now_s)

    def remove_node(self, holdings: NodeHoldings) -> None:
        """The node is lost, with all it held."""
        if holdings.slot is not None:
            self.index.clear(holdings.slot)
            heappush(self.free_slots, holdings.slot)
            holdings.slot = None

    def is_stale(self, holdings: NodeHoldings, now_s: float) -> bool:
        """See the module's text."""
        return not holdings.is_in_step or now_s - holdings.heard_s > self._config.node_silence_s

    def apply(self, holdings: NodeHoldings, event: KVEvent, now_s: float) -> bool:
        """Take one event; True: something is missing, so the node is to be asked for a snapshot."""
        self.num_events += event.changes.cleared or event.changes.num_keys > 0
        holdings.heard_s = now_s
        is_missing = self._take(holdings, event, now_s)
        self.note_staleness(holdings, now_s)
        return is_missing

    def note_staleness(self, holdings: NodeHoldings, now_s: float) -> None:
        """Enter in the index whether the node is stale."""
        if holdings.slot is not None:
            self.index.is_current[holdings.slot] = not self.is_stale(holdings, now_s)

    def _take(self, holdings: NodeHoldings, event: KVEvent, now_s: float) -> bool:
        if not event.changes.cleared:
            if holdings.asked_s is not None:
                return False
            is_gap = (event.first, event.part) != (holdings.next, holdings.next_part)
            self.num_gaps += is_gap
            if is_gap or holdings.guesses:
                holdings.next, holdings.asked_s = None, now_s
                return True
        self._store(holdings, event)
        holdings.next, holdings.next_part, holdings.asked_s = event.next, event.next_part, None
        return False

    def is_snapshot_overdue(self, holdings: NodeHoldings, now_s: float) -> bool:
        """Whether a snapshot that was asked for has not begun for so long that it is asked for again now."""
        if holdings.asked_s is None or now_s - holdings.asked_s < self._config.kv_snapshot_retry_s:
            return False
        holdings.asked_s = now_s
        return True

    def guess(self, holdings: NodeHoldings, keys: NDArray[np.uint64]) -> None:
        """A prompt of these blocks went to a node that is stale: it will hold them, probably. The oldest
        guesses give way to new ones, as on the node itself."""
        slot, guesses = holdings.slot, holdings.guesses
        if slot is None:
            return
        num_known = int(self.index.match_prefix(keys).device[slot])
        for depth, key in enumerate(keys.tolist()):
            if depth >= num_known:
                guesses[key] = None
            if key in guesses:
                guesses.move_to_end(key)
        self.index.store(slot, keys[num_known:])
        num_over = len(guesses) - holdings.max_guesses
        self.index.remove(slot, [guesses.popitem(last=False)[0] for _ in range(num_over)])

    def _store(self, holdings: NodeHoldings, event: KVEvent) -> None:
        slot, changes = holdings.slot, event.changes
        if slot is None:
            return
        if changes.cleared:
            self.index.clear(slot)
            holdings.guesses.clear()
        if changes.removed:
            self.index.remove(slot, changes.removed)
        if changes.host_removed:
            self.index.remove(slot, changes.host_removed, Tier.HOST)
        if changes.stored:
            self.index.store(slot, changes.stored)
        if changes.host_stored:
            self.index.store(slot, changes.host_stored, Tier.HOST)
