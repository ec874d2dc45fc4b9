"""Numbers for nodes, so that what a policy knows of them stands in columns: the lowest free one is taken."""

from __future__ import annotations

from heapq import heappop, heappush

from kvrelay.core.ids import NodeId
from kvrelay.router.placement import NodeView


class FleetSlots:
    """The nodes of one fleet, each in a slot ``0 <= slot < size``. `size` never shrinks."""

    def __init__(self) -> None:
        self.nodes: list[NodeView | None] = []
        self.slot_of: dict[NodeId, int] = {}
        self.node_ids: tuple[NodeId | None, ...] = ()
        """By slot; a new tuple whenever a node comes or goes, so that it can be kept."""
        self._free: list[int] = []

    @property
    def size(self) -> int:
        """Slots ever used."""
        return len(self.nodes)

    @property
    def num_nodes(self) -> int:
        return len(self.slot_of)

    def add(self, node: NodeView) -> int:
        """The node's slot from now on."""
        node_id = node.description.node_id
        assert node_id not in self.slot_of
        if self._free:
            slot = heappop(self._free)
            self.nodes[slot] = node
        else:
            slot = len(self.nodes)
            self.nodes.append(node)
        self.slot_of[node_id] = slot
        self._renew_ids()
        return slot

    def remove(self, node_id: NodeId) -> int:
        """The slot that is free again."""
        slot = self.slot_of.pop(node_id)
        self.nodes[slot] = None
        heappush(self._free, slot)
        self._renew_ids()
        return slot

    def node(self, slot: int) -> NodeView:
        """The node in a slot that is taken."""
        node = self.nodes[slot]
        assert node is not None
        return node

    def _renew_ids(self) -> None:
        self.node_ids = tuple(node.description.node_id if node else None for node in self.nodes)
