"""A prefill node's prefix cache: an exact LRU of whole-prefix block ids."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockCache:
    """Holds at most `capacity` blocks. Of one prompt's blocks the last ones leave first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def num_held(self, blocks: Sequence[int], start: int = 0) -> int:
        """How many of the blocks from `start` on are held without a gap, counted from the first."""
        held = self._blocks
        for place in range(start, len(blocks)):
            if blocks[place] not in held:
                return place
        return len(blocks)

    def insert(self, blocks: Sequence[int]) -> tuple[list[int], list[int]]:
        """Use these blocks now. Returns those that are new and those that had to leave."""
        held = self._blocks
        new = [block for block in blocks if block not in held]
        for block in reversed(blocks):
            held[block] = None
            held.move_to_end(block)
        gone = [held.popitem(last=False)[0] for _ in range(len(held) - self._capacity)]
        if not gone:
            return new, gone
        never_stored = set(gone).intersection(new)
        if not never_stored:
            return new, gone
        return (
            [block for block in new if block not in never_stored],
            [block for block in gone if block not in never_stored],
        )
