"""What prompts that were sent to nodes and are not computed yet will leave in their caches.

A prompt that shares its prefix with one that a node is about to compute finds it there when its turn comes,
as a node computes in order. No KV event says so before it has happened.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvrelay.router.block_index import BlockIndex


class RoutedPrefixes:
    """Block keys by node slot, each kept as long as any prompt that brings it is on its way. Bounded by what
    the nodes have in flight, and by `max_entries`."""

    def __init__(self, max_entries: int, max_nodes: int) -> None:
        self._index = BlockIndex(max_entries, max_nodes)
        self._num_users: dict[tuple[int, int], int] = {}

    def add(self, slot: int, keys: Sequence[int]) -> None:
        """A prompt of these blocks was sent to the node."""
        users = self._num_users
        for key in keys:
            pair = slot, key
            users[pair] = users.get(pair, 0) + 1
        self._index.store(slot, keys)

    def remove(self, slot: int, keys: Sequence[int]) -> None:
        """It is computed, or comes to nothing. What `clear` took is taken as removed."""
        users, gone = self._num_users, []
        for key in keys:
            pair = slot, key
            left = users.get(pair, 0) - 1
            if left > 0:
                users[pair] = left
            elif left == 0:
                del users[pair]
                gone.append(key)
        self._index.remove(slot, gone)

    def clear(self, slot: int) -> None:
        """The node is lost."""
        for pair in [pair for pair in self._num_users if pair[0] == slot]:
            del self._num_users[pair]
        self._index.clear(slot)

    def num_blocks(self, keys: Sequence[int]) -> NDArray[np.int32]:
        """How many leading blocks of the chain are on their way into each node's cache, by slot."""
        return self._index.match_prefix(keys).device
