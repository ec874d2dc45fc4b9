"""What prompts that were sent to nodes and are not computed yet will leave in their caches.

A prompt that shares its prefix with one that a node is about to compute finds it there when its turn comes,
as a node computes in order. No KV event says so before it has happened.

A block's key names its whole prefix, so two chains are equal up to wherever their keys are: how far they go
together is found by halving, and only chains with the same first key are looked at.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.ids import AttemptId
from kvrelay.router.block_index import BlockKeys


class RoutedPrefixes:
    """Chains of block keys by node slot, as many as prompts are on their way."""

    def __init__(self) -> None:
        self._by_first: dict[int, dict[AttemptId, tuple[int, BlockKeys]]] = {}

    def add(self, attempt_id: AttemptId, slot: int, keys: BlockKeys) -> None:
        """A prompt of these blocks was sent to the node."""
        if len(keys):
            self._by_first.setdefault(int(keys[0]), {})[attempt_id] = slot, keys

    def remove(self, attempt_id: AttemptId, keys: BlockKeys) -> None:
        """It is computed, or comes to nothing; `keys` are those it was added with."""
        if not len(keys):
            return
        first = int(keys[0])
        alike = self._by_first[first]
        del alike[attempt_id]
        if not alike:
            del self._by_first[first]

    def raise_blocks(self, num_blocks: NDArray[np.int64], keys: BlockKeys) -> None:
        """Raise ``num_blocks[slot]`` to the leading blocks of the chain that are on their way there."""
        if not len(keys):
            return
        for slot, others in self._by_first.get(int(keys[0]), {}).values():
            known = int(num_blocks[slot])
            if known < len(others) and known < len(keys) and keys[known] == others[known]:
                num_blocks[slot] = _num_common(keys, others, known + 1)


def _num_common(keys: BlockKeys, others: BlockKeys, num_known: int) -> int:
    """Leading keys that both have, of which `num_known` are known."""
    low, high = num_known, min(len(keys), len(others))
    while low < high:
        middle = (low + high) // 2
        if keys[middle] == others[middle]:
            low = middle + 1
        else:
            high = middle
    return low
