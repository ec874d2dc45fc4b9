"""Where a policy reads which node holds which prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvrelay.core.ids import NodeId
from kvrelay.router.block_index import PrefixMatch
from kvrelay.router.placement import NodeView, PlacementRequest


class PrefixSource(Protocol):
    """The block index, and the names by which it knows blocks and nodes."""

    def keys(self, request: PlacementRequest, node: NodeView) -> Sequence[int]:
        """Keys of the request's blocks, first to last, as nodes like this one name them."""
        ...

    def match_prefix(self, keys: Sequence[int]) -> PrefixMatch:
        """How many leading blocks each node holds, by `index_slot`."""
        ...

    def index_slot(self, node_id: NodeId) -> int:
        """The node's place in the index."""
        ...
