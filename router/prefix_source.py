"""Where a policy reads which node holds which prefix."""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvrelay.router.block_index import BlockIndex, BlockKeys, PrefixMatch
from kvrelay.router.placement import NodeView, PlacementRequest

NO_SLOT: Final = -1
"""The slot of a node that the index has no place for."""


class PrefixSource(Protocol):
    """The block index, and the names by which it knows blocks and nodes."""

    def keys(self, request: PlacementRequest, node: NodeView) -> BlockKeys:
        """Keys of the request's blocks, first to last, as nodes like this one name them."""
        ...

    def match_prefix(self, keys: BlockKeys) -> PrefixMatch:
        """How many leading blocks each node holds, by `index_slot`."""
        ...

    def pullable(self, match: PrefixMatch) -> NDArray[np.int64]:
        """The blocks of `match` that others may pull from each node, by `index_slot`: those on its device;
        none where events are missing, as a wrong guess would cost a wait."""
        ...

    def index_slot(self, node: NodeView) -> int:
        """The node's place in the index, or `NO_SLOT`; good while it is attached."""
        ...


class IndexedPrefixes:
    """A `PrefixSource` over the index that this router keeps from the nodes' events. Of a node whose events
    are missing it says what was known of it last, and what this router sent there since."""

    def __init__(self, index: BlockIndex) -> None:
        self._index = index

    def keys(self, request: PlacementRequest, node: NodeView) -> BlockKeys:
        return request.block_keys(node)

    def match_prefix(self, keys: BlockKeys) -> PrefixMatch:
        return self._index.match_prefix(keys)

    def pullable(self, match: PrefixMatch) -> NDArray[np.int64]:
        return match.device * self._index.is_current

    def index_slot(self, node: NodeView) -> int:
        return NO_SLOT if node.slot is None else node.slot
